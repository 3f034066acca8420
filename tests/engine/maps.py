"""Token maps from a running engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from foldserve.server.engine.family import Modality
from foldserve.server.engine.grid_map import GridMap
from foldserve.server.engine.processor import KWARG
from foldserve.server.quality.engine.mapping import maps_of

Members = list[list[int]]
"""Of each group the tokens in it."""


def engine_maps(
    llm: Any,
    prompt: str,
    items: Sequence[Any],
    asked: Sequence[Mapping[str, Any]],
    modality: Modality = "image",
    *,
    counted: bool = True,
) -> list[list[GridMap]]:
    """Of each image or video, one map a grid; `counted`: what stays is what was planned, as all but OneVision's is."""
    processor = llm.renderer.get_mm_processor()
    data = processor.info.parse_mm_data({modality: list(items)})
    tokens = processor.info.get_tokenizer().encode(prompt, add_special_tokens=False)
    made = processor(tokens, data, hf_processor_mm_kwargs={KWARG: {modality: [dict(one) for one in asked]}})
    pictures = [item[0] if isinstance(item, tuple) else item for item in items]  # a video may have metadata beside it
    sizes = [item.size if modality == "image" else (item.shape[2], item.shape[1]) for item in pictures]
    each = maps_of(llm, made, modality, sizes)
    for plan, maps in each:
        separators = sum(part.separators for part in plan.laid_out.parts)
        assert not counted or sum(len(one.sizes) for one in maps) + separators == plan.kept
    return [maps for _, maps in each]


def members(found: GridMap) -> Members:
    """The tokens of each group; checks the map's sizes."""
    groups: Members = [[] for _ in found.sizes]
    for token, group in enumerate(found.group):
        if group >= 0:
            groups[group].append(token)
    assert [len(group) for group in groups] == list(found.sizes)
    for source, held in zip(found.source, groups, strict=True):
        assert source in held or (source == -1 and not held)  # a class token that stays has no patches
    return groups
