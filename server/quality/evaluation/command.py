"""`foldserve evaluate` from its arguments to the files it writes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from foldserve.loadtest.report.journal import run_identity
from foldserve.loadtest.report.machine import machine, measured_on
from foldserve.server.quality.calibration_file import model_folder, model_hash
from foldserve.server.quality.evaluation.card import CARD_FILE, Card, refusals, results
from foldserve.server.quality.evaluation.journal import OutcomeJournal
from foldserve.server.quality.evaluation.options import EvaluationOptions
from foldserve.server.quality.evaluation.questions import HELD_OUT_SEED, data_hash, load_questions
from foldserve.server.quality.evaluation.run import measure, reference_variant
from foldserve.server.quality.evaluation.tables import markdown, write_page
from foldserve.server.quality.evaluation.variants import complete, default_specs, parse_specs, variants


def run(options: EvaluationOptions, engine_options: Sequence[str]) -> None:
    """Measures what the journal lacks and writes the card; a ValueError comes before anything is measured."""
    specs = complete(parse_specs(options.methods) or default_specs(bool(options.withdraw)), bool(options.withdraw))
    questions = load_questions(options.data, options.limit, options.question)

    from foldserve.server.quality.engine.offline import AnsweringModel  # vLLM, which takes seconds

    model = AnsweringModel(options.model, engine_options)
    for layer in options.withdraw:
        if not 1 <= layer < model.layers:
            raise ValueError(f"--withdraw takes K from 1 to {model.layers - 1} for this model, not {layer}")
    ratios = sorted({ratio for ratio in options.ratios if ratio > 0})
    layouts = model.layouts(question.open() for question in questions)
    base = reference_variant(layouts, model.layers)
    todo, refused = variants(specs, ratios, sorted(set(options.withdraw)), layouts, model.layers)
    weights, asked = model_hash(model_folder(model.model, model.revision)), data_hash(questions)
    engine = {"vLLM": version("vllm"), "Options": " ".join(engine_options) or "none"}
    identity = run_identity(weights=weights, data=asked, engine=engine, max_tokens=options.max_tokens)
    journal = OutcomeJournal(options.output, identity)
    measure(model, questions, base, todo, journal, max_tokens=options.max_tokens, batch=options.batch)
    card = Card(
        model=options.model,
        model_hash=weights,
        data=_name_of(options.data),
        data_hash=asked,
        questions=len(questions),
        tokens=round(base.kept),
        layers=model.layers,
        engine=engine,
        machine=machine(),
        date=measured_on(options.output),
        results=results(questions, base, todo, journal),
        refused=refusals(refused),
    )
    _write(card, options)


def _write(card: Card, options: EvaluationOptions) -> None:
    """Writes the card's pages to the output folder, and the card there and where `serve` reads it."""
    write_page(card, options.output)
    served = card_file(options)
    for file in dict.fromkeys([options.output / CARD_FILE, served]):
        card.write(file)
    print(markdown(card))
    print(f"Written to {options.output}; the card to {served}.")


def card_file(options: EvaluationOptions) -> Path:
    """The second place that the card is written to, beside the output folder."""
    if options.card is not None:
        return options.card
    return (Path(options.model) if Path(options.model).is_dir() else options.output) / CARD_FILE


def _name_of(data: Path | None) -> str:
    return f"built-in scenes, seed {HELD_OUT_SEED}, held out from training" if data is None else data.name
