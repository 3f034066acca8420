"""The jobs of `foldserve gpu-check` on model runner V2, which a GPU has; `test_gpu_check.py` runs it."""

from __future__ import annotations

from pathlib import Path

from foldserve.server.quality.engine.gpu_check import answer
from foldserve.server.quality.gpu_check.common import engine
from foldserve.server.quality.gpu_check.comparison import compare, first
from foldserve.server.quality.gpu_check.correctness import FP32
from foldserve.server.quality.gpu_check.jobs import AnswerJob
from foldserve.server.quality.gpu_check.references import REFERENCES, References
from tests.quality.gpu_check.job_runners import InProcess

TOKENS = 4


def test_references(tmp_path: Path) -> None:
    known = References.load()
    chosen = range(0, len(known.cases), 3)
    cases = tuple(known.cases[i].model_copy(update={"tokens": TOKENS}) for i in chosen)
    room = {"max_model_len": 512, "max_num_seqs": 16, "max_num_batched_tokens": 220, "num_gpu_blocks_override": 60}
    asked = engine(InProcess(tmp_path), known.withdraw_layer, dtype="float32", **room)
    found = answer.run(AnswerJob(engine=asked, cases=cases, references=REFERENCES))
    comparison = compare(cases, first([known.answers[i] for i in chosen], TOKENS), found.rounds[0], FP32)
    assert not comparison.wrong and comparison.compared == len(cases) * TOKENS
    assert found.runner == "v2" and found.facts["runner"] == "v2"
    assert set(found.steps) == {"NONE"} and found.held_blocks == 0
