"""Token maps of images, from an engine in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm import LLM

from foldserve.reducers.item import ItemPlan
from foldserve.reducers.plan import Reduction
from foldserve.server.engine.families.registry import family_of
from foldserve.server.engine.family import Modality
from foldserve.server.engine.grid_map import CANNOT_MAP, GridMap, can_map, grid_maps, needs_engine, pack
from foldserve.server.engine.processor import KWARG, PLANS
from foldserve.server.engine.worker import WORKERS, device
from foldserve.server.quality.engine.offline import KV_CACHE_BYTES, OfflineModel, render_prompt

if TYPE_CHECKING:
    from PIL.Image import Image


class MappingModel(OfflineModel):
    """Maps an image's vision tokens to the groups they are merged into."""

    def __init__(self, model: str, argv: Sequence[str] = ()) -> None:
        defaults = {"kv_cache_memory_bytes": KV_CACHE_BYTES, "enforce_eager": True} if device() == "cpu" else {}
        super().__init__(model, argv, "map", defaults=defaults, fixed={})

    def map(self, image: Image, reduction: Reduction, question: str) -> tuple[ItemPlan, list[GridMap]]:
        """The image's plan and a map per grid; ValueError if this engine can't map."""
        if self._args.worker_cls == "auto" and self._args.pipeline_parallel_size == 1:
            self._args.worker_cls = WORKERS[device()]
        llm = LLM.from_engine_args(self._args)
        try:
            if not can_map(llm.llm_engine.vllm_config):
                raise ValueError(CANNOT_MAP)
            content = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": question}]
            extras = {"mm_processor_kwargs": {KWARG: reduction.to_json()}}
            messages = [{"role": "user", "content": content}]
            prompt = render_prompt(llm, messages, prompt_extras=extras, skip_mm_cache=True)
            ((plan, maps),) = maps_of(llm, prompt, "image", [image.size])
            return plan, maps
        finally:
            llm.llm_engine.engine_core.shutdown()


def maps_of(
    llm: LLM, prompt: Mapping[str, Any], modality: Modality, sizes: Sequence[tuple[int, int]]
) -> list[tuple[ItemPlan, list[GridMap]]]:
    """Plan and maps of each image or video of a processed prompt; `sizes` holds their (width, height)."""
    family, info = family_of(llm.model_config), llm.renderer.get_mm_processor().info
    assert family is not None, "a model that is reduced"
    found = []
    for size, plan, item in zip(sizes, prompt[PLANS][modality], prompt["mm_kwargs"][modality], strict=True):
        regions = family.regions(plan, modality, size, info)
        ranks = llm.collective_rpc("token_groups", args=(pack(item),)) if needs_engine(regions) else [[]]
        groups = next(answer for answer in ranks if answer is not None)
        found.append((plan, grid_maps(regions, groups)))
    return found
