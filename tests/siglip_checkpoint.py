"""A small LLaVA checkpoint with a SigLIP tower: no class token, all of its tokens are used, biases are not zero."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_TOWER = "vision_tower.vision_model."
_CLASS_TOKEN, _POSITIONS = f"{_TOWER}embeddings.class_embedding", f"{_TOWER}embeddings.position_embedding.weight"


def write(path: Path, clip: Path) -> Path:
    """Make one of `clip`, a checkpoint of `demo_model`: same decoder, projector, tokenizer and shapes of layers."""
    shutil.copytree(clip, path)
    config = json.loads((path / "config.json").read_text())
    config["vision_config"] |= {"model_type": "siglip_vision_model", "vision_use_head": False}
    config["vision_config"].pop("projection_dim")
    config["vision_feature_select_strategy"] = "full"
    _write(path / "config.json", config)

    side = config["vision_config"]["image_size"]
    images = json.loads((path / "preprocessor_config.json").read_text())
    kept = {
        name: images[name] for name in ("do_convert_rgb", "do_rescale", "rescale_factor", "do_normalize", "resample")
    }
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True, "size": {"height": side, "width": side}}
    names = {"image_processor_type": "SiglipImageProcessor", "processor_class": "LlavaProcessor"}
    _write(path / "preprocessor_config.json", kept | half | names)
    processor = json.loads((path / "processor_config.json").read_text())
    full = {"num_additional_image_tokens": 0, "vision_feature_select_strategy": "full"}
    _write(path / "processor_config.json", processor | full)
    save_file(_weights(load_file(path / "model.safetensors")), path / "model.safetensors", metadata={"format": "pt"})
    return path


def _weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's tower without what has to do with its class token."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: weight for name, weight in weights.items() if "pre_layrnorm" not in name and name != _CLASS_TOKEN}
    weights[_POSITIONS] = weights[_POSITIONS][1:].clone()
    patches = weights[f"{_TOWER}embeddings.patch_embedding.weight"]
    weights[f"{_TOWER}embeddings.patch_embedding.bias"] = torch.zeros(len(patches))
    for name in sorted(weights):
        if name.startswith(_TOWER) and name.endswith(".bias"):
            weights[name] = 0.3 * torch.randn(weights[name].shape, generator=generator)
    return weights


def _write(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, indent=1))
