"""A LLaVA-1.5 checkpoint of random weights and any size, in the layout of the published `llava-hf/llava-1.5-7b-hf`.

It is for tests and timing, and answers nonsense; the trained demo model is in `demo`. Its outputs depend on the image
and the prompt, so mixed-up tokens change them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from safetensors.torch import save_file

from foldserve.server.folders import new_folder
from foldserve.server.quality.demo.config import write_config
from foldserve.server.quality.demo_tokenizer import save_tokenizer
from foldserve.server.quality.demo_weights import Geometry, random_weights

NOTICE = "The weights of this model are random: it answers nonsense, and is for tests and for timing only."


def create(
    path: Path,
    *,
    image_size: int = 336,
    patch_size: int = 14,
    hidden_size: int = 128,
    num_layers: int = 8,
    num_heads: int = 4,
    vision_hidden: int = 128,
    vision_layers: int = 4,
    vision_heads: int = 4,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Path:
    """Writes a checkpoint into the directory `path` and returns `path`.

    Sizes are in pixels; an image has `(image_size / patch_size) ** 2` vision tokens, by default 576 as in LLaVA-1.5.
    Equal arguments give equal files. The directory appears only when it is complete.

    Raises:
        FileExistsError: `path` exists and is not an empty directory.
        ValueError: sizes that do not divide, or too few vision layers for the feature layer -2.
    """
    geometry = Geometry(
        image_size, patch_size, hidden_size, num_layers, num_heads, vision_hidden, vision_layers, vision_heads
    )
    with new_folder(Path(path)) as partial:
        _write(partial, geometry, seed, dtype)
    return Path(path)


def _write(folder: Path, geometry: Geometry, seed: int, dtype: Literal["float32", "bfloat16"]) -> None:
    ids = save_tokenizer(folder)
    save_file(random_weights(geometry, ids, seed, dtype), folder / "model.safetensors", metadata={"format": "pt"})
    write_config(folder, geometry, ids, dtype)
    (folder / "README.md").write_text(f"# Demo model\n\n{NOTICE}\n")
