"""Reading a folder of golden vectors, and comparing with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

ATOL = 2e-5
"""Features in fp32 are of order 1; the vectors' own fp32 differs from fp64 by less than 1e-6."""

Row = dict[str, Any]


class Unsupported(Exception):
    """The product has nothing that a case could be compared with."""


@dataclass(frozen=True)
class Case:
    """One entry of a manifest, and all that it says as `entry`; tensors are read when they are asked for."""

    name: str
    method: str
    params: Row
    file: Path
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    entry: Row

    def read(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Tensors of `inputs` or `outputs`, by their short names."""
        with safe_open(self.file, framework="pt") as tensors:
            return {short: tensors.get_tensor(full) for short, full in names.items()}

    def read_prefix(self, prefix: str) -> dict[str, Tensor]:
        """Every tensor whose name starts with `prefix`, by the rest of its name."""
        with safe_open(self.file, framework="pt") as tensors:
            names: list[str] = tensors.keys()
            return {name.removeprefix(prefix): tensors.get_tensor(name) for name in names if name.startswith(prefix)}

    def require(self, **values: object) -> None:
        """Raise Unsupported if a parameter has another value than the one that we implement."""
        for name, value in values.items():
            if self.params[name] != value:
                raise Unsupported(f"{name} = {self.params[name]!r}, not {value!r}")


def load_cases(folder: Path) -> list[Case]:
    """Every case of a manifest, in its order."""
    return [
        Case(
            entry["case"],
            entry["method"],
            entry["params"],
            folder / entry["file"],
            entry["inputs"],
            entry["outputs"],
            entry,
        )
        for entry in _manifest(folder)["cases"]
    ]


def load_tables(folder: Path) -> dict[str, list[Row]]:
    """The integer tables of a manifest: counts that have no tensors."""
    tables: dict[str, list[Row]] = _manifest(folder).get("integer_tables", {})
    return tables


def assert_close(name: str, ours: Tensor, golden: Tensor, atol: float = ATOL) -> None:
    """Same shape, and no element further away than atol."""
    assert ours.shape == golden.shape, f"{name}: shape {tuple(ours.shape)}, golden {tuple(golden.shape)}"
    error = (ours - golden).abs().max().item()
    assert error <= atol, f"{name}: off by {error:.2e}, more than {atol:.0e}"  # NaN is not <= atol


def assert_equal(name: str, ours: object, golden: object) -> None:
    """Exactly the same value."""
    same = torch.equal(ours, golden) if isinstance(ours, Tensor) and isinstance(golden, Tensor) else ours == golden
    assert same, f"{name}: {ours}, golden {golden}"


def _manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return manifest
