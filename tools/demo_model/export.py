"""Writes a trained model as a checkpoint in the layout of `llava-hf/llava-1.5-7b-hf`."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from foldserve.server.quality.demo.config import write_config
from tools.demo_model.model import DemoLlava, VisionBlock
from tools.demo_model.tokenizer import save_tokenizer, special_ids

_CLIP = "vision_tower.vision_model"
_PUBLISHED = {
    "vision.class_embedding": f"{_CLIP}.embeddings.class_embedding",
    "vision.position_embedding": f"{_CLIP}.embeddings.position_embedding.weight",
    "vision.patch_embedding.": f"{_CLIP}.embeddings.patch_embedding.",
    "vision.pre_layrnorm.": f"{_CLIP}.pre_layrnorm.",
    "vision.layers.": f"{_CLIP}.encoder.layers.",
    "projector.": "multi_modal_projector.",
    "decoder.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def export(model: DemoLlava, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes weights, configuration, tokenizer and chat template into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.to(dtype).cpu().contiguous() for name, weight in published_weights(model).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private
    write_config(folder, model.geometry, special_ids(), str(dtype).removeprefix("torch."))
    save_tokenizer(folder)


def published_weights(model: DemoLlava) -> dict[str, Tensor]:
    """Weights by published name. CLIP's last layer and final norm are 0: LLaVA reads the layer before."""
    weights = {_published(name): weight.detach() for name, weight in model.state_dict().items()}
    geometry, unused = model.geometry, model.geometry.vision_layers - 1
    patches = f"{_CLIP}.embeddings.patch_embedding.weight"
    weights[patches] = weights[patches].view(-1, 3, geometry.patch_size, geometry.patch_size)
    for name, weight in VisionBlock(geometry).state_dict().items():
        weights[f"{_CLIP}.encoder.layers.{unused}.{name}"] = torch.zeros_like(weight)
    for name in ("weight", "bias"):
        weights[f"{_CLIP}.post_layernorm.{name}"] = torch.zeros(geometry.vision_hidden)
    return weights


def _published(name: str) -> str:
    start = next(start for start in _PUBLISHED if name.startswith(start))
    return _PUBLISHED[start] + name.removeprefix(start)
