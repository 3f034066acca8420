"""`foldserve calibrate --auto` from its arguments to the files it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

from foldserve.loadtest.report.journal import run_identity
from foldserve.reducers.ladder import STEPS
from foldserve.reducers.plan import InvalidReduction
from foldserve.server.auto import DEFAULT_GROUP
from foldserve.server.quality.auto.file import FILE_NAME, AutoCalibration, Group, default_file
from foldserve.server.quality.auto.measure import StepJournal, measure, takable
from foldserve.server.quality.auto.page import html, text
from foldserve.server.quality.auto.rule import chosen_step, risk_bounds, samples_needed, shares_changed
from foldserve.server.quality.calibration_file import model_folder, model_hash
from foldserve.server.quality.calibration_options import CalibrationOptions
from foldserve.server.quality.evaluation.questions import ALL, Question, data_hash, load_questions
from foldserve.server.quality.evaluation.variants import Spec, parse_specs

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
    layouts = model.layouts(question.open() for question in questions)
    plans = takable(spec, layouts)
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
    calibration = AutoCalibration(
        model=options.model,
        model_hash=weights,
        reduction=reduction,
        target=options.target,
        answer_tokens=options.answer_tokens,
        data="built-in scenes" if options.data is None else options.data.name,
        data_hash=asked,
        tokens=fmean(layout.tokens for layout in layouts),
        steps=tuple(plans),
        groups=by_group(questions, changed, tuple(plans), options.target),
        together=group_of(changed, tuple(plans), options.target),
    )
    return _write(calibration, options, cache_dir)


def by_group(
    questions: Sequence[Question], changed: Sequence[Sequence[bool]], steps: Sequence[int], target: float
) -> Mapping[str, Group]:
    """What each group may have, in the order of the names."""
    flags: dict[str, list[Sequence[bool]]] = {}
    for question, own in zip(questions, changed, strict=True):
        flags.setdefault(question.kind, []).append(own)
    return {name: group_of(flags[name], steps, target) for name in sorted(flags)}


def group_of(changed: Sequence[Sequence[bool]], steps: Sequence[int], target: float) -> Group:
    """What samples whose answers changed so may have; see `chosen_step`."""
    return Group(
        samples=len(changed),
        step=chosen_step(changed, steps, target),
        changed=tuple(shares_changed(changed)),
        bound=tuple(risk_bounds(changed)),
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


def _write(calibration: AutoCalibration, options: CalibrationOptions, cache_dir: Path) -> int:
    served = options.output or default_file(options.model, cache_dir)
    for file in dict.fromkeys([options.results / FILE_NAME, served]):
        calibration.write(file)
    (options.results / "index.html").write_text(html(calibration))
    print(f"{text(calibration)}\nWritten to {options.results}; the calibration to {served}.")
    if all(group.step == STEPS for group in calibration.groups.values()):
        needed = samples_needed(calibration.target)
        print(
            f"No group can be reduced: at --target {calibration.target:g} each needs {needed} samples at least, and at "
            "that number not one changed answer. Give more samples, a higher target, or another method."
        )
        return 1
    place = "" if options.output is None else f" --auto {options.output}"
    print(f'Serve with it: foldserve serve {options.model}{place}; requests say "reduction": {{"ratio": "auto"}}')
    return 0
