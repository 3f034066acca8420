"""What the label-free studies read from a loaded model: tower states, merging in any block, attention by layer.

All of it runs through vLLM's own layers, as in `kl_probe`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.multimodal.utils import group_and_batch_mm_kwargs

from foldserve.reducers.attention import LayerAttention
from foldserve.reducers.fold import Reduced
from foldserve.reducers.folder import folder
from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.item import plan_item
from foldserve.reducers.method import InTower, Step
from foldserve.reducers.plan import Plan, Reduction
from foldserve.reducers.schedule import fold_schedule
from foldserve.server.engine.families.qwen_vl import QwenVLFamily
from foldserve.server.engine.qwen_tower import TowerPass
from foldserve.server.engine.tower import Tower, attend, run_layer, run_mlp
from foldserve.server.quality.engine.kl_probe import (
    DenseAttention,
    KLProbe,
    Prompt,
    chat_prompt,
    dense,
    embed,
    rotary_positions,
    take_deepstack,
)

if TYPE_CHECKING:
    from PIL.Image import Image


MOST_TOKENS = 2500
"""Most tokens of an image: their earth mover's distance takes seconds for each block of the tower."""


class Merged(NamedTuple):
    """The tower's output for one image: (n, C) tokens, and (n,) the number of patches in each."""

    tokens: Tensor
    sizes: Tensor


class ModelStudy(KLProbe):
    def tokens(self, image: Image, ratio: float) -> int:
        """Number of vision tokens; ValueError if the studies can't follow them or `ratio` can't be removed."""
        (layout,) = self.layouts([image])
        if len(layout.parts) > 1 or layout.parts[0].count > 1:
            raise ValueError(
                f"{self.model}: its images are several grids, which are reduced one by one; the studies follow the "
                "tokens of one"
            )
        if layout.tokens > MOST_TOKENS:
            raise ValueError(
                f"{self.model}: an image of {image.width} x {image.height} pixels has {layout.tokens} vision tokens, "
                f"and the exact distance takes hours above {MOST_TOKENS}: give smaller images"
            )
        return plan_item(Reduction(ratio=ratio), layout).encoded

    def energy(self, image: Image) -> Tensor:
        """(blocks, rank) squared singular values, descending, of the patch tokens after each tower block; fp32."""
        return self._apply(partial(_energy, prompt=self._prompt(image)))

    def merged(self, image: Image, removed: int) -> tuple[Merged, list[Merged]]:
        """The tower's output without merging, and with `removed` tokens merged in each block; fp32, CPU."""
        full, *merged = self._apply(partial(_merged, prompt=self._prompt(image), removed=removed))
        return full, merged

    def attention(self, image: Image, question: str) -> Tensor:
        """(layers, 2, 3) shares of attention, mean over heads.

        From the prompt's last token, and from all tokens behind the image (mean), to the tokens before the image, the
        image, and the tokens behind it.
        """
        return self._apply(partial(_attention, prompt=self._prompt(image, question)))

    def _prompt(self, image: Image, question: str = "") -> Prompt:
        return chat_prompt(self._llm, image, question)

    def _apply(self, look: Any) -> Any:
        return self._llm.apply_model(look)[0]  # one result per tensor-parallel worker, all equal


def _inputs(model: Any, prompt: Prompt) -> dict[str, Any]:
    device = next(model.parameters()).device
    ((_, _, kwargs),) = group_and_batch_mm_kwargs([("image", item) for item in prompt.images], device=device)
    return dict(kwargs)


def _pixels(model: Any, prompt: Prompt) -> Tensor:
    pixels: Tensor = model.normalized(_inputs(model, prompt)["pixel_values"])
    return pixels.to(next(model.vision_tower.parameters()).dtype)


def _walk(model: Any) -> tuple[Tower, int]:
    """The tower, and the number of tokens before its patches."""
    (part,) = model.family.largest.parts
    return Tower(model.vision_tower, model.config.vision_feature_select_strategy), int(part.geometry.class_token)


@torch.inference_mode()
def _energy(model: Any, prompt: Prompt) -> Tensor:
    if isinstance(model.family, QwenVLFamily):
        return _energy_of_units(model, prompt)
    tower, first = _walk(model)
    hidden = tower.embed(_pixels(model, prompt))
    energies = []
    for layer in tower.layers:
        hidden = run_layer(layer, hidden)
        energies.append(torch.linalg.svdvals(hidden[0, first:].float()).square().cpu())
    return torch.stack(energies)


@torch.inference_mode()
def _merged(model: Any, prompt: Prompt, removed: int) -> list[Merged]:
    """The output without merging first, then with merging in each block."""
    if isinstance(model.family, QwenVLFamily):
        layers = range(len(model.visual.blocks))
        return [_units_merged_in(model, prompt, block, removed) for block in (None, *layers)]
    tower, first = _walk(model)
    hidden = tower.embed(_pixels(model, prompt))
    outputs = []
    for index, layer in enumerate(tower.layers):
        outputs.append(_merged_in(tower, index, hidden.clone(), removed, first))  # layers may write to their input
        hidden = run_layer(layer, hidden)
    tokens = tower.finish(hidden)[0].float().cpu()
    return [Merged(tokens, torch.ones(len(tokens))), *outputs]


def _merged_in(tower: Tower, index: int, hidden: Tensor, removed: int, first: int) -> Merged:
    """FOLDER's merge by attention keys, between attention and MLP of block `index`."""
    hidden, attention = attend(tower.layers[index], hidden, None)
    folds = fold_schedule(hidden.shape[1], removed)
    merged = folder(hidden, folds, metric=attention.keys(), class_token=bool(first))
    hidden = run_mlp(tower.layers[index], merged.tokens)
    for layer in list(tower.layers)[index + 1 :]:
        hidden = run_layer(layer, hidden)
    return Merged(tower.finish(hidden)[0].float().cpu(), merged.sizes[0, first:].float().cpu())


class _KeyFolder(InTower):
    """FOLDER's merge by attention keys, for the studies alone."""

    name = "by keys"
    summary = "FOLDER's merge by attention keys."
    paper = "FOLDER: Accelerating Multi-modal Large Language Models with Enhanced Performance"

    def schedule(self, geometry: VisionGeometry, removed: int) -> tuple[Step, ...]:
        raise NotImplementedError  # no request names it

    def reduce(
        self, x: Tensor, sizes: Tensor, attention: LayerAttention, removed: tuple[int, ...], plan: Plan
    ) -> Reduced:
        return folder(x, fold_schedule(x.shape[1], sum(removed)), metric=attention.keys())


class _OneBlockPlan(NamedTuple):
    """The part of a plan that `TowerPass` reads: `removed` of `encoded` tokens leave in one block, or in none."""

    encoded: int
    removed: int
    block: int | None

    @property
    def reducer(self) -> InTower:
        return _KeyFolder()

    def removed_in(self, layer: int) -> tuple[int, ...]:
        return (self.removed,) if layer == self.block else ()


def _tower_pass(model: Any, prompt: Prompt, block: int | None = None, removed: int = 0) -> TowerPass:
    """A pass before the first block of Qwen's tower, in which the patches that become one token move together."""
    inputs = _inputs(model, prompt)
    (grid,) = inputs["image_grid_thw"].tolist()
    plan: Any = _OneBlockPlan(grid[1] * grid[2] // model.visual.spatial_merge_unit, removed, block)
    return TowerPass(model.visual, inputs["pixel_values"], grid, plan)


def _energy_of_units(model: Any, prompt: Prompt) -> Tensor:
    tower_pass = _tower_pass(model, prompt)
    energies = []
    for index, layer in enumerate(model.visual.blocks):
        tower_pass.run_layer(layer, index)
        energies.append(torch.linalg.svdvals(tower_pass.tokens[0].float()).square().cpu())
    return torch.stack(energies)


def _units_merged_in(model: Any, prompt: Prompt, block: int | None, removed: int) -> Merged:
    """Without deepstack levels: tokens are compared by the tower's final output."""
    tower_pass = _tower_pass(model, prompt, block, removed)
    for index, layer in enumerate(model.visual.blocks):
        tower_pass.run_layer(layer, index)
    (left,) = tower_pass.finish()
    width = model.family.deciding_columns(model)
    return Merged(left.features[:, :width].float().cpu(), tower_pass.sizes[0].float().cpu())


class _RecordingAttention(DenseAttention):
    """Modifications: stores in `seen` how much attention goes to each part of the prompt; the image is at `image`."""

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
    places = rotary_positions(model, prompt).to(embeds.device)
    with dense(ops, _RecordingAttention):
        hidden, residual = embeds, None
        for layer in decoder.whole_layers(take_deepstack(model, len(embeds))):
            hidden, residual = layer(places, hidden, residual)
    return torch.stack([op.seen for op in ops]).cpu() / get_tensor_model_parallel_world_size()
