"""Stands in for `CudaGraph` on a CPU: records operators once, and runs them again on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.engine.cuda.copies import HostWaits


class Recorded:
    """As a graph does, it reads and writes the memory of its capture, whatever Python would do this time.

    All results of the capture are poisoned before a replay: what isn't computed again shows, and so does a result of an
    earlier replay that somebody still uses.
    """

    def __init__(self, run: Callable[[], Tensor], pool: object = None) -> None:
        run()
        self._calls: list[_Call] = []
        with _Recorder(self._calls):
            self._output = run()

    def replay(self) -> Tensor:
        self.poison()
        for call in self._calls:
            call.repeat()
        return self._output

    def poison(self) -> None:
        for call in self._calls:
            for result in call.own_results():
                result.fill_(torch.nan if result.is_floating_point() else torch.iinfo(result.dtype).max // 2)


class _Call(NamedTuple):
    func: Any
    args: Any
    kwargs: Any
    results: Any

    def repeat(self) -> None:
        again = self.func(*self.args, **self.kwargs)
        for own, result in zip(tree_leaves(self.results), tree_leaves(again), strict=True):
            if isinstance(own, Tensor) and not self._is_input(own):
                own.copy_(result)

    def own_results(self) -> list[Tensor]:
        tensors = [x for x in tree_leaves(self.results) if isinstance(x, Tensor) and x.dtype != torch.bool]
        return [x for x in tensors if not self._is_input(x)]

    def _is_input(self, x: Tensor) -> bool:
        """A view of an argument, or one that is written in place."""
        inputs = [y for y in tree_leaves((self.args, self.kwargs)) if isinstance(y, Tensor)]
        return any(x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr() for y in inputs)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises HostWaits at operators for which the host needs values from the device: none can be captured."""

    def __init__(self, calls: list[_Call]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _reads_values(func, args):
            raise HostWaits(f"{func} reads values from the device")
        args, kwargs = tree_map(lambda x: x, (args, kwargs or {}))  # lists that the caller may go on to change
        results = func(*args, **kwargs)
        self._calls.append(_Call(func, args, kwargs, results))
        return results


def _reads_values(func: Any, args: Any) -> bool:
    if torch.Tag.data_dependent_output in func.tags:
        return True
    if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):  # the shape depends on masks alone
        return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1]))
    return torch.Tag.dynamic_output_shape in func.tags
