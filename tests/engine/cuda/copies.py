"""Finds copies from the host to the device for which the host has to wait, on a machine without a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_FROM_NUMBERS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class HostWaits(AssertionError):
    """An operator that would wait on a GPU."""


@contextmanager
def host_goes_on(monkeypatch: pytest.MonkeyPatch, *, allow_pinned: bool = True) -> Iterator[None]:
    """Raises HostWaits where something is copied to the meta device from memory that isn't pinned.

    The meta device stands for the GPU. Pinned copies are allowed if they are `non_blocking`: they are what a step needs
    from the scheduler, and the host goes on while they are made. So are numbers in a tensor without dimensions, which
    travel as arguments of a kernel.

    Args:
        allow_pinned: False for what a CUDA graph holds: each replay would copy what then lies in that memory.
    """
    pinned = _Pinned(allow_pinned)
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: True)
        patch.setattr("vllm.utils.torch_utils.is_pin_memory_available", lambda: True)
        patch.setattr("vllm.utils.torch_utils.PIN_MEMORY", True)  # what a later vLLM looks at
        with _Calls(pinned), _Operators(pinned):
            yield


class _Pinned:
    """Which memory would be pinned on a machine with a GPU."""

    def __init__(self, allowed: bool) -> None:
        self._allowed = allowed
        self._tensors: list[Tensor] = []  # kept, so that no other one comes to lie at the address

    def add(self, x: Tensor) -> Tensor:
        self._tensors.append(x)
        return x

    def __contains__(self, x: Tensor) -> bool:
        return self._allowed and any(
            x.untyped_storage().data_ptr() == own.untyped_storage().data_ptr() for own in self._tensors
        )


class _Calls(TorchFunctionMode):
    """Calls whose copies operators don't show."""

    def __init__(self, pinned: _Pinned) -> None:
        super().__init__()
        self._pinned = pinned

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.pin_memory:
            return self._pinned.add(args[0].clone())
        if func is Tensor.is_pinned:
            return args[0] in self._pinned
        if func not in _FROM_NUMBERS:
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        pins = kwargs.pop("pin_memory", False)
        out = func(*args, **kwargs)
        numbers = args[1] if func is Tensor.new_tensor else args[0]
        if out.is_meta and not (isinstance(numbers, Tensor) and numbers.is_meta):
            raise HostWaits(f"{func.__name__} of numbers on the device")
        return self._pinned.add(out) if pins else out


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operators that mix devices."""

    def __init__(self, pinned: _Pinned) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pinned = pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        pins = kwargs.pop("pin_memory", None)
        out = func(*args, **kwargs)
        if pins:
            self._pinned.add(out)
        if any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves(out)):
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, Tensor) and x.device.type == "cpu":
                    self._check(func, x, args, kwargs)
        return out

    def _check(self, func: Any, x: Tensor, args: Any, kwargs: dict[str, Any]) -> None:
        if func not in _COPIES:
            if x.dim():
                raise HostWaits(f"{func} takes {tuple(x.shape)} {x.dtype} from the host")
            return
        if x not in self._pinned:
            raise HostWaits(f"{func} of {tuple(x.shape)} {x.dtype} from memory that is not pinned")
        if not (kwargs.get("non_blocking") or (func is torch.ops.aten.copy_.default and args[2:] == (True,))):
            raise HostWaits(f"{func} of {tuple(x.shape)} {x.dtype} waits until it is done")
