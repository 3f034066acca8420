"""Withdrawal (VTW): from decoder layer K on, vision tokens of requests that ask for it are neither computed nor kept.

The layers < K ("shallow") and >= K ("deep") own separate KV cache groups; the deep ones hold ceil(T(n) / block) blocks
for n tokens of which T(n) are kept. From plan to page: `core` (T) -> `spec`, `layout` (groups) -> `scheduler`,
`manager`, `prefix` (blocks) -> `runner_v1` or `state_v2`, `batch`, `metadata` (rows and slots of a step) -> `decoder`,
`attention`, `choose` (which tokens FastV and iLLaVA keep). Everything that imports vLLM's engine is imported on use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foldserve.server.engine.withdrawal.core import TokenMap
from foldserve.server.engine.withdrawal.requests import Room, admit, prompt_items, refuse_request

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = [
    "Room",
    "TokenMap",
    "admit",
    "apply",
    "check",
    "check_decoder",
    "configure",
    "first_layer",
    "prompt_items",
    "refuse_request",
    "register",
    "step_room",
    "withdraw",
    "withdraw_layer",
]


def register() -> None:
    """Registers KV specs with vLLM, in every process that has the plugin; again changes nothing."""
    from foldserve.server.engine.withdrawal.spec import register_specs

    register_specs()


def withdraw(model: Any, vllm_config: VllmConfig, prefix: str) -> None:
    """With a withdrawal layer configured, puts the withdrawing decoder in the place of a finished model's.

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


def __getattr__(name: str) -> Any:
    if name in ("apply", "check", "check_decoder", "configure", "first_layer", "step_room", "withdraw_layer"):
        from foldserve.server.engine.withdrawal import config

        return getattr(config, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
