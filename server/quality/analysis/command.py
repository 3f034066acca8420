"""`foldserve analyze` from its arguments to the files it writes."""

from __future__ import annotations

from collections.abc import Sequence

from foldserve.server.quality.analysis.drawing import draw
from foldserve.server.quality.analysis.options import AnalysisOptions
from foldserve.server.quality.analysis.report import analyze, summary
from foldserve.server.quality.evaluation.questions import load_questions

RESULT_FILE = "analysis.json"


def run(options: AnalysisOptions, engine_options: Sequence[str]) -> None:
    """Runs the studies and writes their figures and charts; a ValueError comes before anything is written."""
    samples = load_questions(options.data, options.samples, options.question)

    from foldserve.server.quality.engine.study import ModelStudy  # vLLM, which takes seconds

    model = ModelStudy(options.model, engine_options, command="analyze")
    tokens = [model.tokens(sample.open(), options.ratio) for sample in samples]  # refuses a ratio too high
    model.start()
    analysis = analyze(options.model, model, samples, tokens, options.ratio)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / RESULT_FILE
    file.write_text(analysis.model_dump_json(indent=1) + "\n")
    files = [file, *draw(analysis, options.output)]
    print(f"{summary(analysis)}\nWritten to {', '.join(map(str, files))}.")
