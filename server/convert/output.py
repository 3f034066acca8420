"""Writes a checkpoint's tensors in files of bounded size."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from foldserve.server.folders import write_json

SHARD_BYTES = 2 << 30
"""Largest size of one file, and so of what is in memory; a single larger tensor gets a file of its own."""


class ShardedWriter:
    """Collects tensors and writes them as `model-00001-of-0000N.safetensors` with an index."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds one tensor, and writes a file once it is full."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._shard_bytes:
            self._flush()
        self._pending[name] = tensor.clone()  # contiguous, and not sharing memory with another tensor
        self._pending_bytes += size
        self._total_bytes += size

    def finish(self) -> None:
        """Writes the rest, the final file names and the index."""
        self._flush()
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05}-of-{len(self._shards):05}.safetensors"
            (self._folder / str(i)).rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        write_json(self._folder / "model.safetensors.index.json", index)

    def _flush(self) -> None:
        save_file(self._pending, self._folder / str(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0
