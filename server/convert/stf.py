"""LLaVA-STF, from the authors' layout to the one that `server/engine/stf.py` serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # comes with vLLM
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM

from foldserve.reducers.stf import LAYERS, StfConfig, StfProjector
from foldserve.server.convert import names
from foldserve.server.convert.llava_config import llama_config, pads_to_square, text_config, vision_config
from foldserve.server.convert.output import SHARD_BYTES, ShardedWriter
from foldserve.server.convert.processor import IMAGE_TOKEN, load_tokenizer, save_processor
from foldserve.server.convert.source import ConversionError, Shape, Weights, read_json
from foldserve.server.folders import new_folder, write_json

_MULTIPLE = 64
"""Rows of embedding and head are filled up to a multiple, as in the published `llava-hf` checkpoints."""

_TOWER_FIELDS = (
    "hidden_act",
    "hidden_size",
    "image_size",
    "intermediate_size",
    "layer_norm_eps",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "patch_size",
    "projection_dim",
)

_NAMED = 5
"""Tensors that an error names, at most."""


@dataclass(frozen=True)
class Part:
    """A folder of weights, and how it calls its tensors."""

    weights: Weights
    rename: Callable[[str], str | None]

    def shapes(self) -> dict[str, Shape]:
        return {name: shape for theirs, shape in self.weights.shapes.items() if (name := self.rename(theirs))}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, tensor) for theirs, tensor in self.weights if (name := self.rename(theirs)))


def convert(
    source: Path,
    target: Path,
    *,
    vision_tower: Path | None = None,
    layers: Sequence[int] = LAYERS,
    experts: int = 1,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes the checkpoint in `source` to the new folder `target`, and returns `target`.

    Args:
        source: folder in the layout of LLaVA-1.5's code, with `model.mm_projector_crosslayer` in its weights.
        target: does not exist yet, or is empty; it appears when it is complete.
        vision_tower: folder of the CLIP model, where `source` does not hold it or names another than LLaVA-1.5's.
        layers: hidden states that the checkpoint fuses, deepest first; no config of theirs says it.
        experts: tokens per window that it was trained with; the kernel follows from the weights.
        shard_bytes: size of one file, at most.

    Raises:
        ConversionError: the checkpoint is no LLaVA-STF, or damaged.
        FileExistsError: `target` exists and is not an empty directory.
    """
    config = read_json(source / "config.json")
    text, vision = text_config(config), vision_config(config, vision_tower)
    parts = _parts(source, vision_tower)
    found = {name: shape for part in parts for name, shape in part.shapes().items()}
    stf = _stf_config(found, vision, layers, experts)
    _check_shapes(found, _expected(text, vision, stf))
    tokenizer = load_tokenizer(source)
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    rows = max(text["vocab_size"], -(-(image_token + 1) // _MULTIPLE) * _MULTIPLE)
    with new_folder(target) as folder:
        dtype = _copy(parts, ShardedWriter(folder, shard_bytes), rows, total=len(found))
        text |= {"vocab_size": rows}
        write_json(folder / "config.json", _config(text, vision, stf, image_token, dtype))
        write_json(folder / "generation_config.json", {name: text[name] for name in text if name.endswith("token_id")})
        save_processor(folder, tokenizer, vision, vision_tower, pad=pads_to_square(config))
    return target


def _copy(parts: Sequence[Part], writer: ShardedWriter, rows: int, *, total: int) -> str:
    """Writes every tensor, embedding and head with `rows` rows; returns the decoder's dtype."""
    dtype = ""
    with tqdm(total=total, desc="foldserve convert", unit="tensor") as progress:
        for part in parts:
            for name, tensor in part:
                if name in (names.EMBEDDING, names.HEAD):
                    tensor = _with_rows(tensor, rows)
                    dtype = str(tensor.dtype).removeprefix("torch.")
                writer.add(name, tensor)
                progress.update()
    writer.finish()
    return dtype


def _parts(source: Path, vision_tower: Path | None) -> list[Part]:
    """The checkpoint, and the tower's own folder where the checkpoint leaves the tower out."""
    checkpoint = Part(Weights(source), names.llava_name)
    shapes = checkpoint.shapes()
    if not {names.FUSION, names.OUTPUT} <= shapes.keys():
        raise ConversionError(
            f"{source} is no LLaVA-STF checkpoint: it needs the tensors model.mm_projector_crosslayer.0.weight and "
            "model.mm_projector.0.weight"
        )
    if any(name.startswith(names.TOWER) for name in shapes):
        return [checkpoint]
    if vision_tower is None:
        raise ConversionError(f"{source} does not hold its vision tower: give --vision-tower DIR with the CLIP model")
    return [checkpoint, Part(Weights(vision_tower), names.clip_name)]


def _stf_config(found: dict[str, Shape], vision: CLIPVisionConfig, layers: Sequence[int], experts: int) -> StfConfig:
    """k from the width of the second part, k * k * C / E; fits the tower."""
    channels, patches = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
    width = found[names.OUTPUT][-1]
    try:
        config = StfConfig(tuple(layers), experts=experts)
        kernel = isqrt(width * experts // channels)
        if kernel**2 * channels != width * experts:
            raise ConversionError(
                f"model.mm_projector.0.weight takes {width} channels, which is k * k * {channels} / {experts} for no "
                "k: was the checkpoint trained with another number of --experts?"
            )
        config = replace(config, kernel=kernel)
        config.check(blocks=vision.num_hidden_layers, channels=channels, patches=patches)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    return config


def _expected(text: dict[str, Any], vision: CLIPVisionConfig, stf: StfConfig) -> dict[str, Shape]:
    """Every tensor of such a model, from models without memory."""
    with torch.device("meta"):
        modules = {
            "language_model.": LlamaForCausalLM(llama_config(text)),
            names.TOWER: CLIPVisionModel(vision),
            "multi_modal_projector.": StfProjector(stf, vision.hidden_size, text["hidden_size"]),
        }
    return {
        prefix + name.removeprefix("vision_model."): tuple(tensor.shape)
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def _check_shapes(found: dict[str, Shape], expected: dict[str, Shape]) -> None:
    if missing := sorted(expected.keys() - found.keys()):
        raise ConversionError(f"tensors are missing: {_some(missing)}")
    if odd := sorted(found.keys() - expected.keys()):
        raise ConversionError(f"tensors that no LLaVA-STF of this config has: {_some(odd)}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ConversionError(
                f"{name} has the shape {list(found[name])}, where the configs of decoder and vision tower, --layers "
                f"and --experts give {list(shape)}"
            )


def _some(tensors: list[str]) -> str:
    more = len(tensors) - _NAMED
    return ", ".join(tensors[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _with_rows(weight: Tensor, rows: int) -> Tensor:
    """(vocabulary, hidden) -> (rows, hidden): the new rows are the mean, whose logit is never the highest one."""
    new = rows - len(weight)
    mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(new, -1)])


def _config(
    text: dict[str, Any], vision: CLIPVisionConfig, stf: StfConfig, image_token: int, dtype: str
) -> dict[str, object]:
    return {
        "architectures": ["LlavaStfForConditionalGeneration"],
        "model_type": "llava",
        "image_seq_length": stf.tokens((vision.image_size // vision.patch_size) ** 2),
        "image_token_index": image_token,
        "projector_hidden_act": "gelu",
        "stf": stf.to_json(),
        "text_config": text | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": dtype},
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "vision_config": {name: getattr(vision, name) for name in _TOWER_FIELDS},
        "vision_feature_select_strategy": "default",
        "vocab_size": text["vocab_size"],
    }
