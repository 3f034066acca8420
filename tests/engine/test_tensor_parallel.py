"""Two tensor-parallel ranks on the CPU: reduction in and after the tower and in the decoder equal plain PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.conftest import Case, greedy, start_engine
from tests.engine.reference import Reference
from tests.engine.withdrawal.conftest import Expected
from tests.engine.withdrawal.harness import AskedCase
from tests.images import photo

K = 2
TOKENS = 4
PROMPT = "USER: <image>\nWhat is in the picture? ASSISTANT:"
REDUCED = [
    Case(PROMPT, [photo(1)], [{"method": "folder_cls", "ratio": 0.5}]),
    Case(PROMPT, [photo(2)], [{"ratio": 0.75}]),
]
IN_DECODER = [
    AskedCase(PROMPT, (3,), asked='{"withdraw": true}'),
    AskedCase(PROMPT, (3,), asked='{"method": "folder+fastv", "keep_tokens": 36, "decoder_ratio": 0.5}'),
    AskedCase(PROMPT, (3,), asked='{"method": "folder+illava_decoder", "keep_tokens": 36, "decoder_ratio": 0.5}'),
]


def main(path: Path) -> None:
    from foldserve.server.engine import withdrawal

    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    llm = start_engine(path, max_num_batched_tokens=100, **ranks, **withdrawal.configure(K, device="cpu"))
    deep = [Case(case.prompt, case.images, case.reductions) for case in IN_DECODER]
    answers = greedy(llm, [*REDUCED, *deep], TOKENS)
    reference, known = Reference(path), Expected(path)
    expected = [reference.generate(case.prompt, case.images, case.reductions, TOKENS) for case in REDUCED]
    expected += [known.answer(K, case, TOKENS) for case in IN_DECODER]
    for got, want in zip(answers, expected, strict=True):
        assert got[0] == want[0]
        assert got[1] == pytest.approx(want[1], abs=2e-4)
    print("equal to the reference")


def test_two_ranks(tiny_llava: Path) -> None:
    """In a process of its own, with a core for each rank."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    env = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": f"{first}|{second}"}
    command = [sys.executable, "-m", "tests.engine.test_tensor_parallel", str(tiny_llava)]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "equal to the reference" in ran.stdout


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  # settings of the process

    main(Path(sys.argv[1]))
