"""A small LLaVA-NeXT checkpoint: the demo model's tower, projector and decoder, and an embedding for newlines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def write(path: Path, clip: Path) -> Path:
    """Makes one of `clip`, a checkpoint of `demo_model`; canvases are 1 x 2, 2 x 1, 2 x 2, 1 x 3 and 3 x 1 tiles."""
    shutil.copytree(clip, path)
    config = json.loads((path / "config.json").read_text())
    side = config["vision_config"]["image_size"]
    canvases = [[down * side, across * side] for down, across in ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))]
    names = {"architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next"}
    _write(path / "config.json", config | names | {"image_grid_pinpoints": canvases})
    images = json.loads((path / "preprocessor_config.json").read_text())
    names = {"image_processor_type": "LlavaNextImageProcessor", "processor_class": "LlavaNextProcessor"}
    _write(path / "preprocessor_config.json", images | names | {"image_grid_pinpoints": canvases, "do_pad": True})
    processor = json.loads((path / "processor_config.json").read_text())
    _write(path / "processor_config.json", processor | {"processor_class": "LlavaNextProcessor"})
    tokenizer = json.loads((path / "tokenizer_config.json").read_text())
    _write(path / "tokenizer_config.json", tokenizer | {"processor_class": "LlavaNextProcessor"})
    weights = load_file(path / "model.safetensors")
    hidden = config["text_config"]["hidden_size"]
    weights["image_newline"] = torch.randn(hidden, generator=torch.Generator().manual_seed(0))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _write(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, indent=1))
