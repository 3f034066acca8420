"""`foldserve evaluate` from its arguments to the files it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from foldserve.loadtest.report.journal import run_identity
from foldserve.server.quality.calibration_file import model_folder, model_hash
from foldserve.server.quality.evaluation.card import CARD_FILE, Card, refusals, results
from foldserve.server.quality.evaluation.journal import OutcomeJournal
from foldserve.server.quality.evaluation.plots import plots
from foldserve.server.quality.evaluation.questions import HELD_OUT_SEED, data_hash, load_questions
from foldserve.server.quality.evaluation.run import measure, reference
from foldserve.server.quality.evaluation.tables import html, markdown
from foldserve.server.quality.evaluation.variants import complete, default_specs, parse_specs, variants

_NEEDED = ("matplotlib", "scipy")


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for.

    Attributes:
        model: Hugging Face name or directory.
        methods: as `parse_specs` reads them; empty: all there are.
        ratios: shares of tokens removed, each in [0, 1); 0 is measured in any case.
        withdraw: values of K.
        data: folder of images or JSONL file; None: the built-in scenes.
        limit: how many questions to take.
        question: asked of images that bring none.
        max_tokens: of an answer.
        batch: questions that the engine is given at once.
        output: the folder to write to; results that lie there are not measured again.
        card: where the card goes; None: into a local MODEL's directory, where `/v1/reducers` looks.
    """

    model: str
    methods: tuple[str, ...]
    ratios: tuple[float, ...]
    withdraw: tuple[int, ...]
    data: Path | None
    limit: int
    question: str
    max_tokens: int
    batch: int
    output: Path
    card: Path | None

    def __post_init__(self) -> None:
        for ratio in self.ratios:
            if not 0 <= ratio < 1:
                raise ValueError(f"--ratios are shares of vision tokens to remove, each in [0, 1), not {ratio}")
        for name in ("max_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        missing = [name for name in _NEEDED if find_spec(name) is None]
        if missing:
            raise ValueError(f'evaluation needs {" and ".join(missing)}: pip install "foldserve[quality]"')

    @property
    def card_file(self) -> Path:
        """Where the card goes beside the output folder."""
        if self.card is not None:
            return self.card
        return (Path(self.model) if Path(self.model).is_dir() else self.output) / CARD_FILE


def run(options: Options, engine_options: Sequence[str]) -> None:
    """Measures what is missing and writes the card in all its forms.

    Raises:
        ValueError: what is asked cannot be done; nothing was measured.
    """
    specs = complete(parse_specs(options.methods) or default_specs(bool(options.withdraw)), bool(options.withdraw))
    questions = load_questions(options.data, options.limit, options.question)

    from foldserve.server.quality.engine.offline import AnsweringModel  # vLLM, which takes seconds

    model = AnsweringModel(options.model, engine_options)
    for layer in options.withdraw:
        if not 1 <= layer < model.layers:
            raise ValueError(f"--withdraw takes K from 1 to {model.layers - 1} for this model, not {layer}")
    ratios = sorted({ratio for ratio in options.ratios if ratio > 0})
    todo, refused = variants(specs, ratios, sorted(set(options.withdraw)), model.layout, model.layers)
    weights, asked = model_hash(model_folder(model.model, model.revision)), data_hash(questions)
    engine = {"vLLM": version("vllm"), "Options": " ".join(engine_options) or "none"}
    identity = run_identity(weights=weights, data=asked, engine=engine, max_tokens=options.max_tokens)
    journal = OutcomeJournal(options.output, identity)
    measure(model, questions, todo, journal, max_tokens=options.max_tokens, batch=options.batch)
    card = Card(
        model=options.model,
        model_hash=weights,
        data=_name_of(options.data),
        data_hash=asked,
        questions=len(questions),
        tokens=model.layout.tokens,
        layers=model.layers,
        engine=engine,
        results=results(questions, reference(model), todo, journal),
        refused=refusals(refused),
    )
    _write(card, options)


def _write(card: Card, options: Options) -> None:
    """All forms of the card into the output folder, and the card to where it is served from."""
    drawn = plots(card)
    for stem, svg in drawn.items():
        (options.output / f"{stem}.svg").write_text(svg)
    (options.output / "index.html").write_text(html(card, drawn))
    (options.output / "quality.md").write_text(markdown(card))
    for file in dict.fromkeys([options.output / CARD_FILE, options.card_file]):
        card.write(file)
    print(markdown(card))
    print(f"Written to {options.output}; the card to {options.card_file}.")


def _name_of(data: Path | None) -> str:
    return f"built-in scenes, seed {HELD_OUT_SEED}, held out from training" if data is None else data.name
