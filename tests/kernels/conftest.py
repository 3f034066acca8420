"""Where the kernels run: on the GPU if there is one, else in Triton's interpreter, which is a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from tests.kernels.interpreter import interpret

Run = Callable[..., None]


@pytest.fixture(scope="session")
def run() -> Iterator[Run]:
    """`run(check, *args)`: calls `check(device, *args)`; what it raises is raised here.

    Triton reads TRITON_INTERPRET when it is imported, and other tests of this process may have imported it.
    """
    if torch.cuda.is_available():
        yield lambda check, *args: check("cuda", *args)
        return
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=interpret) as process:
        yield lambda check, *args: process.submit(check, "cpu", *args).result()
