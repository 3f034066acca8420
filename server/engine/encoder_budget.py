"""How much the vision tower encodes at a time: as much as start-up measured. For the model and the scheduler."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from vllm.config import VllmConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.encoder_budget import MultiModalBudget

from foldserve.server.engine.families.registry import family_of


class EncoderBudget(NamedTuple):
    """What vLLM's profile run measures, with the modality (image or video) that has the most tokens."""

    tokens: int  # encoded at a time, before reduction
    images: int  # images of the largest size in such a batch; frames if the model takes only videos
    cache_rows: int  # embeddings that the encoder cache holds


def encoder_budget(vllm_config: VllmConfig) -> EncoderBudget:
    """Computed by the class that the profile run uses.

    That class processes a dummy image, up to 0.1 s: call this once, and not where requests wait.
    """
    budget = MultiModalBudget(vllm_config, MULTIMODAL_REGISTRY, enable_cache=False)
    modality = budget.get_modality_with_max_tokens()
    tokens = budget.mm_max_toks_per_item[modality] * max(1, budget.mm_max_items_per_batch[modality])
    image = budget.mm_max_toks_per_item.get("image")
    if image is None and (family := family_of(vllm_config.model_config)) is not None:
        image = family.largest.tokens
    return EncoderBudget(tokens, max(1, tokens // image) if image else 1, budget.encoder_cache_size)


def batches(plans: Sequence[Hashable], sizes: Sequence[int], most: int) -> list[list[int]]:
    """Indices of the images in batches of total size at most `most`; a larger image is a batch of its own.

    If one batch is not enough, images with equal plans are grouped.
    """
    places = list(range(len(plans)))
    if sum(sizes) > most:
        first: dict[Hashable, int] = {}
        places.sort(key=lambda i: first.setdefault(plans[i], i))
    together: list[list[int]] = []
    left = 0
    for i in places:
        if sizes[i] > left:
            together.append([])
            left = most
        together[-1].append(i)
        left -= sizes[i]
    return together
