"""vLLM's choices for a configuration."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

from vllm import envs
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.model_executor.models.vision import get_vit_attn_backend
from vllm.triton_utils import HAS_TRITON
from vllm.utils.torch_utils import get_kv_cache_torch_dtype
from vllm.v1.attention.backend import AttentionBackend

from foldserve.server.engine.facts.attention import attention_backend, attention_spec


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """How the engine runs. A backend is None if vLLM finds none, or the model has no such part."""

    runner: Literal["v1", "v2"]
    runner_reason: str
    worker: str
    scheduler: str
    attention: str | None
    tower_attention: str | None
    graphs: str
    compilation: str
    dtype: str
    kv_dtype: str
    max_model_len: int
    prefix_caching: bool
    chunked_prefill: bool
    async_scheduling: bool
    max_num_seqs: int
    max_num_batched_tokens: int


def engine_facts(config: VllmConfig, runner_option: str = "auto") -> EngineFacts:
    """vLLM's choices; `runner_option` is the value of `--model-runner`, which vLLM only sees as a variable.

    Raises:
        ValueError: vLLM has no attention backend, or no CUDA graphs, for the options.
    """
    parallel, cache, scheduler, model = (
        config.parallel_config,
        config.cache_config,
        config.scheduler_config,
        config.model_config,
    )
    backend = attention_backend(config)
    return EngineFacts(
        runner=model_runner(config),
        runner_reason=_runner_reason(config, runner_option),
        worker=str(parallel.worker_cls),
        scheduler=_scheduler(scheduler.scheduler_cls),
        attention=None if backend is None else backend.get_name(),
        tower_attention=_tower_attention(config),
        graphs=_graphs(config, backend).name,
        compilation=CompilationMode(config.compilation_config.mode or 0).name,
        dtype=_name(model.dtype),
        kv_dtype=_name(get_kv_cache_torch_dtype(cache.cache_dtype, model.dtype)),
        max_model_len=model.max_model_len,
        prefix_caching=bool(cache.enable_prefix_caching),
        chunked_prefill=bool(scheduler.enable_chunked_prefill),
        async_scheduling=bool(scheduler.async_scheduling),
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
    )


def model_runner(config: VllmConfig) -> Literal["v1", "v2"]:
    return "v2" if config.use_v2_model_runner else "v1"


def _runner_reason(config: VllmConfig, option: str) -> str:
    if option != "auto":
        return f"--model-runner {option}"
    if envs.VLLM_USE_V2_MODEL_RUNNER is not None:
        return f"VLLM_USE_V2_MODEL_RUNNER={int(envs.VLLM_USE_V2_MODEL_RUNNER)}"
    if config.use_v2_model_runner:
        return "vLLM's choice"
    if not HAS_TRITON:
        return "vLLM's choice: v2 needs Triton, which does not run here"
    return f"vLLM's choice: v2 does not support {', '.join(config._get_v2_model_runner_unsupported_features())}"


def _scheduler(cls: str | type | None) -> str:
    if cls is None:
        return "vLLM's own"
    return cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"


def _tower_attention(config: VllmConfig) -> str | None:
    vision: Any = getattr(config.model_config.hf_config, "vision_config", None)
    width, heads = getattr(vision, "hidden_size", None), getattr(vision, "num_attention_heads", None)
    if not width or not heads:
        return None
    with set_current_vllm_config(config):
        return get_vit_attn_backend(width // heads, config.model_config.dtype).name


def _graphs(config: VllmConfig, backend: type[AttentionBackend] | None) -> CUDAGraphMode:
    """The mode after the worker has asked the attention backend what it supports."""
    compilation = config.compilation_config
    if backend is None or compilation.cudagraph_mode in (None, CUDAGraphMode.NONE):
        return compilation.cudagraph_mode or CUDAGraphMode.NONE
    builder: Any = backend.get_builder_cls()
    support = builder.get_cudagraph_support(config, attention_spec(config))
    return deepcopy(compilation).resolve_cudagraph_mode_and_sizes(
        support, backend.__name__, use_v2_model_runner=config.use_v2_model_runner
    )


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
