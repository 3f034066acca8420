"""The benchmark's own logic; nothing is asserted about time."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any
from unittest.mock import patch

from foldserve.kernels import ops
from foldserve.loadtest.micro.compare import compare, figures
from foldserve.loadtest.micro.kernels import KernelShape, measure, render
from foldserve.reducers.ops import Op


def check_benchmark(device: str) -> None:
    """Everything that has a kernel is timed, under names that tell rows apart, and nothing stays chosen."""
    called: set[Op[..., Any]] = set()
    call = Op.__call__

    def noting(self: Op[..., Any], *args: Any, **options: Any) -> Any:
        called.add(self)
        return call(self, *args, **options)

    with patch.object(Op, "__call__", noting):
        found = measure(KernelShape(24, 1, "bf16", width=16, key_width=8), pairs=1, device=device)
    assert called == set(ops.OPS)
    assert all(op._run == op.reference for op in ops.OPS)
    assert all(row.torch_us > 0 and row.kernel_us > 0 and row.floor_bytes > 0 for row in found)
    assert all(render(row).count("|") == 7 for row in found)
    written = json.loads(json.dumps([asdict(row) for row in found]))
    assert {change.ratio for change in compare(written, written)} == {1.0}
    assert len({name.partition("/")[0] for name, _ in figures(written)}) == len(found)
