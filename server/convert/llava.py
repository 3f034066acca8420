"""The shared part of converting checkpoints from LLaVA's own layout to that of `llava-hf`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm  # comes with vLLM
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM

from foldserve.server.convert import names
from foldserve.server.convert.llava_config import llama_config, pads_to_square, text_config, vision_config
from foldserve.server.convert.output import ShardedWriter
from foldserve.server.convert.processor import IMAGE_TOKEN, load_tokenizer, save_processor
from foldserve.server.convert.source import ConversionError, Shape, Weights, read_json
from foldserve.server.folders import new_folder, write_json

_MULTIPLE = 64
"""Embedding and head are padded to a multiple of rows, as in the published `llava-hf` checkpoints."""

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

_NAMED = 5  # most tensors that an error names


@dataclass(frozen=True)
class Part:
    """A folder of weights, and the mapping of its tensors' names to ours."""

    weights: Weights
    rename: Callable[[str], str | None]

    def shapes(self) -> dict[str, Shape]:
        return {name: shape for theirs, shape in self.weights.shapes.items() if (name := self.rename(theirs))}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, tensor) for theirs, tensor in self.weights if (name := self.rename(theirs)))


class LlavaSource:
    """A checkpoint of LLaVA's own code with a CLIP tower and a projector of some kind.

    Args:
        vision_tower: folder of the CLIP model, needed if the checkpoint lacks it or names another than LLaVA-1.5's.
        kind: of LLaVA, for errors.

    Raises:
        ConversionError: a config of another layout.
    """

    def __init__(self, folder: Path, vision_tower: Path | None, kind: str) -> None:
        self.folder, self.vision_tower, self._kind = folder, vision_tower, kind
        self.config = read_json(folder / "config.json")
        self.text, self.vision = text_config(self.config), vision_config(self.config, vision_tower)

    @property
    def patches(self) -> int:
        return int(self.vision.image_size // self.vision.patch_size) ** 2

    def parts(self, rename: Callable[[str], str | None], needed: Mapping[str, str]) -> list[Part]:
        """The checkpoint, and the tower's own folder if the checkpoint leaves the tower out.

        `rename` maps the checkpoint's names to ours; `needed`, our names that distinguish this kind of LLaVA, to
        theirs.
        """
        checkpoint = Part(Weights(self.folder), rename)
        shapes = checkpoint.shapes()
        if not needed.keys() <= shapes.keys():
            raise ConversionError(
                f"{self.folder} is no {self._kind} checkpoint: it needs the tensors {' and '.join(needed.values())}"
            )
        if any(name.startswith(names.TOWER) for name in shapes):
            return [checkpoint]
        if self.vision_tower is None:
            raise ConversionError(
                f"{self.folder} does not hold its vision tower: give --vision-tower DIR with the CLIP model"
            )
        return [checkpoint, Part(Weights(self.vision_tower), names.clip_name)]

    def check(self, parts: Sequence[Part], projector: Callable[[], nn.Module], options: str = "") -> None:
        """Checks that decoder, tower and projector have every tensor of such a model, and no others.

        `projector` makes the module on the meta device; `options` are the command's options that decide its shapes, for
        errors.
        """
        found = shapes_of(parts)
        expected = self._expected(projector)
        if missing := sorted(expected.keys() - found.keys()):
            raise ConversionError(f"tensors are missing: {_list_some(missing)}")
        if odd := sorted(found.keys() - expected.keys()):
            raise ConversionError(f"tensors that no {self._kind} of this config has: {_list_some(odd)}")
        for name, shape in expected.items():
            if found[name] != shape:
                raise ConversionError(
                    f"{name} has the shape {list(found[name])}, where the configs of decoder and vision tower{options} "
                    f"give {list(shape)}"
                )

    def write(self, target: Path, parts: Sequence[Part], fields: Mapping[str, object], shard_bytes: int) -> Path:
        """Writes everything to the new folder `target`; `fields` are this kind's own of config.json.

        Raises FileExistsError if `target` exists and is not an empty directory.
        """
        tokenizer = load_tokenizer(self.folder)
        image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        rows = max(self.text["vocab_size"], -(-(image_token + 1) // _MULTIPLE) * _MULTIPLE)
        text = self.text | {"vocab_size": rows}
        with new_folder(target) as folder:
            dtype = _copy(parts, ShardedWriter(folder, shard_bytes), rows)
            write_json(folder / "config.json", _config(text, self.vision, image_token, dtype) | dict(fields))
            ids = {name: text[name] for name in text if name.endswith("token_id")}
            write_json(folder / "generation_config.json", ids)
            save_processor(folder, tokenizer, self.vision, self.vision_tower, pad=pads_to_square(self.config))
        return target

    def _expected(self, projector: Callable[[], nn.Module]) -> dict[str, Shape]:
        with torch.device("meta"):
            modules = {
                "language_model.": LlamaForCausalLM(llama_config(self.text)),
                names.TOWER: CLIPVisionModel(self.vision),
                "multi_modal_projector.": projector(),
            }
        return {
            prefix + name.removeprefix("vision_model."): tuple(tensor.shape)
            for prefix, module in modules.items()
            for name, tensor in module.state_dict().items()
        }


def shapes_of(parts: Sequence[Part]) -> dict[str, Shape]:
    return {name: shape for part in parts for name, shape in part.shapes().items()}


def _copy(parts: Sequence[Part], writer: ShardedWriter, rows: int) -> str:
    """Writes every tensor, embedding and head with `rows` rows; returns the decoder's dtype."""
    dtype = ""
    with tqdm(total=len(shapes_of(parts)), desc="foldserve convert", unit="tensor") as progress:
        for part in parts:
            for name, tensor in part:
                if name in (names.EMBEDDING, names.HEAD):
                    tensor = _with_rows(tensor, rows)
                    dtype = str(tensor.dtype).removeprefix("torch.")
                writer.add(name, tensor)
                progress.update()
    writer.finish()
    return dtype


def _list_some(tensors: list[str]) -> str:
    more = len(tensors) - _NAMED
    return ", ".join(tensors[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _with_rows(weight: Tensor, rows: int) -> Tensor:
    """(vocabulary, hidden) -> (rows, hidden): the new rows are the mean, whose logit is never the highest."""
    new = rows - len(weight)
    mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(new, -1)])


def _config(text: Mapping[str, Any], vision: CLIPVisionConfig, image_token: int, dtype: str) -> dict[str, object]:
    decoder = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": dtype}
    return {
        "model_type": "llava",
        "image_token_index": image_token,
        "projector_hidden_act": "gelu",
        "text_config": dict(text) | decoder,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "vision_config": {name: getattr(vision, name) for name in _TOWER_FIELDS},
        "vision_feature_select_strategy": "default",
        "vocab_size": text["vocab_size"],
    }
