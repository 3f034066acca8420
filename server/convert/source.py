"""Reads a checkpoint's folder: its config and, one at a time, its tensors. Executes nothing from it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Shape = tuple[int, ...]

_WHOLE = ("model.safetensors", "pytorch_model.bin")


class ConversionError(ValueError):
    """A checkpoint that can't be converted. The message says what is wrong, what was found and what to do."""


class Weights:
    """The tensors of a folder with `model.safetensors` or `pytorch_model.bin`, whole or in shards.

    `shapes` has the shape of every tensor, by name.

    Raises:
        ConversionError: no weights, or files that are damaged or hold anything but tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = _weight_files(folder)
        self.shapes: dict[str, Shape] = {}
        for file in self._files:
            self.shapes |= _shapes(file)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors, file by file; of `safetensors`, only one tensor is in memory."""
        for file in self._files:
            yield from _tensors(file)

    def read(self, name: str) -> Tensor:
        return next(tensor for file in self._files for found, tensor in _tensors(file, name) if found == name)


def read_json(file: Path) -> dict[str, Any]:
    """Reads a file with one JSON object; raises ConversionError if it is missing or holds something else."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConversionError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{file} must hold a JSON object, not {type(content).__name__}")
    return content


def _weight_files(folder: Path) -> list[Path]:
    for whole in _WHOLE:
        if (folder / f"{whole}.index.json").is_file():
            return _indexed_files(folder / f"{whole}.index.json")
        if (folder / whole).is_file():
            return [folder / whole]
    hint = ": it is a LoRA adapter, merge it into its base model first" if _is_adapter(folder) else ""
    raise ConversionError(f"{folder} holds no weights, neither {_WHOLE[0]} nor {_WHOLE[1]}, nor their index{hint}")


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _indexed_files(index: Path) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, Mapping) or not all(isinstance(name, str) for name in places.values()):
        raise ConversionError(f"{index} has no `weight_map` of tensor and file names")
    files = []
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise ConversionError(f"{index} names the file {name!r}, which is not in its own folder")
        files.append(index.parent / name)
        if not files[-1].is_file():
            raise ConversionError(f"{index} names {name}, which is not there: is the download complete?")
    return files


def _shapes(file: Path) -> dict[str, Shape]:
    if file.suffix == ".bin":
        return {name: tuple(tensor.shape) for name, tensor in _load_bin(file).items()}
    try:
        with safe_open(file, framework="pt") as tensors:
            names: list[str] = tensors.keys()
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise ConversionError(f"{file} is no sound safetensors file: {error}") from error


def _tensors(file: Path, only: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file; with `only`, a safetensors file gives just that one."""
    if file.suffix == ".bin":
        yield from _load_bin(file).items()
        return
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  # not a mapping
            if only in (None, name):
                yield name, tensors.get_tensor(name)


def _load_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of a `torch.save` file; they stay on the disk until they are read."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(f"{file} is damaged, or holds more than tensors, and was not loaded") from error
    except RuntimeError as error:  # not a zip file
        raise ConversionError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ConversionError(f"{file} holds no mapping of names to tensors")
    return dict(content)
