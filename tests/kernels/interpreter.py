"""Makes a process run Triton's kernels in the interpreter; to be called before anything else."""

from __future__ import annotations

import os
import sys
from typing import Any


def interpret() -> None:
    """Triton's interpreter multiplies the bits of bf16 as integers; here products are exact, as on tensor cores."""
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot = InterpreterBuilder.create_dot

    def exact_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b))
        return create_dot(self, a, b, *rest)

    InterpreterBuilder.create_dot = exact_dot
