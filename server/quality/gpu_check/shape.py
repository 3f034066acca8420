"""A checkpoint with the sizes of LLaVA-1.5-7B and without weights, for `load_format="dummy"`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from foldserve.server.folders import new_folder, write_json
from foldserve.server.quality.demo.config import write_config
from foldserve.server.quality.demo_tokenizer import save_tokenizer
from foldserve.server.quality.demo_weights import Geometry

_GEOMETRY = Geometry(
    image_size=336,
    patch_size=14,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    vision_hidden=1024,
    vision_layers=24,
    vision_heads=16,
)
_VOCABULARY, _INTERMEDIATE = 32064, 11008


def write_shape(folder: Path) -> Path:
    """Writes the checkpoint unless `folder` exists. The tokenizer is the demo model's, with a larger vocabulary."""
    if folder.is_dir():
        return folder
    with new_folder(folder) as partial:
        ids = replace(save_tokenizer(partial), vocab_size=_VOCABULARY)
        write_config(partial, _GEOMETRY, ids, "bfloat16")
        config = json.loads((partial / "config.json").read_text())
        config["text_config"]["intermediate_size"] = _INTERMEDIATE
        write_json(partial / "config.json", config)
    return folder
