"""Entry point of `vllm.general_plugins`: registers foldserve's additions, once or more in every vLLM process."""

from __future__ import annotations

import atexit
import gc
import os
from importlib.metadata import requires, version

from foldserve.server import guardian

ALLOW_VLLM = "FOLDSERVE_ALLOW_VLLM"
"""Environment variable: the exact version of another vLLM to allow, before a foldserve release for it exists."""


def register() -> None:
    """Apply the patches and register the models. Idempotent; see `require_vllm` for what it raises."""
    guardian.die_with_parent()
    if not gc.isenabled():  # server processes import with it off
        gc.freeze()
        atexit.register(_thaw)
        gc.enable()
    require_vllm(version("vllm"))
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from foldserve.server.engine import patches, refused_options, withdrawal
    from foldserve.server.engine.families.registry import FAMILY_CLASSES

    patches.apply()
    _enable_amx()
    for architecture, entry in FAMILY_CLASSES.items():
        ModelRegistry.register_model(architecture, entry.model_path)
        own = MODELS_CONFIG_MAP.get(architecture, refused_options.EarlyChecks)
        MODELS_CONFIG_MAP[architecture] = refused_options.with_early_checks(own)
    withdrawal.register()


def _thaw() -> None:
    """After a failed start: otherwise C++ libraries report imported objects as leaks below the error message.

    Not after serving: it takes a second, which a server's shutdown does not have.
    """
    if not guardian.is_listening():
        gc.unfreeze()


def vllm_version() -> str:
    """The version of vLLM that pyproject.toml pins."""
    pin = next(text for text in requires("foldserve") or () if text.startswith("vllm=="))
    return pin.partition(";")[0].removeprefix("vllm==")


def is_release_vllm(found: str) -> bool:
    """Whether it is `vllm_version()`, ignoring builds such as `+cpu`."""
    return found.partition("+")[0] == vllm_version()


def require_vllm(found: str) -> None:
    """Raises RuntimeError unless vLLM is `vllm_version()` or the version in `ALLOW_VLLM`."""
    needed = vllm_version()
    if not is_release_vllm(found) and found.partition("+")[0] != os.environ.get(ALLOW_VLLM):
        raise RuntimeError(f"foldserve needs vLLM {needed}, found {found}: pip install vllm=={needed}")


def _enable_amx() -> None:
    """Ask the kernel for AMX tiles: without them a spawned worker dies of SIGILL at its first bf16 product."""
    import torch
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        torch.cpu._init_amx()
