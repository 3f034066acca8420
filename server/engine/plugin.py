"""Entry point of `vllm.general_plugins`: runs once or more in every vLLM process and registers what foldserve adds."""

from __future__ import annotations

from importlib.metadata import version

from foldserve.server import guardian

VLLM_VERSION = "0.32.0"

_MODELS = {
    "LlavaForConditionalGeneration": "foldserve.server.engine.llava:FoldLlavaForConditionalGeneration",
    "LlavaStfForConditionalGeneration": "foldserve.server.engine.stf:FoldLlavaStfForConditionalGeneration",
}


def register() -> None:
    """Applies the patches and registers the models. Idempotent.

    Raises:
        RuntimeError: another vLLM version than the one this release is written for.
    """
    guardian.die_with_parent()
    _require_vllm(version("vllm"))
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from foldserve.server.engine import patches, refused_options, withdrawal

    patches.apply()
    _enable_amx()
    for name, model in _MODELS.items():
        ModelRegistry.register_model(name, model)
        MODELS_CONFIG_MAP[name] = refused_options.EarlyChecks
    withdrawal.register()


def _require_vllm(found: str) -> None:
    if found.partition("+")[0] != VLLM_VERSION:
        raise RuntimeError(f"foldserve needs vLLM {VLLM_VERSION}, found {found}: pip install vllm=={VLLM_VERSION}")


def _enable_amx() -> None:
    """Asks the kernel for AMX tiles: without it a spawned worker dies of SIGILL at its first bf16 product."""
    import torch
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        torch.cpu._init_amx()
