"""A small checkpoint of MMVP's LLaVA: the demo model with a DINOv2 tower and a second projector."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import stf_checkpoint

LAYERS, HEADS, MLP_RATIO = 3, 4, 4


def write(path: Path, clip: Path) -> Path:
    """Makes one of `clip`, a checkpoint of `demo_model`; DINOv2's tensors have the names of published checkpoints."""
    shutil.copytree(clip, path)
    config = json.loads((path / "config.json").read_text())
    vision = config["vision_config"]
    config |= {"architectures": ["MmvpForConditionalGeneration"], "dino_config": dino_config(vision["image_size"])}
    (path / "config.json").write_text(json.dumps(config, indent=1))
    weights = load_file(path / "model.safetensors")
    projector = [name for name in weights if name.startswith("multi_modal_projector.")]
    generator = torch.Generator().manual_seed(1)
    for name in projector:
        weight = weights.pop(name)
        layer = name.removeprefix("multi_modal_projector.")
        weights[f"multi_modal_projector.clip.{layer}"] = weight
        weights[f"multi_modal_projector.dino.{layer}"] = _like(weight, generator)
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    weights |= {f"dino_tower.{name}": weight for name, weight in dino_weights(patches, vision["hidden_size"]).items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def write_authors(folder: Path) -> dict[str, Tensor]:
    """As the authors' code saves it, of 12 x 12 patches; `write_dino` is the DINOv2. Returns the weights."""
    stf_checkpoint.write(folder, mm_vision_tower="somewhere")
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    weights = {name: weight for name, weight in weights.items() if "mm_projector" not in name}
    generator = torch.Generator().manual_seed(3)
    hidden, width = stf_checkpoint.HIDDEN, stf_checkpoint.CHANNELS
    for name in ("mm_projector", "dino_mm_projector"):
        for layer, columns in ((0, width), (2, hidden)):
            weights |= {
                f"model.{name}.{layer}.weight": torch.randn(hidden, columns, generator=generator),
                f"model.{name}.{layer}.bias": torch.randn(hidden, generator=generator),
            }
    weights["model.dino_tower.vision_tower.cls_token"] = dino_weights(256, width)["embeddings.cls_token"]
    weights["model.dino_tower.clip_vision_tower.vision_model.post_layernorm.bias"] = torch.zeros(width)
    torch.save(weights, folder / "pytorch_model.bin")
    return weights


def write_dino(folder: Path, **config: object) -> dict[str, Tensor]:
    """As `facebook/dinov2-large` is published, of 16 x 16 patches; `config` changes fields. Returns the weights."""
    folder.mkdir(parents=True)
    fields = dino_config(224) | {"hidden_size": stf_checkpoint.CHANNELS} | config
    (folder / "config.json").write_text(json.dumps(fields))
    weights = dino_weights(256, stf_checkpoint.CHANNELS)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def dino_config(image_size: int) -> dict[str, object]:
    """As `facebook/dinov2-large` has it, with other sizes."""
    return {
        "model_type": "dinov2",
        "hidden_size": 128,
        "image_size": image_size,
        "layer_norm_eps": 1e-06,
        "mlp_ratio": MLP_RATIO,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "patch_size": 14,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
    }


def dino_weights(patches: int, width: int = 128) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: _draw(name, shape, generator) for name, shape in _shapes(patches, width)}


def _shapes(patches: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "embeddings.cls_token", (1, 1, width)
    yield "embeddings.mask_token", (1, width)
    yield "embeddings.position_embeddings", (1, patches + 1, width)
    yield from _linear("embeddings.patch_embeddings.projection", width, 3, 14, 14)
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        for name in ("attention.attention.query", "attention.attention.key", "attention.attention.value"):
            yield from _linear(f"{layer}.{name}", width, width)
        yield from _linear(f"{layer}.attention.output.dense", width, width)
        yield from _linear(f"{layer}.mlp.fc1", MLP_RATIO * width, width)
        yield from _linear(f"{layer}.mlp.fc2", width, MLP_RATIO * width)
        for name in ("norm1", "norm2"):
            yield from _linear(f"{layer}.{name}", width)
        for name in ("layer_scale1", "layer_scale2"):
            yield f"{layer}.{name}.lambda1", (width,)
    yield from _linear("layernorm", width)


def _linear(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A linear layer, or with one size a layer norm."""
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    weight = torch.randn(shape, generator=generator)
    if name.endswith((".bias", "lambda1")) or "norm" in name:
        return 0.2 * weight + (not name.endswith(".bias"))
    if name.startswith("embeddings.") and not name.endswith("projection.weight"):
        return weight
    return weight.mul_(2 * weight[0].numel() ** -0.5)


def _like(weight: Tensor, generator: torch.Generator) -> Tensor:
    """A linear layer's weight or bias of the same shape."""
    drawn = torch.randn(weight.shape, generator=generator)
    return 0.2 * drawn if weight.ndim == 1 else drawn.mul_(2 * weight.shape[1] ** -0.5)
