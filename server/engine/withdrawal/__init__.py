"""Withdrawal (VTW): from decoder layer K on, vision tokens of requests that ask for it are neither computed nor kept.

The layers < K ("shallow") and >= K ("deep") own separate KV cache groups; the deep ones hold ceil(T(n) / block) blocks
for n tokens of which T(n) are kept. From plan to page: `core` (T) -> `spec`, `layout` (groups) -> `scheduler`,
`manager`, `prefix` (blocks) -> `runner_v1` or `state_v2`, `batch`, `metadata` (rows and slots of a step) -> `decoder`,
`attention`, `choose` (which tokens FastV and iLLaVA keep). Everything that imports vLLM's engine is imported on use.
"""

from __future__ import annotations

from typing import Any

from foldserve.server.engine.withdrawal.core import TokenMap
from foldserve.server.engine.withdrawal.requests import Room, admit, prompt_items, refuse_request

__all__ = [
    "Room",
    "TokenMap",
    "admit",
    "apply",
    "check",
    "check_decoder",
    "configure",
    "prompt_items",
    "refuse_request",
    "register",
    "select_decoder",
    "step_room",
    "withdraw_layer",
]


def register() -> None:
    """Registers KV specs and decoders with vLLM, in every process that has the plugin; again changes nothing."""
    from vllm import ModelRegistry

    from foldserve.server.engine.withdrawal.config import WITHDRAWING
    from foldserve.server.engine.withdrawal.spec import register_specs

    register_specs()
    for name in WITHDRAWING.values():
        ModelRegistry.register_model(name, f"{__name__}.decoder:{name}")


def __getattr__(name: str) -> Any:
    if name in ("apply", "check", "check_decoder", "configure", "select_decoder", "step_room", "withdraw_layer"):
        from foldserve.server.engine.withdrawal import config

        return getattr(config, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
