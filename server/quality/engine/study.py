"""Looks into a loaded model for the label-free studies: tower states, merging at any block, attention by layer.

The model is loaded as for a calibration, and what happens inside is vLLM's own layers; see `kl_probe`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.multimodal.utils import group_and_batch_mm_kwargs

from foldserve.reducers.folder import folder
from foldserve.reducers.schedule import fold_schedule
from foldserve.server.engine.tower import Tower, attend, run_layer, run_mlp
from foldserve.server.quality.engine.kl_probe import DenseAttention, KLProbe, Prompt, chat_prompt, dense, embed

if TYPE_CHECKING:
    from PIL.Image import Image


class Merged(NamedTuple):
    """What the tower gives for one image: (n, C) tokens, and (n,) patches that each stands for."""

    tokens: Tensor
    sizes: Tensor


class Study(KLProbe):
    """A model in this process, on vLLM."""

    def energy(self, image: Image) -> Tensor:
        """(blocks, rank) squared singular values, descending, of the patch tokens after each tower block; fp32."""
        return self._apply(partial(_energy, prompt=self._prompt(image)))

    def merged(self, image: Image, removed: int) -> tuple[Merged, list[Merged]]:
        """The tower's output as it is, and with `removed` tokens merged in each of its blocks in turn; fp32, CPU."""
        full, *merged = self._apply(partial(_merged, prompt=self._prompt(image), removed=removed))
        return full, merged

    def attention(self, image: Image, question: str) -> Tensor:
        """(layers, 2, 3) attention of decoder layers to what stands before the image, the image, and what follows.

        Mean over heads; of the prompt's last token, and the mean over all tokens that follow the image.
        """
        return self._apply(partial(_attention, prompt=self._prompt(image, question)))

    def _prompt(self, image: Image, question: str = "") -> Prompt:
        return chat_prompt(self._llm, image, question)

    def _apply(self, look: Any) -> Any:
        return self._llm.apply_model(look)[0]  # every worker takes part, and all get the same


def _pixels(model: Any, prompt: Prompt) -> Tensor:
    device = next(model.parameters()).device
    ((_, _, kwargs),) = group_and_batch_mm_kwargs([("image", item) for item in prompt.images], device=device)
    pixels: Tensor = model.normalized(kwargs["pixel_values"])
    return pixels.to(next(model.vision_tower.parameters()).dtype)


def _walk(model: Any) -> tuple[Tower, int]:
    """The tower, and how many tokens stand before its patches."""
    (part,) = model.family.largest.parts
    return Tower(model.vision_tower, model.config.vision_feature_select_strategy), int(part.geometry.class_token)


@torch.inference_mode()
def _energy(model: Any, prompt: Prompt) -> Tensor:
    tower, first = _walk(model)
    hidden = tower.embed(_pixels(model, prompt))
    energies = []
    for layer in tower.layers:
        hidden = run_layer(layer, hidden)
        energies.append(torch.linalg.svdvals(hidden[0, first:].float()).square().cpu())
    return torch.stack(energies)


@torch.inference_mode()
def _merged(model: Any, prompt: Prompt, removed: int) -> list[Merged]:
    """Of the tower as it is, then of each block."""
    tower, first = _walk(model)
    hidden = tower.embed(_pixels(model, prompt))
    outputs = []
    for index, layer in enumerate(tower.layers):
        outputs.append(_merged_in(tower, index, hidden.clone(), removed, first))  # layers may write to their input
        hidden = run_layer(layer, hidden)
    tokens = tower.finish(hidden)[0].float().cpu()
    return [Merged(tokens, torch.ones(len(tokens))), *outputs]


def _merged_in(tower: Tower, index: int, hidden: Tensor, removed: int, first: int) -> Merged:
    """FOLDER's merge by attention keys between attention and MLP of one block; later blocks see fewer tokens."""
    hidden, attention = attend(tower.layers[index], hidden, None)
    folds = fold_schedule(hidden.shape[1], removed)
    merged = folder(hidden, folds, metric=attention.keys(), class_token=bool(first))
    hidden = run_mlp(tower.layers[index], merged.tokens)
    for layer in list(tower.layers)[index + 1 :]:
        hidden = run_layer(layer, hidden)
    return Merged(tower.finish(hidden)[0].float().cpu(), merged.sizes[0, first:].float().cpu())


class _SeenAttention(DenseAttention):
    """Modifications: notes, in `seen`, how much attention goes to each part of the prompt; the image is at `image`."""

    image: tuple[int, int]
    seen: Tensor

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *rest: object, **more: object) -> Tensor:
        start, end = self.image
        q = query.view(-1, self.num_heads, self.head_size)[end:].transpose(0, 1).float()  # (heads, rows, size)
        k = key.view(-1, self.num_kv_heads, self.head_size).transpose(0, 1).float()
        k = k.repeat_interleave(self.num_heads // self.num_kv_heads, dim=0)
        logits = q @ k.mT * self.impl.scale  # (heads, rows, n)
        later = torch.ones_like(logits[0], dtype=torch.bool).triu(1 + end)
        weights = logits.masked_fill(later, -torch.inf).softmax(-1).mean(0)  # (rows, n)
        parts = torch.stack([part.sum(-1) for part in weights.tensor_split([start, end], dim=-1)], dim=-1)  # (rows, 3)
        self.seen = tensor_model_parallel_all_reduce(torch.stack([parts[-1], parts.mean(0)]))
        return super().forward(query, key, value, *rest, **more)


@torch.inference_mode()
def _attention(model: Any, prompt: Prompt) -> Tensor:
    decoder = model.get_submodule(model.decoder_path)
    (image,) = prompt.ranges
    if image[1] == len(prompt.token_ids):
        raise ValueError("the prompt ends with the image: its chat template puts nothing behind it that could attend")
    ops = decoder.attention_ops
    for op in ops:
        op.image = image
    embeds = embed(model, prompt)
    positions = torch.arange(len(embeds), device=embeds.device)
    with dense(ops, _SeenAttention):
        hidden, residual = embeds, None
        for layer in decoder.whole_layers():
            hidden, residual = layer(positions, hidden, residual)
    return torch.stack([op.seen for op in ops]).cpu() / get_tensor_model_parallel_world_size()
