"""Two tensor-parallel ranks on the CPU: reduction in and after the tower and in the decoder equal plain PyTorch.

Qwen3-VL, in `make test-runners`: its tower is split over the ranks as the decoder is, or has all weights on each
(`mm_encoder_tp_mode="data"`). Unreduced images are dealt out to the ranks then, and each rank encodes all those that
are reduced in the tower.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import Case, greedy, start_engine
from tests.engine.maps import engine_maps, members
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
    Case(PROMPT, [photo(2)], [{"method": "mmtok", "ratio": 0.75, "query": "Where is it?"}]),
]
IN_DECODER = [
    AskedCase(PROMPT, (3,), asked='{"withdraw": true}'),
    AskedCase(PROMPT, (3,), asked='{"method": "folder+fastv", "keep_tokens": 36, "decoder_ratio": 0.5}'),
    AskedCase(PROMPT, (3,), asked='{"method": "folder+illava_decoder", "keep_tokens": 36, "decoder_ratio": 0.5}'),
]


RANKS: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "max_num_batched_tokens": 100}


def llava(path: Path) -> None:
    from foldserve.server.engine import withdrawal

    llm = start_engine(path, **RANKS, **withdrawal.configure(K, device="cpu"))
    deep = [Case(case.prompt, case.images, case.reductions) for case in IN_DECODER]
    answers = greedy(llm, [*REDUCED, *deep], TOKENS)
    reference, known = Reference(path), Expected(path)
    expected = [reference.generate(case.prompt, case.images, case.reductions, TOKENS) for case in REDUCED]
    expected += [known.answer(K, case, TOKENS) for case in IN_DECODER]
    for got, want in zip(answers, expected, strict=True):
        assert got[0] == want[0]
        assert got[1] == pytest.approx(want[1], abs=2e-4)
    for case in REDUCED:  # of each only the first rank says where tokens go
        ((found,),) = engine_maps(llm, "<image>", case.images, case.reductions)
        assert members(found) == reference.members(case.images[0], case.reductions[0])
    print("equal to the reference")


def qwen(path: Path) -> None:
    from foldserve.server.engine import withdrawal
    from tests.engine import test_qwen
    from tests.engine.qwen_reference import QwenReference
    from tests.engine.test_qwen import SIZES, one_image, two_images

    cases = [
        *test_qwen.IN_THE_DECODER[1:7:5],
        one_image(*SIZES[0]),
        one_image(*SIZES[1], method="downsample", ratio=0.5),
        one_image(*SIZES[2], method="tome", ratio=0.5),
        one_image(*SIZES[2], method="mmtok", ratio=0.5, query="what is it?"),
        two_images({}, {"ratio": 0.75}),
        two_images({"method": "illava", "layers": [1, 2], "ratio": 0.5}, {}),
    ]
    reference = QwenReference(path, test_qwen.K)
    expected = [reference.generate(case.prompt, case.images, case.reductions, TOKENS) for case in cases]
    for mode in ("weights", "data"):
        options = {"max_model_len": 512, "mm_encoder_tp_mode": mode}
        llm = start_engine(path, **options, **RANKS, **withdrawal.configure(test_qwen.K, device="cpu"))
        assert llm.llm_engine.model_config.multimodal_config.mm_encoder_tp_mode == mode
        for case, got, want in zip(cases, greedy(llm, cases, TOKENS), expected, strict=True):
            assert got[0] == want[0], (mode, case.reductions)
            assert got[1] == pytest.approx(want[1], abs=2e-5)
        llm.llm_engine.engine_core.shutdown()
    print("equal to the reference")


def test_two_ranks(tiny_llava: Path) -> None:
    assert_equal("llava", tiny_llava)


def assert_equal(family: str, path: Path) -> None:
    """In a process of its own, with a core for each rank."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    env = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": f"{first}|{second}"}
    command = [sys.executable, "-m", "tests.engine.test_tensor_parallel", family, str(path)]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "equal to the reference" in ran.stdout


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  # settings of the process

    {"llava": llava, "qwen": qwen}[sys.argv[1]](Path(sys.argv[2]))
