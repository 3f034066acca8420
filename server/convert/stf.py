"""Converts LLaVA-STF from the authors' layout to the one that `server/engine/families/llava_stf.py` serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import isqrt
from pathlib import Path

from foldserve.reducers.stf import LAYERS, StfConfig, StfProjector
from foldserve.server.convert import names
from foldserve.server.convert.llava import LlavaSource, shapes_of
from foldserve.server.convert.output import SHARD_BYTES
from foldserve.server.convert.source import ConversionError


def convert(
    source: Path,
    target: Path,
    *,
    vision_tower: Path | None = None,
    layers: Sequence[int] = LAYERS,
    experts: int = 1,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Converts the checkpoint in `source` to the new folder `target`, and returns `target`.

    Args:
        source: folder in the layout of LLaVA-1.5's code, with `model.mm_projector_crosslayer` in its weights.
        target: does not exist yet, or is empty; it appears when it is complete.
        vision_tower: folder of the CLIP model, needed if `source` lacks it or names another than LLaVA-1.5's.
        layers: hidden states that the checkpoint fuses, deepest first; its config does not have them.
        experts: tokens per window that it was trained with; the kernel follows from the weights.
        shard_bytes: largest size of one file.

    Raises:
        ConversionError: the checkpoint is not LLaVA-STF, or is damaged.
        FileExistsError: `target` exists and is not an empty directory.
    """
    llava = LlavaSource(source, vision_tower, "LLaVA-STF")
    needed = {
        names.FUSION: "model.mm_projector_crosslayer.0.weight",
        names.OUTPUT: "model.mm_projector.0.weight",
    }
    parts = llava.parts(names.stf_name, needed)
    stf = _stf_config(shapes_of(parts)[names.OUTPUT][-1], llava, layers, experts)
    projector = partial(StfProjector, stf, llava.vision.hidden_size, llava.text["hidden_size"])
    llava.check(parts, projector, ", --layers and --experts")
    fields = {
        "architectures": ["LlavaStfForConditionalGeneration"],
        "image_seq_length": stf.tokens(llava.patches),
        "stf": stf.to_json(),
    }
    return llava.write(target, parts, fields, shard_bytes)


def _stf_config(width: int, llava: LlavaSource, layers: Sequence[int], experts: int) -> StfConfig:
    """Finds the kernel k from the projector's width, k * k * C / E, and checks that the config fits the tower."""
    channels = llava.vision.hidden_size
    try:
        config = StfConfig(tuple(layers), experts=experts)
        kernel = isqrt(width * experts // channels)
        if kernel**2 * channels != width * experts:
            raise ConversionError(
                f"model.mm_projector.0.weight takes {width} channels, which is k * k * {channels} / {experts} for no "
                "k: was the checkpoint trained with another number of --experts?"
            )
        config = replace(config, kernel=kernel)
        config.check(blocks=llava.vision.num_hidden_layers, channels=channels, patches=llava.patches)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    return config
