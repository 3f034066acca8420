"""Converts MMVP's LLaVA from the authors' layout to the one that `server/engine/families/mmvp.py` serves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

from foldserve.server.convert import names
from foldserve.server.convert.llava import LlavaSource, Part
from foldserve.server.convert.output import SHARD_BYTES
from foldserve.server.convert.source import ConversionError, Shape, Weights, read_json

_DINO_FIELDS = (
    "hidden_act",
    "hidden_size",
    "layer_norm_eps",
    "layerscale_value",
    "mlp_ratio",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "patch_size",
    "qkv_bias",
    "use_swiglu_ffn",
)
_POSITIONS = "dino_tower.embeddings.position_embeddings"


def convert(
    source: Path, dino: Path, target: Path, *, vision_tower: Path | None = None, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Converts the checkpoint in `source` to the new folder `target`, and returns `target`.

    Args:
        source: folder in the layout of LLaVA-1.5's code, with `model.dino_mm_projector` in its weights.
        dino: folder of the DINOv2 that it was trained with, in the layout of transformers: the authors do not train it.
        target: does not exist yet, or is empty; it appears when it is complete.
        vision_tower: folder of the CLIP model, needed if `source` lacks it or names another than LLaVA-1.5's.
        shard_bytes: largest size of one file.

    Raises:
        ConversionError: the checkpoint is another LLaVA or damaged, or the DINOv2 does not fit it.
        FileExistsError: `target` exists and is not an empty directory.
    """
    llava = LlavaSource(source, vision_tower, "MMVP")
    needed = {
        "multi_modal_projector.clip.linear_1.weight": "model.mm_projector.0.weight",
        "multi_modal_projector.dino.linear_1.weight": "model.dino_mm_projector.0.weight",
    }
    parts = llava.parts(names.mmvp_name, needed)
    llava.check(parts, lambda: _projectors(llava.vision.hidden_size, llava.text["hidden_size"]))
    tower = DinoPart(Weights(dino), names.dino_name, isqrt(llava.patches))
    config = _dino_config(dino, llava)
    _check_untrained(parts[0].weights, tower.weights)
    fields = {
        "architectures": ["MmvpForConditionalGeneration"],
        "dino_config": {name: getattr(config, name) for name in _DINO_FIELDS} | {"image_size": llava.vision.image_size},
        "image_seq_length": 2 * llava.patches,
        "vision_feature_layer": llava.config.get("mm_vision_select_layer", -2),
    }
    return llava.write(target, [*parts, tower], fields, shard_bytes)


@dataclass(frozen=True)
class DinoPart(Part):
    """A DINOv2 with its position embeddings resampled to an image of `side` x `side` patches."""

    side: int

    def shapes(self) -> dict[str, Shape]:
        shapes = super().shapes()
        return shapes | {_POSITIONS: (1, self.side**2 + 1, shapes[_POSITIONS][-1])}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in super().__iter__():
            yield name, resampled(tensor, self.side) if name == _POSITIONS else tensor


def resampled(positions: Tensor, side: int) -> Tensor:
    """(1, 1 + patches, C) -> (1, 1 + side * side, C), as in DINOv2's own code.

    Unlike transformers, it adds a tenth of a patch to the side when it computes the scale factor.
    """
    first, patches = positions[:, :1], positions[:, 1:]
    old = isqrt(patches.shape[1])
    if old == side:
        return positions
    grid = patches.float().mT.reshape(1, -1, old, old)  # (1, C, old, old)
    scale = (side + 0.1) / old
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([first, grid.flatten(2).mT.to(positions.dtype)], dim=1)


def _projectors(width: int, hidden: int) -> nn.Module:
    return nn.ModuleDict(
        {
            tower: nn.ModuleDict({"linear_1": nn.Linear(width, hidden), "linear_2": nn.Linear(hidden, hidden)})
            for tower in ("clip", "dino")
        }
    )


def _dino_config(folder: Path, llava: LlavaSource) -> Dinov2Config:
    """Loads the DINOv2's config, and checks that it is complete and has CLIP's channels and patch size."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "dinov2":
        raise ConversionError(f"{folder} has model_type {kind!r}: a DINOv2 without registers is needed")
    model, found = Dinov2Model.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        raise ConversionError(f"{folder} lacks the tensors {', '.join(missing[:5])}")
    config, vision = model.config, llava.vision
    if (config.hidden_size, config.patch_size) != (vision.hidden_size, vision.patch_size):
        raise ConversionError(
            f"{folder} has {config.hidden_size} channels and patches of {config.patch_size} pixels, but must "
            f"have those of CLIP, {vision.hidden_size} and {vision.patch_size}"
        )
    return config


def _check_untrained(checkpoint: Weights, dino: Weights) -> None:
    """Raises ConversionError if the checkpoint holds another DINOv2 than the given one, by its class token."""
    name = "model.dino_tower.vision_tower.cls_token"
    if name not in checkpoint.shapes:
        return
    ours = next(ours for ours in dino.shapes if ours.endswith("embeddings.cls_token"))
    if not torch.allclose(checkpoint.read(name).float(), dino.read(ours).float(), rtol=0.01, atol=1e-4):
        raise ConversionError(
            f"{name} of {checkpoint.folder} is not that of {dino.folder}: give the DINOv2 that it was trained with"
        )
