"""Withdrawal's settings in vLLM's configuration, and the settings that conflict with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from vllm import envs
from vllm.config import VllmConfig

from foldserve.server.engine.families.registry import FAMILY_CLASSES, family_of
from foldserve.server.engine.withdrawal.requests import StepCapacity
from foldserve.server.engine.worker import WORKERS
from foldserve.server.settings import CONFIG_KEY, Settings

_PACKAGE = "foldserve.server.engine.withdrawal"
_SCHEDULER = f"{_PACKAGE}.scheduler.WithdrawingScheduler"
_ASYNC_SCHEDULER = f"{_PACKAGE}.scheduler.WithdrawingAsyncScheduler"

DECODERS = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
    "qwen3_vl_moe_text": "Qwen3MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
}
"""HF model type of a text config -> vLLM's decoder class, for checkpoints that name no architecture."""

_OTHER_NAMES = {"VLlama3ForCausalLM": "LlamaForCausalLM"}
"""Architecture in the text config of Idefics3 and SmolVLM -> the class that vLLM builds."""


def withdraw_layer(vllm_config: VllmConfig) -> int | None:
    """K of this engine; None if withdrawal is not configured.

    Raises:
        ValueError: K is not an integer in 1..N-1 for the N layers of the decoder, or another setting is wrong.
    """
    layer = Settings.from_config(vllm_config.additional_config).withdraw_layer
    if layer is None:
        return None
    layers = vllm_config.model_config.hf_config.get_text_config().num_hidden_layers
    if layer >= layers:
        raise ValueError(f"--withdraw-layer must be an integer from 1 to {layers - 1} for this model, got {layer}")
    return layer


def step_capacity(vllm_config: VllmConfig) -> StepCapacity:
    """Tokens of one request that always fit into a step when no other prompt is being computed."""
    scheduler = vllm_config.scheduler_config
    budget = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    others = (scheduler.max_num_active_seqs or scheduler.max_num_seqs) - 1
    capacities = [
        StepCapacity(
            budget - others, f"--max-num-batched-tokens {budget} less one for each of {others} other sequences"
        )
    ]
    if threshold := scheduler.long_prefill_token_threshold:
        capacities.append(StepCapacity(threshold, f"--long-prefill-token-threshold {threshold}"))
    return min(capacities)


def configure(layer: int, *, device: Literal["cpu", "cuda"], async_scheduling: bool = True) -> dict[str, Any]:
    """Engine arguments for withdrawal at `layer`. On a CPU vLLM always schedules synchronously."""
    runs_ahead = async_scheduling and device == "cuda"
    return {
        "additional_config": {CONFIG_KEY: {"withdraw_layer": layer}},
        "scheduler_cls": _ASYNC_SCHEDULER if runs_ahead else _SCHEDULER,
        "async_scheduling": runs_ahead,
        "worker_cls": WORKERS[device],
    }


def apply_options(args: Any, layer: int, *, device: Literal["cpu", "cuda"]) -> None:
    """Write `configure`'s values, except `additional_config`, into vLLM's parsed options or `EngineArgs`.

    Raises:
        ValueError: the user has set another value.
    """
    needed = configure(layer, device=device, async_scheduling=args.async_scheduling is not False)
    del needed["additional_config"]
    for name, value in needed.items():
        if getattr(args, name) not in (None, "auto", True, value):
            option = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            raise ValueError(f"--withdraw-layer sets {option} itself: leave that option out")
        setattr(args, name, value)


def check_decoder(vllm_config: VllmConfig) -> None:
    """If withdrawal is configured, check the configuration and the decoder.

    Raises:
        ValueError: as `check_conflicts`, or the decoder is not in `DECODERS`, or it adds image features to layers from
            K - 1 on.
    """
    layer = withdraw_layer(vllm_config)
    if layer is None:
        return
    check_conflicts(vllm_config)
    name = decoder_class(vllm_config)
    if name not in DECODERS.values():
        known = sorted(set(DECODERS.values()))
        raise ValueError(f"--withdraw-layer supports the decoders {known}; this model has {name}")
    first = first_layer(vllm_config.model_config.hf_config)
    if layer < first:
        raise ValueError(
            f"--withdraw-layer {layer}: this model's decoder adds features of images after its first {first - 1} "
            f"layers, so tokens can leave from layer {first} on"
        )


def decoder_class(vllm_config: VllmConfig) -> str:
    text = vllm_config.model_config.hf_config.get_text_config()
    name: str = (text.architectures or [DECODERS.get(text.model_type, text.model_type)])[0]
    return _OTHER_NAMES.get(name, name)


def first_layer(hf_config: Any) -> int:
    """The smallest K: layers that add image features (deepstack) to their output have to come before layer K - 1."""
    return 1 + len(getattr(hf_config.vision_config, "deepstack_visual_indexes", ()))


def check_conflicts(vllm_config: VllmConfig) -> None:
    """Raises ValueError if withdrawal is configured together with a setting that it conflicts with."""
    if withdraw_layer(vllm_config) is None:
        return
    for setting, reason in _conflicts(vllm_config):
        raise ValueError(f"--withdraw-layer does not go with {setting}: {reason}. Leave one of the two out")
    for name, ours in _required_classes(vllm_config):
        raise ValueError(f"--withdraw-layer needs {name} {ours}: start with `foldserve serve`, or pass configure(...)")


def _conflicts(config: VllmConfig) -> Iterator[tuple[str, str]]:
    parallel, cache, model = config.parallel_config, config.cache_config, config.model_config
    text = model.hf_config.get_text_config()
    blocks = "KV blocks of the deep layers are not addressed by token position"
    positions = "the deep layers see other rows than the batch has"
    if family_of(model) is None:
        yield f"a model of {model.architecture}", f"foldserve reduces images of {', '.join(FAMILY_CLASSES)}"
    if model.is_hybrid:
        yield "this model's decoder", "some layers keep a recurrent state, which can't forget tokens that it has seen"
    if parallel.pipeline_parallel_size > 1:
        yield "--pipeline-parallel-size", "the decoder is split at the withdrawal layer instead"
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield "--decode-context-parallel-size or --prefill-context-parallel-size", blocks
    if parallel.use_ubatching:
        yield "--enable-dbo or --ubatch-size", "the deep batch is made for a whole step"
    if config.lora_config is not None:
        yield "--enable-lora", f"adapters are laid out for the full batch, and {positions}"
    if config.speculative_config is not None:
        yield "--speculative-config", "drafting needs the last hidden state of every token"
    if config.kv_transfer_config is not None:
        yield "--kv-transfer-config or KV offloading", blocks
    if config.kv_events_config is not None and config.kv_events_config.enable_kv_cache_events:
        yield "--kv-events-config", blocks
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield "--disable-hybrid-kv-cache-manager", "shallow and deep layers hold different numbers of KV blocks"
    if cache.kv_sharing_fast_prefill:
        yield "--kv-sharing-fast-prefill", positions
    if cache.kv_cache_dtype_skip_layers:
        yield "--kv-cache-dtype-skip-layers", "KV cache groups need pages of one size"
    if model.runner_type != "generate":
        yield "--runner pooling", "withdrawn tokens have no output to pool"
    if model.use_mla or getattr(text, "dual_chunk_attention_config", None):
        yield "MLA or dual chunk attention", "the deep layers need plain attention"
    if model.is_mm_prefix_lm:
        yield f"a model of {model.architecture}", "its image tokens attend to each other in both directions"
    if _is_sliding(text, model.max_model_len):
        yield "sliding-window attention", "a window over kept tokens is another one than over all tokens"
    if envs.VLLM_USE_BREAKABLE_CUDAGRAPH:
        reason = "a graph would freeze which rows enter the deep half"
        if envs.VLLM_BATCH_INVARIANT:
            yield "VLLM_BATCH_INVARIANT=1", f"without VLLM_USE_BREAKABLE_CUDAGRAPH=0 it turns that on, where {reason}"
        yield "VLLM_USE_BREAKABLE_CUDAGRAPH=1", reason


def _is_sliding(text_config: Any, max_model_len: int) -> bool:
    """Whether some layers have a window shorter than the longest sequence."""
    window = getattr(text_config, "sliding_window", None)
    if not window or window >= max_model_len:
        return False
    layer_types = getattr(text_config, "layer_types", None)
    return "sliding_attention" in layer_types if layer_types else getattr(text_config, "use_sliding_window", True)


def _required_classes(config: VllmConfig) -> Iterator[tuple[str, str]]:
    """foldserve's classes that are missing in vLLM's configuration."""
    scheduler = config.scheduler_config
    schedulers = [_ASYNC_SCHEDULER] if scheduler.async_scheduling else [_SCHEDULER, _ASYNC_SCHEDULER]
    if scheduler.scheduler_cls not in schedulers:
        yield "scheduler_cls", schedulers[0]
    if not config.use_v2_model_runner and config.parallel_config.worker_cls not in WORKERS.values():
        yield "worker_cls", " or ".join(WORKERS.values())
