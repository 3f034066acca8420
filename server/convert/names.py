"""Tensor names: from LLaVA's own layout to that of the published `llava-hf` checkpoints."""

from __future__ import annotations

import re

_STF = (
    (re.compile(r"model\.mm_projector_crosslayer\.0\."), "multi_modal_projector.fusion.linear_1."),
    (re.compile(r"model\.mm_projector_crosslayer\.2\."), "multi_modal_projector.fusion.linear_2."),
    (re.compile(r"model\.mm_projector\.0\."), "multi_modal_projector.output.linear_1."),
    (re.compile(r"model\.mm_projector\.2\."), "multi_modal_projector.output.linear_2."),
)
_MMVP = (
    (re.compile(r"model\.mm_projector\.0\."), "multi_modal_projector.clip.linear_1."),
    (re.compile(r"model\.mm_projector\.2\."), "multi_modal_projector.clip.linear_2."),
    (re.compile(r"model\.dino_mm_projector\.0\."), "multi_modal_projector.dino.linear_1."),
    (re.compile(r"model\.dino_mm_projector\.2\."), "multi_modal_projector.dino.linear_2."),
)
_LLAVA = (
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


def stf_name(theirs: str) -> str | None:
    """Our name of a tensor of LLaVA-STF; None: not needed. Unknown names stay."""
    return _llava_name(theirs, _STF)


def mmvp_name(theirs: str) -> str | None:
    """Our name of a tensor of MMVP's LLaVA; None: not needed, or of its DINOv2. Unknown names stay."""
    return None if theirs.startswith("model.dino_tower.") else _llava_name(theirs, _MMVP)


def dino_name(theirs: str) -> str | None:
    """Our name of a tensor in a DINOv2 of transformers; None: not needed."""
    name = theirs.removeprefix("dinov2.")
    return f"dino_tower.{name}" if name.startswith(("embeddings.", "encoder.")) and "mask_token" not in name else None


def clip_name(theirs: str) -> str | None:
    """Our name of a tensor in a CLIP checkpoint, whole or vision half only; None: not needed."""
    if _BUFFERS.fullmatch(f".{theirs}") or _CLIP_TEXT_HALF.fullmatch(theirs):
        return None
    return TOWER + theirs.removeprefix("vision_model.")


def _llava_name(theirs: str, projector: tuple[tuple[re.Pattern[str], str], ...]) -> str | None:
    if _BUFFERS.fullmatch(theirs):
        return None
    for pattern, ours in (*projector, *_LLAVA):
        if found := pattern.match(theirs):
            return ours + theirs[found.end() :]
    return theirs
