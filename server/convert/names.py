"""Tensor names: LLaVA's own layout to that of the published `llava-hf` checkpoints."""

from __future__ import annotations

import re

_OURS = (
    (re.compile(r"model\.mm_projector_crosslayer\.0\."), "multi_modal_projector.fusion.linear_1."),
    (re.compile(r"model\.mm_projector_crosslayer\.2\."), "multi_modal_projector.fusion.linear_2."),
    (re.compile(r"model\.mm_projector\.0\."), "multi_modal_projector.output.linear_1."),
    (re.compile(r"model\.mm_projector\.2\."), "multi_modal_projector.output.linear_2."),
    (re.compile(r"model\.vision_tower\.vision_tower\."), "vision_tower."),
    (re.compile(r"model\.(?=embed_tokens\.|layers\.|norm\.)"), "language_model.model."),
    (re.compile(r"lm_head\."), "language_model.lm_head."),
)
_BUFFERS = re.compile(r".*\.(rotary_emb\.inv_freq|embeddings\.position_ids)")
"""Computed when a model is built; older versions of transformers saved them."""

_CLIP_TEXT_HALF = re.compile(r"text_model\..*|(text|visual)_projection\.weight|logit_scale")

EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
FUSION = "multi_modal_projector.fusion.linear_1.weight"
OUTPUT = "multi_modal_projector.output.linear_1.weight"
TOWER = "vision_tower.vision_model."


def llava_name(theirs: str) -> str | None:
    """Our name of a tensor in LLaVA's layout; None: not needed. Unknown names stay as they are."""
    if _BUFFERS.fullmatch(theirs):
        return None
    for pattern, ours in _OURS:
        if found := pattern.match(theirs):
            return ours + theirs[found.end() :]
    return theirs


def clip_name(theirs: str) -> str | None:
    """Our name of a tensor in a CLIP checkpoint, whole or vision half only; None: not needed."""
    if _BUFFERS.fullmatch(f".{theirs}") or _CLIP_TEXT_HALF.fullmatch(theirs):
        return None
    return TOWER + theirs.removeprefix("vision_model.")
