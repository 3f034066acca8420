"""Stand-ins for CUDA graphs: what a graph reads and writes at replay, and what becomes of its results.

A graph reads the tensors of its capture, whatever it is called with, and writes its results to those of its capture. So
answers are right only if each step has written all that differs into the tensors seen then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class FullGraphs:
    """In the place of the model, as vLLM's `CUDAGraphWrapper`: the forward context is that of the capture too.

    Attributes:
        replays: by size.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._captured: dict[Any, tuple[Any, dict[str, Any]]] = {}
        self.capturing = True
        self.replays: Counter[int] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        from vllm.config import CUDAGraphMode
        from vllm.forward_context import get_forward_context, override_forward_context

        context = get_forward_context()
        if context.cudagraph_runtime_mode != CUDAGraphMode.FULL:
            return self._model(**inputs)
        if self.capturing:
            self._captured[context.batch_descriptor] = context, inputs
            return self._model(**inputs)
        self.replays[context.batch_descriptor.num_tokens] += 1
        captured, inputs = self._captured[context.batch_descriptor]
        with override_forward_context(captured):
            return self._model(**inputs)


class Pool:
    """Memory of piecewise graphs: vLLM lets results of the last piece go, so the next graph may write there."""

    def __init__(self) -> None:
        self.capturing = True
        self._released: list[Tensor] = []

    def release(self, results: list[Tensor]) -> None:
        self._released += results

    def reuse(self) -> None:
        for result in self._released:
            result.fill_(torch.nan)
        self._released.clear()


class Piecewise:
    """In the place of a part of a model, or of a piece that it was compiled to. Attention in it is no part of a graph.

    Attributes:
        replays: by size.
        eager: runs without any graph.
    """

    def __init__(self, runnable: Callable[..., Any], pool: Pool, *, is_last: bool = True) -> None:
        self.runnable, self._pool, self._is_last = runnable, pool, is_last
        self._captured: dict[Any, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}
        self.replays: Counter[int] = Counter()
        self.eager = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runnable, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from vllm.config import CUDAGraphMode
        from vllm.forward_context import get_forward_context

        context = get_forward_context()
        if context.cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE:
            self.eager += context.cudagraph_runtime_mode == CUDAGraphMode.NONE
            return self.runnable(*args, **kwargs)
        self._pool.reuse()
        key = context.batch_descriptor
        if self._pool.capturing or key not in self._captured:
            self._captured[key] = args, kwargs, self.runnable(*args, **kwargs)
        else:
            self.replays[key.num_tokens] += 1
            args, kwargs, results = self._captured[key]
            for result, value in zip(_tensors(results), _tensors(self.runnable(*args, **kwargs)), strict=True):
                result.copy_(value)
        args, kwargs, results = self._captured[key]
        inputs = {x.untyped_storage().data_ptr() for x in (*args, *kwargs.values()) if isinstance(x, Tensor)}
        own = [x for x in _tensors(results) if x.untyped_storage().data_ptr() not in inputs]
        if self._is_last:
            self._pool.release(own)
        return results


def _tensors(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [x for x in results if isinstance(x, Tensor)]
