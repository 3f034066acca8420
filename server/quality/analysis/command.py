"""`foldserve analyze` from its arguments to the files it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from foldserve.reducers.item import plan_item
from foldserve.reducers.plan import Reduction
from foldserve.server.quality.analysis.drawing import draw
from foldserve.server.quality.analysis.report import analyze, summary
from foldserve.server.quality.evaluation.questions import load_questions

RESULT_FILE = "analysis.json"
_NEEDED = {"matplotlib": "matplotlib", "ot": "pot"}


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for.

    Attributes:
        model: Hugging Face name or directory.
        data: folder of images or JSONL file; None: the built-in scenes.
        samples: how many images to take.
        question: asked of images that bring none.
        ratio: share of tokens that is merged for the distances, in (0, 1).
        output: the folder to write to.
    """

    model: str
    data: Path | None
    samples: int
    question: str
    ratio: float
    output: Path

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"--ratio is the share of tokens to merge, in (0, 1), not {self.ratio}")
        missing = [package for module, package in _NEEDED.items() if find_spec(module) is None]
        if missing:
            raise ValueError(f'the analysis needs {" and ".join(missing)}: pip install "foldserve[quality]"')


def run(options: Options, engine_options: Sequence[str]) -> None:
    """Runs the studies, writes their figures and pictures.

    Raises:
        ValueError: what is asked cannot be done; nothing was written.
    """
    samples = load_questions(options.data, options.samples, options.question)

    from foldserve.server.quality.engine.study import Study  # vLLM, which takes seconds

    model = Study(options.model, engine_options, command="analyze")
    tokens = plan_item(Reduction(ratio=options.ratio), model.layout).encoded  # refuses a ratio that leaves nothing
    model.start()
    analysis = analyze(options.model, model, samples, tokens, options.ratio)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / RESULT_FILE
    file.write_text(analysis.model_dump_json(indent=1) + "\n")
    files = [file, *draw(analysis, options.output)]
    print(f"{summary(analysis)}\nWritten to {', '.join(map(str, files))}.")
