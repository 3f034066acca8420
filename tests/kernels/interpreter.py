"""What a process does first in which Triton's kernels are to be interpreted."""

from __future__ import annotations

import os
import sys


def interpret() -> None:
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"
