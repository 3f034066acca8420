"""A small LLaVA-1.5 checkpoint made on the spot, in the layout of the published `llava-hf/llava-1.5-7b-hf`.

Its weights are random: it answers nonsense. It is for trying the API, for tests and for timing, not for answers. Its
outputs still depend on the image and on the prompt, so that whatever mixes up tokens changes what comes out.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file

from foldserve.server.quality.demo_tokenizer import CHAT_TEMPLATE, TokenIds, save_tokenizer
from foldserve.server.quality.demo_weights import Geometry, random_weights

NOTICE = "The weights of this model are random: it answers nonsense, and is for trying the API only."
LAYOUT_VERSION = 1
"""Rises whenever `create` writes other bytes for the same arguments, so that caches can tell."""

_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


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
    """Writes the checkpoint that the arguments describe into the directory `path`, and returns `path`.

    Equal arguments give equal files. `(image_size / patch_size) ** 2` is the number of vision tokens an image has, 576
    by default as in LLaVA-1.5; sizes are in pixels. The directory appears only when it is complete.

    Raises:
        FileExistsError: `path` exists and is not an empty directory.
        ValueError: sizes that do not divide, or too few vision layers for the feature layer -2.
    """
    geometry = Geometry(
        image_size, patch_size, hidden_size, num_layers, num_heads, vision_hidden, vision_layers, vision_heads
    )
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty directory; name a new one or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        _write(partial, geometry, seed, dtype)
        partial.chmod(0o755)  # mkdtemp makes it private
        partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return path


def cached(cache_dir: Path) -> Path:
    """The checkpoint of the default arguments in the user's cache, made when it is not there yet."""
    path = cache_dir / f"demo-model-v{LAYOUT_VERSION}"
    return path if path.exists() else create(path)


def _write(folder: Path, geometry: Geometry, seed: int, dtype: Literal["float32", "bfloat16"]) -> None:
    ids = save_tokenizer(folder)
    save_file(random_weights(geometry, ids, seed, dtype), folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _model_config(geometry, ids, dtype))
    special = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
    _write_json(folder / "generation_config.json", special)
    _write_json(folder / "preprocessor_config.json", _image_processor_config(geometry))
    _write_json(folder / "processor_config.json", _processor_config(geometry))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "README.md").write_text(f"# Demo model\n\n{NOTICE}\n")


def _write_json(file: Path, content: Mapping[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _model_config(geometry: Geometry, ids: TokenIds, dtype: str) -> dict[str, object]:
    text = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
        "hidden_size": geometry.hidden_size,
        "intermediate_size": geometry.intermediate_size,
        "max_position_embeddings": 4096,
        "num_attention_heads": geometry.num_heads,
        "num_hidden_layers": geometry.num_layers,
        "num_key_value_heads": geometry.num_heads,
        "rms_norm_eps": 1e-5,
        "torch_dtype": dtype,
        "vocab_size": ids.vocab_size,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": geometry.vision_hidden,
        "image_size": geometry.image_size,
        "intermediate_size": geometry.vision_intermediate_size,
        "num_attention_heads": geometry.vision_heads,
        "num_hidden_layers": geometry.vision_layers,
        "patch_size": geometry.patch_size,
        "projection_dim": geometry.vision_hidden,
    }
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_seq_length": geometry.patches,
        "image_token_index": ids.image,
        "pad_token_id": ids.pad,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "vision_config": vision,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": ids.vocab_size,
    }


def _image_processor_config(geometry: Geometry) -> dict[str, object]:
    size = geometry.image_size
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": _CLIP_MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": _CLIP_STD,
        "processor_class": "LlavaProcessor",
        "resample": 3,  # PIL's bicubic
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


def _processor_config(geometry: Geometry) -> dict[str, object]:
    return {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,  # CLIP's class token, which "default" drops
        "patch_size": geometry.patch_size,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }
