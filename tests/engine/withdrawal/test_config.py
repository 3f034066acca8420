"""Options refused at start-up, and the error messages."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from foldserve.server.engine import withdrawal
from tests.engine.conftest import LAYERS


@pytest.fixture(scope="module")
def valid(eight_layers: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(str(eight_layers), enforce_eager=True, **withdrawal.configure(4, device="cpu"))
    return arguments.create_engine_config()


@pytest.fixture
def config(valid: Any) -> Any:
    return deepcopy(valid)


def put(path: str, value: object) -> Callable[[Any], None]:
    """Sets `config.<path>`, past vLLM's own validation."""

    def change(config: Any) -> None:
        *owners, name = path.split(".")
        for owner in owners:
            config = getattr(config, owner)
        object.__setattr__(config, name, value)

    return change


CONFLICTS: dict[str, Callable[[Any], None]] = {
    "a model of Llava": put("model_config.hf_config.architectures", ["Qwen2ForCausalLM"]),
    "--pipeline-parallel-size": put("parallel_config.pipeline_parallel_size", 2),
    "--decode-context-parallel-size": put("parallel_config.decode_context_parallel_size", 2),
    "--prefill-context-parallel-size": put("parallel_config.prefill_context_parallel_size", 2),
    "--enable-dbo": put("parallel_config.enable_dbo", True),
    "--enable-lora": put("lora_config", SimpleNamespace()),
    "--speculative-config": put("speculative_config", SimpleNamespace()),
    "--kv-transfer-config": put("kv_transfer_config", SimpleNamespace()),
    "--kv-events-config": put("kv_events_config", SimpleNamespace(enable_kv_cache_events=True)),
    "--disable-hybrid-kv-cache-manager": put("scheduler_config.disable_hybrid_kv_cache_manager", True),
    "--kv-sharing-fast-prefill": put("cache_config.kv_sharing_fast_prefill", True),
    "--kv-cache-dtype-skip-layers": put("cache_config.kv_cache_dtype_skip_layers", ["0"]),
    "--runner pooling": put("model_config.runner_type", "pooling"),
    "dual chunk attention": put("model_config.hf_config.text_config.dual_chunk_attention_config", {"chunk_size": 1}),
    "sliding-window attention": put("model_config.hf_config.text_config.sliding_window", 100),
}


def test_a_configured_engine_passes(config: Any) -> None:
    withdrawal.check_conflicts(config)
    assert withdrawal.withdraw_layer(config) == 4


@pytest.mark.parametrize("layer", [0, 8, 99])
def test_a_layer_out_of_range_is_refused_before_the_engine_starts(layer: int, eight_layers: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(str(eight_layers), enforce_eager=True, **withdrawal.configure(layer, device="cpu"))
    bounds = "from 1 to 7 for this model, got" if layer else "of at least 1, not"
    with pytest.raises(ValueError, match=f"integer {bounds} {layer}"):
        arguments.create_engine_config()


@pytest.mark.parametrize("flag", CONFLICTS)
def test_conflicts_name_both_flags(config: Any, flag: str) -> None:
    CONFLICTS[flag](config)
    with pytest.raises(ValueError, match=f"^--withdraw-layer does not go with .*{flag}"):
        withdrawal.check_conflicts(config)


def test_a_window_that_no_sequence_reaches_is_none(config: Any) -> None:
    """As Phi-3's of 262,144 tokens."""
    window = "model_config.hf_config.text_config.sliding_window"
    put(window, config.model_config.max_model_len)(config)
    withdrawal.check_conflicts(config)
    put(window, config.model_config.max_model_len - 1)(config)
    with pytest.raises(ValueError, match="sliding-window attention"):
        withdrawal.check_conflicts(config)


def test_gpt_oss_is_refused(config: Any) -> None:
    """The decoder of InternVL3.5-20B: windows in every other layer, and sinks, which no other layer has."""
    from transformers import GptOssConfig

    put("model_config.hf_config.text_config", GptOssConfig(num_hidden_layers=LAYERS))(config)
    with pytest.raises(ValueError, match="sliding-window attention"):
        withdrawal.check_conflicts(config)


def test_the_scheduler_asks_for_models_that_do_not(config: Any) -> None:
    from foldserve.server.engine.withdrawal.scheduler import WithdrawingScheduler

    put("model_config.hf_config.architectures", ["Qwen2ForCausalLM"])(config)
    with pytest.raises(ValueError, match="does not go with a model of"):
        WithdrawingScheduler(vllm_config=config)


def test_breakable_cuda_graphs_are_refused(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import CUDAGraphMode

    for mode in ("FULL_DECODE_ONLY", "FULL_AND_PIECEWISE", "PIECEWISE", "NONE"):
        put("compilation_config.cudagraph_mode", CUDAGraphMode[mode])(config)
        withdrawal.check_conflicts(config)
    monkeypatch.setattr("vllm.envs.VLLM_USE_BREAKABLE_CUDAGRAPH", True, raising=False)
    with pytest.raises(ValueError, match="go with VLLM_USE_BREAKABLE_CUDAGRAPH=1"):
        withdrawal.check_conflicts(config)
    monkeypatch.setattr("vllm.envs.VLLM_BATCH_INVARIANT", True, raising=False)  # vLLM sets the other one then
    with pytest.raises(ValueError, match="go with VLLM_BATCH_INVARIANT=1: without VLLM_USE_BREAKABLE_CUDAGRAPH=0"):
        withdrawal.check_conflicts(config)


@pytest.mark.parametrize("layer", [0, LAYERS, -1, "4", 4.0, True], ids=repr)
def test_layers_outside_the_decoder_are_refused(config: Any, layer: object) -> None:
    config.additional_config = {"foldserve": {"withdraw_layer": layer}}
    bounds = f"from 1 to {LAYERS - 1} for this model, got" if layer == LAYERS else "of at least 1, not"
    with pytest.raises(ValueError, match=f"--withdraw-layer must be an integer {bounds} {layer!r}"):
        withdrawal.check_conflicts(config)


def test_without_k_everything_is_allowed(config: Any) -> None:
    config.additional_config = {}
    CONFLICTS["--pipeline-parallel-size"](config)
    withdrawal.check_conflicts(config)
    withdrawal.check_decoder(config)


def test_vllms_own_scheduler_and_worker_are_refused(config: Any) -> None:
    ours = config.parallel_config.worker_cls
    config.parallel_config.worker_cls = "vllm.v1.worker.cpu_worker.CPUWorker"
    with pytest.raises(ValueError, match=r"needs worker_cls .*worker_cpu.FoldWorker"):
        withdrawal.check_conflicts(config)
    config.parallel_config.worker_cls = ours
    config.scheduler_config.scheduler_cls = None
    with pytest.raises(ValueError, match=r"needs scheduler_cls .*scheduler.WithdrawingScheduler"):
        withdrawal.check_conflicts(config)
    config.scheduler_config.scheduler_cls = withdrawal.configure(4, device="cpu")["scheduler_cls"]
    config.scheduler_config.async_scheduling = True
    with pytest.raises(ValueError, match=r"needs scheduler_cls .*scheduler.WithdrawingAsyncScheduler"):
        withdrawal.check_conflicts(config)


def test_decoders_that_withdrawal_knows(config: Any) -> None:
    text = config.model_config.hf_config.text_config
    withdrawal.check_decoder(config)
    text.architectures, text.model_type = None, "qwen3_vl_text"
    withdrawal.check_decoder(config)
    text.architectures = ["Gemma3ForCausalLM"]
    with pytest.raises(ValueError, match=r"'LlamaForCausalLM'.*; this model has Gemma3ForCausalLM"):
        withdrawal.check_decoder(config)


def test_tokens_stay_as_long_as_features_of_images_are_added(config: Any) -> None:
    config.model_config.hf_config.vision_config.deepstack_visual_indexes = [5, 11, 17]
    with pytest.raises(ValueError, match="its first 3 layers, so tokens can leave from layer 4 on"):
        config.additional_config = {"foldserve": {"withdraw_layer": 3}}
        withdrawal.check_decoder(config)
    config.additional_config = {"foldserve": {"withdraw_layer": 4}}
    withdrawal.check_decoder(config)


def test_arguments_for_a_gpu() -> None:
    arguments = withdrawal.configure(16, device="cuda")
    assert arguments["async_scheduling"] and arguments["scheduler_cls"].endswith("WithdrawingAsyncScheduler")
    assert arguments["worker_cls"].endswith("worker_cuda.FoldWorker")
    assert "compilation_config" not in arguments  # CUDA graphs are as vLLM chooses them
