"""Entry point of `vllm.general_plugins`: runs once or more in every vLLM process and registers what foldserve adds."""

from __future__ import annotations

import atexit
import gc
import os
from importlib.metadata import requires, version

from foldserve.server import guardian

ALLOW_VLLM = "FOLDSERVE_ALLOW_VLLM"
"""Environment variable: one other version of vLLM to run on, exactly, before a release is made for it."""


def register() -> None:
    """Applies the patches and registers the models. Idempotent.

    Raises:
        RuntimeError: another vLLM version than the one this release is written for, unless `ALLOW_VLLM` names it.
    """
    guardian.die_with_parent()
    if not gc.isenabled():  # as a process of a server imports
        gc.freeze()
        atexit.register(_thaw)
        gc.enable()
    require_vllm(version("vllm"))
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from foldserve.server.engine import patches, refused_options, withdrawal
    from foldserve.server.engine.families.registry import ENTRIES

    patches.apply()
    _enable_amx()
    for architecture, entry in ENTRIES.items():
        ModelRegistry.register_model(architecture, entry.model_path)
        own = MODELS_CONFIG_MAP.get(architecture, refused_options.EarlyChecks)
        MODELS_CONFIG_MAP[architecture] = refused_options.with_early_checks(own)
    withdrawal.register()


def _thaw() -> None:
    """Where a start fails: C++ libraries would list as leaked what was imported, below the one line that says why.

    The end of a server has no second for that.
    """
    if not guardian.is_listening():
        gc.unfreeze()


def vllm_version() -> str:
    """The version of vLLM that this release is written for, as pyproject.toml says."""
    pin = next(text for text in requires("foldserve") or () if text.startswith("vllm=="))
    return pin.partition(";")[0].removeprefix("vllm==")


def is_release_vllm(found: str) -> bool:
    """Whether it is `vllm_version()`; builds such as `+cpu` don't matter."""
    return found.partition("+")[0] == vllm_version()


def require_vllm(found: str) -> None:
    """Raises RuntimeError for another vLLM than `vllm_version()` or the one that `ALLOW_VLLM` names."""
    needed = vllm_version()
    if not is_release_vllm(found) and found.partition("+")[0] != os.environ.get(ALLOW_VLLM):
        raise RuntimeError(f"foldserve needs vLLM {needed}, found {found}: pip install vllm=={needed}")


def _enable_amx() -> None:
    """Asks the kernel for AMX tiles: without it a spawned worker dies of SIGILL at its first bf16 product."""
    import torch
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        torch.cpu._init_amx()
