"""Maps of where tokens went, from a running engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from foldserve.server.engine.families.registry import family_of
from foldserve.server.engine.family import Modality
from foldserve.server.engine.grid_map import GridMap, grid_maps, needs_engine, pack
from foldserve.server.engine.processor import KWARG, PLANS

Members = list[list[int]]
"""Of each group the tokens in it."""


def engine_maps(
    llm: Any, prompt: str, items: Sequence[Any], asked: Sequence[Mapping[str, Any]], modality: Modality = "image"
) -> list[list[GridMap]]:
    """Of each image or video, one map a grid; the counts are those of the plans."""
    config = llm.llm_engine.vllm_config.model_config
    processor, family = llm.llm_engine.renderer.get_mm_processor(), family_of(config)
    assert family is not None
    data = processor.info.parse_mm_data({modality: list(items)})
    tokens = processor.info.get_tokenizer().encode(prompt, add_special_tokens=False)
    made = processor(tokens, data, hf_processor_mm_kwargs={KWARG: {modality: [dict(one) for one in asked]}})
    found = []
    for item, plan, processed in zip(items, made[PLANS][modality], made["mm_kwargs"][modality], strict=True):
        size = item.size if modality == "image" else (item.shape[2], item.shape[1])
        regions = family.regions(plan, modality, size, processor.info)
        groups = llm.collective_rpc("token_groups", args=(pack(processed),))[0] if needs_engine(regions) else []
        maps = grid_maps(regions, groups)
        separators = sum(part.separators for part in plan.laid_out.parts)
        assert sum(len(one.sizes) for one in maps) + separators == plan.kept
        found.append(maps)
    return found


def members(found: GridMap) -> Members:
    """Of each group; checks what the map says of it."""
    groups: Members = [[] for _ in found.sizes]
    for token, group in enumerate(found.group):
        if group >= 0:
            groups[group].append(token)
    assert [len(group) for group in groups] == list(found.sizes)
    assert all(source in group for source, group in zip(found.source, groups, strict=True))
    return groups
