"""Withdrawal (VTW): from decoder layer K on, vision tokens are neither computed nor stored, if the request asks for it.

Layers < K ("shallow") and >= K ("deep") have separate KV cache groups. Deep groups hold ceil(T(n) / block) blocks for n
tokens of which T(n) are kept. In order of use: `core` (T); `spec`, `layout` (groups); `scheduler`, `manager`, `prefix`
(blocks); `runner_v1` or `state_v2`, `batch`, `metadata` (rows and slots of a step); `decoder`, `attention`,
`token_selection` (which tokens FastV and iLLaVA keep). Modules that need vLLM's engine are imported lazily.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foldserve.server.engine.withdrawal.core import TokenMap
from foldserve.server.engine.withdrawal.requests import StepCapacity, admit, prompt_items, refuse_request

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = [
    "StepCapacity",
    "TokenMap",
    "admit",
    "apply_options",
    "check_conflicts",
    "check_decoder",
    "configure",
    "first_layer",
    "prompt_items",
    "refuse_request",
    "register",
    "step_capacity",
    "withdraw",
    "withdraw_layer",
]


def register() -> None:
    """Register KV specs with vLLM, in every process with the plugin. Idempotent."""
    from foldserve.server.engine.withdrawal.spec import register_specs

    register_specs()


def withdraw(model: Any, vllm_config: VllmConfig, prefix: str) -> None:
    """Replace a model's decoder by the withdrawing one if a withdrawal layer is configured.

    Raises:
        ValueError: as `check_decoder`.
    """
    from foldserve.server.engine.withdrawal import config

    config.check_decoder(vllm_config)
    if config.withdraw_layer(vllm_config) is not None:
        from foldserve.server.engine.withdrawal.decoder import WithdrawingDecoder

        path, _, name = model.decoder_path.rpartition(".")
        owner = model.get_submodule(path)
        prefix = f"{prefix}.{path}.{name}" if prefix else f"{path}.{name}"
        setattr(owner, name, WithdrawingDecoder(getattr(owner, name), vllm_config=vllm_config, prefix=prefix))


_FROM_CONFIG = (
    "apply_options",
    "check_conflicts",
    "check_decoder",
    "configure",
    "first_layer",
    "step_capacity",
    "withdraw_layer",
)


def __getattr__(name: str) -> Any:
    if name in _FROM_CONFIG:
        from foldserve.server.engine.withdrawal import config

        return getattr(config, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
