"""CUDA graphs of everything between an image's pixels and its embeddings. Not run on a GPU yet.

A GPU computes a small batch in less time than the host takes to launch its kernels one by one; a graph is one launch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.utils.torch_utils import current_stream

from foldserve.reducers.item import ItemPlan
from foldserve.server.engine.default_plan import default_plan
from foldserve.server.engine.families.registry import family_of
from foldserve.server.engine.worker import is_ours
from foldserve.server.settings import Settings

SIZES = (8, 4, 2, 1)
"""Images in a graph. Larger batches keep a GPU busy: they go in parts."""


class CudaGraph:
    """What `run` launches, captured once."""

    def __init__(self, run: Callable[[], Tensor], pool: Any) -> None:
        run()  # sets libraries up, which can't be captured
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=current_stream()):
            self._output = run()

    def replay(self) -> Tensor:
        """The output of `run`, which the next replay overwrites."""
        self._graph.replay()
        return self._output


class TowerGraphs:
    """One graph for each of `sizes`, all of the same plan.

    The capturing half of vLLM's `EncoderCudaGraphManager`, in whose place both model runners capture these graphs at
    start-up, in a memory pool that they measure before they size the KV cache. They leave replaying to the model
    (`supports_modality`), since vLLM's manager knows no plans.

    Args:
        embed: (B, 3, H, W) -> (plan.kept, width) for each image. Must neither read from the device nor copy to it.
        pixels: (B, 3, H, W), from which the graphs read, for the largest B that is encoded at a time.

    Attributes:
        replays: number of replays by size.
    """

    def __init__(self, plan: ItemPlan, embed: Callable[[Tensor], Sequence[Tensor]], pixels: Tensor) -> None:
        self.plan = plan
        self.sizes = tuple(size for size in SIZES if size <= len(pixels))
        self.replays: Counter[int] = Counter()
        self._embed, self._pixels = embed, pixels
        self._graphs: dict[int, CudaGraph] = {}

    @torch.inference_mode()
    def capture(self, graph_pool: Any) -> None:
        """Capture the largest graph first: the others fit into its memory."""
        for size in self.sizes:
            self._graphs[size] = CudaGraph(partial(self._run, size), graph_pool)

    def _run(self, size: int) -> Tensor:
        return torch.stack([*self._embed(self._pixels[:size])])

    def clear(self) -> None:
        self._graphs.clear()

    def is_captured(self) -> bool:
        return bool(self._graphs)

    def get_num_graphs_to_capture(self) -> int:
        return len(self.sizes)

    @property
    def token_budgets(self) -> Sequence[int]:
        """vLLM logs the last one as the largest."""
        return self.sizes[::-1]

    def supports_modality(self, modality: str) -> bool:
        """False: vLLM would replay graphs itself, and leave the model's `embed_multimodal` out."""
        return False

    def parts(self, batch: Sequence[int], plans: Sequence[ItemPlan]) -> list[list[int]]:
        """Split a batch into parts: images of the plan by as many as a graph takes, and all others together.

        Nothing is padded: a part of 1 costs a launch more, an image of padding all of an image's arithmetic.

        Args:
            batch: indices into `plans`.
        """
        if not self._graphs:
            return [[*batch]]
        own = [i for i in batch if plans[i] == self.plan]
        others = [i for i in batch if plans[i] != self.plan]
        return [*self._in_sizes(own), *([others] if others else [])]

    def _in_sizes(self, own: list[int]) -> Iterator[list[int]]:
        while own:
            size = next(size for size in self.sizes if size <= len(own))
            yield own[:size]
            own = own[size:]

    def take(self, plans: Sequence[ItemPlan]) -> bool:
        """Whether there is a graph for a batch of these plans."""
        return len(plans) in self._graphs and all(plan == self.plan for plan in plans)

    def replay(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) of a batch that they `take` -> (B, plan.kept, width)."""
        assert pixels.shape[1:] == self._pixels.shape[1:], "copy_ would broadcast"
        self._pixels[: len(pixels)].copy_(pixels)
        self.replays[len(pixels)] += 1
        return self._graphs[len(pixels)].replay().clone()  # the encoder cache keeps it


class CapturingRunner:
    """Mixin before a V1 GPU runner class. Modification: captures the model's `TowerGraphs`."""

    def _create_encoder_cudagraph_manager(self: Any) -> Any:
        graphs = graphs_of(self.get_model())
        return super()._create_encoder_cudagraph_manager() if graphs is None else graphs  # type: ignore[misc]


def graphs_of(model: Any) -> TowerGraphs | None:
    """The model's graphs; None if none are asked for, or its class is not ours."""
    return model.tower_graphs if hasattr(type(model), "tower_graphs") else None


def wants_graphs(vllm_config: VllmConfig) -> bool:
    return Settings.from_config(vllm_config.additional_config).tower_graphs


def check_graphs(vllm_config: VllmConfig) -> None:
    """Raises ValueError if `--tower-graphs` is given together with a setting or a model that it conflicts with."""
    if wants_graphs(vllm_config):
        for setting, reason in _conflicts(vllm_config):
            raise ValueError(f"--tower-graphs does not go with {setting}: {reason}. Leave the option out")


def _conflicts(config: VllmConfig) -> Iterator[tuple[str, str]]:
    parallel, model = config.parallel_config, config.model_config
    if config.device_config.device_type == "cpu":
        yield "a CPU", "CUDA graphs need an NVIDIA GPU"
    if model.enforce_eager:
        yield "--enforce-eager", "vLLM then captures no CUDA graphs"
    if config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE:
        yield "cudagraph_mode NONE", "vLLM then captures no CUDA graphs"
    if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
        yield "--tensor-parallel-size or --pipeline-parallel-size", "the graphs are made for a tower on one GPU"
    if not is_ours(config):
        yield f"worker_cls {parallel.worker_cls}", "foldserve's worker has them captured, which `foldserve serve` sets"
    if model.multimodal_config is not None and model.multimodal_config.get_limit_per_prompt("image") == 0:
        yield "--limit-mm-per-prompt of no images", "the tower would never run"
    family = family_of(model)
    if family is None or not family.is_capturable:
        yield f"a model of {model.architecture}", "the graphs are made for LLaVA-1.5, whose images all have one size"
        return
    reduction = Settings.from_config(config.additional_config).default_reduction
    plan = default_plan(config, family, family.largest)
    if reduction.pruning is not None:
        yield f"the default method {reduction.pruning.name!r}", "each image's pixels say how many of its tokens stay"
    if plan.is_seeded:
        yield f"the default method {plan.method!r}", "it draws other tokens of each image"
    if (method := plan.query_method) is not None:
        yield f"the default method {method.name!r}", "it chooses tokens by each image's question"


def check_captured(model: Any) -> None:
    """Raises RuntimeError if the model has `TowerGraphs` that vLLM did not capture at start-up."""
    graphs = graphs_of(model)
    if graphs is not None and not graphs.is_captured():
        raise RuntimeError(
            "--tower-graphs was given, but vLLM captured no CUDA graphs; its log says why cudagraph_mode became NONE. "
            "Leave the option out, or choose another --attention-backend"
        )
