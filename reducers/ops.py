"""Operations with an interchangeable implementation: the torch reference runs until a faster twin is chosen."""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Op(Generic[P, R]):
    """Decorates a torch function, the `reference`. Calls run it, or a twin of the same signature."""

    def __init__(self, reference: Callable[P, R]) -> None:
        self.reference = self._run = reference
        update_wrapper(self, reference)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._run(*args, **kwargs)

    def use(self, twin: Callable[P, R] | None) -> None:
        """Make all calls in this process run `twin`; None: the reference."""
        self._run = self.reference if twin is None else twin
