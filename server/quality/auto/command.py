"""`foldserve calibrate --auto` from its arguments to the files it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from foldserve.loadtest.report.journal import run_identity
from foldserve.reducers.item import Layout
from foldserve.reducers.ladder import STEPS, step_for
from foldserve.reducers.plan import InvalidReduction
from foldserve.server.auto import DEFAULT_GROUP
from foldserve.server.quality.auto.file import FILE_NAME, AutoCalibration, Group, default_file, mean_share
from foldserve.server.quality.auto.measure import StepJournal, measure, possible_steps
from foldserve.server.quality.auto.page import html, text
from foldserve.server.quality.auto.rule import (
    capped,
    chosen_step,
    make_monotone,
    risk_bounds,
    samples_needed,
    shares_changed,
)
from foldserve.server.quality.calibration_file import model_folder, model_hash
from foldserve.server.quality.calibration_options import CalibrationOptions
from foldserve.server.quality.evaluation.questions import ALL, Question, data_hash, load_questions
from foldserve.server.quality.evaluation.variants import Spec, parse_specs

if TYPE_CHECKING:
    from foldserve.server.quality.engine.offline import AnsweringModel

SEED = 4
"""Of the built-in scenes: others than an evaluation, and a search for K, ask about."""


def run(options: CalibrationOptions, cache_dir: Path, engine_options: Sequence[str]) -> int:
    """Calibrates, writes the file and the page, says what was found; exit status 1 if no group can be reduced.

    Raises:
        ValueError: what is asked cannot be done; nothing was measured.
    """
    spec = _spec(options.method)
    questions = _questions(options)

    from foldserve.server.quality.engine.offline import AnsweringModel  # vLLM, which takes seconds

    model = AnsweringModel(options.model, engine_options, "calibrate")
    return write_all(_calibrate(model, spec, questions, options, engine_options), options, cache_dir)


def _calibrate(
    model: AnsweringModel,
    spec: Spec,
    questions: Sequence[Question],
    options: CalibrationOptions,
    engine_options: Sequence[str],
) -> AutoCalibration:
    """Measures what the journal in the results folder lacks."""
    layouts = model.layouts(question.open() for question in questions)
    plans = possible_steps(spec, layouts)
    steps = tuple(plans)
    caps = caps_of(model, questions, layouts, steps, options.pixel_cap)
    weights, asked = model_hash(model_folder(model.model, model.revision)), data_hash(questions)
    engine = {"vLLM": version("vllm"), "Options": " ".join(engine_options)}
    reduction = dict(spec.fields)
    identity = run_identity(
        weights=weights, data=asked, engine=engine, reduction=reduction, answer_tokens=options.answer_tokens
    )
    journal = StepJournal(options.results, identity)
    changed = measure(
        model, questions, layouts, spec, plans, journal, answer_tokens=options.answer_tokens, batch=options.batch
    )
    return AutoCalibration(
        model=options.model,
        model_hash=weights,
        reduction=reduction,
        target=options.target,
        answer_tokens=options.answer_tokens,
        data="built-in scenes" if options.data is None else options.data.name,
        data_hash=asked,
        tokens=fmean(layout.tokens for layout in layouts),
        steps=steps,
        groups=by_group(questions, changed, steps, options.target, caps),
        together=group_of(changed, steps, options.target, caps),
        pixel_cap=options.pixel_cap,
        kept_uncapped=None if caps is None else mean_share(by_group(questions, changed, steps, options.target)),
    )


def caps_of(
    model: AnsweringModel,
    questions: Sequence[Question],
    layouts: Sequence[Layout],
    steps: Sequence[int],
    levels: int | None,
) -> list[int] | None:
    """The step that each question's image gets at most by its pixels; None without a cap.

    Raises:
        ValueError: the model's tokens are not cells of pixels, or its options leave no bytes of an image.
    """
    if levels is None:
        return None
    if not model.family.takes_cells:
        raise ValueError(
            f"--pixel-cap {levels} needs a model whose tokens are cells of an image's pixels, as LLaVA-1.5's and "
            "Qwen-VL's are, and this model's are not: leave it out"
        )
    counts = model.unpredicted((question.open() for question in questions), levels)
    return [step_for(count, layout.tokens, (*steps, STEPS)) for count, layout in zip(counts, layouts, strict=True)]


def by_group(
    questions: Sequence[Question],
    changed: Sequence[Sequence[bool]],
    steps: Sequence[int],
    target: float,
    caps: Sequence[int] | None = None,
) -> Mapping[str, Group]:
    """What each group may have, in the order of the names; see `group_of`."""
    places: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        places.setdefault(question.kind, []).append(place)
    return {
        name: group_of([changed[i] for i in own], steps, target, None if caps is None else [caps[i] for i in own])
        for name, own in sorted(places.items())
    }


def group_of(
    changed: Sequence[Sequence[bool]], steps: Sequence[int], target: float, caps: Sequence[int] | None = None
) -> Group:
    """What samples whose answers changed so may have; see `chosen_step`.

    Args:
        caps: the step that each sample gets at most; None: without a cap.
    """
    if caps is None:
        measured, bounds = changed, risk_bounds(changed)
        step, kept = chosen_step(changed, steps, target), None
    else:
        # What counts as changed without a cap does so with it: a request's bounds may lift an image above its cap.
        measured, losses = capped(changed, steps, caps), capped([make_monotone(own) for own in changed], steps, caps)
        bounds, step = risk_bounds(losses), chosen_step(losses, (*steps, STEPS), target)
        kept = fmean(min(step, cap) for cap in caps) / STEPS if bounds[-1] <= target else None
    return Group(
        samples=len(changed),
        step=step,
        changed=tuple(shares_changed(measured)),
        bound=tuple(bounds),
        is_capped=kept is not None,
        kept=kept,
    )


def _spec(method: str) -> Spec:
    specs = parse_specs([method])
    if len(specs) != 1:
        raise ValueError(f"--method takes one method, not {method!r}")
    (spec,) = specs
    try:
        reduction = spec.reduction(ratio=0.5)
    except InvalidReduction as error:
        raise ValueError(f"--method {method}: {error}") from error
    if reduction.decoder is not None:
        raise ValueError(
            f"--method {method}: {reduction.decoder!r} removes tokens in the decoder, behind which no engine can "
            "compare an answer in one prefill: choose a method before the decoder"
        )
    return spec


def _questions(options: CalibrationOptions) -> list[Question]:
    count = options.samples or (10**9 if options.data else 600)
    found = load_questions(options.data, count, options.question, kind_field=options.group_field or "kind", seed=SEED)
    if options.group_field is None:
        return [replace(question, kind=DEFAULT_GROUP) for question in found]
    return [replace(question, kind=DEFAULT_GROUP if question.kind == ALL else question.kind) for question in found]


def write_all(calibration: AutoCalibration, options: CalibrationOptions, cache_dir: Path) -> int:
    """Writes the file and the page and says what was found; exit status 1 if no group can be reduced."""
    served = options.output or default_file(options.model, cache_dir)
    for file in dict.fromkeys([options.results / FILE_NAME, served]):
        calibration.write(file)
    (options.results / "index.html").write_text(html(calibration))
    print(f"{text(calibration)}\nWritten to {options.results}; the calibration to {served}.")
    if calibration.kept == 1:
        needed = samples_needed(calibration.target)
        print(
            f"No group can be reduced: at --target {calibration.target:g} each needs {needed} samples at least, and at "
            "that number not one changed answer. Give more samples, a higher target, or another method."
        )
        return 1
    place = "" if options.output is None else f" --auto {options.output}"
    print(f'Serve with it: foldserve serve {options.model}{place}; requests say "reduction": {{"ratio": "auto"}}')
    return 0
