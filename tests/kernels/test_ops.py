"""`ops`, the only door to the kernels: when it chooses a kernel, and how the GPU benchmark overrides it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from inspect import signature
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig

from foldserve.kernels import groups, matching, ops, picking, rows, selection
from foldserve.kernels.warm_up import Widths
from foldserve.loadtest.micro.kernels import main
from foldserve.reducers.ops import Op
from tests.kernels.benchmark import check_benchmark
from tests.kernels.conftest import Run

TWINS = {
    twin.__name__: twin
    for twin in (
        matching.match,
        selection.place,
        groups.group_mean,
        groups.group_sum,
        selection.lowest_into_one,
        picking.farthest_first,
        rows.kv_slots,
    )
}


@pytest.fixture(autouse=True)
def references_afterwards() -> Iterator[None]:
    yield
    ops.select_kernels(torch.device("cpu"), triton=True)


def in_use() -> dict[str, object]:
    return {op.reference.__name__: op._run for op in ops.OPS}


def test_kernels_on_a_gpu_else_torch() -> None:
    references = {op.reference.__name__: op.reference for op in ops.OPS}
    assert in_use() == references
    ops.select_kernels(torch.device("cuda", 1), triton=True)
    assert in_use() == TWINS
    ops.select_kernels(torch.device("cpu"), triton=True)
    assert in_use() == references


def test_torch_on_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    ops.select_kernels(torch.device("cuda"), triton=True)
    assert not in_use().items() & TWINS.items()


def test_torch_on_a_gpu_where_no_kernels_are_wanted() -> None:
    ops.select_kernels(torch.device("cuda"), triton=False)
    assert not in_use().items() & TWINS.items()


def test_the_model_chooses_for_its_device_and_compiles_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    llava: Any = import_module("foldserve.server.engine.families.llava")  # vLLM, which takes its time

    class Built(Exception):
        """The rest of the model."""

    def build(*args: object, **options: object) -> None:
        raise Built

    warmed: list[object] = []
    monkeypatch.setattr("foldserve.server.engine.model.warm_up", lambda *model: warmed.append(model))
    monkeypatch.setattr(llava.LlavaForConditionalGeneration, "__init__", build)
    vision = CLIPVisionConfig(hidden_size=96, num_attention_heads=4)
    config = LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=vision,
        text_config={"model_type": "llama", "hidden_size": 64},
    )
    references = {op.reference.__name__: op.reference for op in ops.OPS}
    for device, wanted, expected in (("cuda", "1", TWINS), ("cuda", "0", references), ("cpu", "1", references)):
        monkeypatch.setenv("FOLDSERVE_TRITON", wanted)
        for layer, decoder in ((None, None), (1, 64)):
            with pytest.raises(Built):
                llava.FoldLlavaForConditionalGeneration(
                    vllm_config=SimpleNamespace(
                        device_config=SimpleNamespace(device_type=device),
                        compilation_config=SimpleNamespace(cudagraph_mm_encoder=False),
                        lora_config=None,
                        model_config=SimpleNamespace(
                            hf_config=config,
                            dtype=torch.bfloat16,
                            multimodal_config=None,
                            is_hybrid=False,
                            get_inputs_embeds_size=lambda: 64,
                        ),
                        additional_config={"foldserve": {"withdraw_layer": layer}},
                    )
                )
            assert in_use() == expected
            compiled = [(Widths(96, 24, embedding=64, decoder=decoder), torch.bfloat16, torch.device("cuda"))]
            assert warmed == (compiled if expected is TWINS else [])
            warmed.clear()


@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.reference.__name__)
def test_twins_have_the_signature_of_their_reference(op: Op[..., object]) -> None:
    assert signature(TWINS[op.reference.__name__]) == signature(op.reference)


def test_the_benchmark_times_every_operation_with_and_without_kernels(run: Run) -> None:
    run(check_benchmark)


def test_the_benchmark_says_that_without_a_gpu_there_is_nothing_to_compare(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "nothing to compare" in capsys.readouterr().err
