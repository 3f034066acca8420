"""The JSON files of a LLaVA-1.5 checkpoint, as `llava-hf` publishes them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from foldserve.server.folders import write_json
from foldserve.server.quality.demo_weights import Geometry

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
NORM_EPS = 1e-5


class Ids(Protocol):
    """The special tokens that a model's configuration names, and the rows of its embedding matrix."""

    @property
    def bos(self) -> int: ...
    @property
    def eos(self) -> int: ...
    @property
    def image(self) -> int: ...
    @property
    def pad(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


def write_config(folder: Path, geometry: Geometry, ids: Ids, dtype: str) -> None:
    """Writes a checkpoint's files, except weights, tokenizer and chat template."""
    special = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
    write_json(folder / "config.json", _model(geometry, ids, dtype))
    write_json(folder / "generation_config.json", special)
    write_json(folder / "preprocessor_config.json", _image_processor(geometry))
    write_json(folder / "processor_config.json", _processor(geometry))


def _model(geometry: Geometry, ids: Ids, dtype: str) -> dict[str, object]:
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_seq_length": geometry.patches,
        "image_token_index": ids.image,
        "pad_token_id": ids.pad,
        "projector_hidden_act": "gelu",
        "text_config": _decoder(geometry, ids, dtype),
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "vision_config": _vision_tower(geometry),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": ids.vocab_size,
    }


def _decoder(geometry: Geometry, ids: Ids, dtype: str) -> dict[str, object]:
    return {
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
        "rms_norm_eps": NORM_EPS,
        "torch_dtype": dtype,
        "vocab_size": ids.vocab_size,
    }


def _vision_tower(geometry: Geometry) -> dict[str, object]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": geometry.vision_hidden,
        "image_size": geometry.image_size,
        "intermediate_size": geometry.vision_intermediate_size,
        "num_attention_heads": geometry.vision_heads,
        "num_hidden_layers": geometry.vision_layers,
        "patch_size": geometry.patch_size,
        "projection_dim": geometry.vision_hidden,
    }


def _image_processor(geometry: Geometry) -> dict[str, object]:
    size = geometry.image_size
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(CLIP_MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(CLIP_STD),
        "processor_class": "LlavaProcessor",
        "resample": 3,  # PIL's bicubic
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


def _processor(geometry: Geometry) -> dict[str, object]:
    return {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,  # CLIP's class token, which "default" drops
        "patch_size": geometry.patch_size,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }
