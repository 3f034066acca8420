"""Runs vLLM's Qwen-VL vision towers on a subset of the tokens, or removes tokens between a layer's attention and MLP.

A token is the 2 x 2 patches that the merger joins. They stay or go together, and merge with the patches at the same
place in other tokens. Qwen3-VL's deepstack levels so far are further columns of their token. Qwen2.5-VL's windows hold
what is left of their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from vllm.model_executor.models.qwen2_vl import Qwen2VisionAttention
from vllm.model_executor.models.utils import cast_overflow_tensors
from vllm.utils.torch_utils import async_tensor_h2d

from foldserve.reducers.attention import PatchAttention
from foldserve.reducers.method import AfterLastLayer, InTower
from foldserve.reducers.pixelprune import Cells
from foldserve.reducers.plan import Plan
from foldserve.server.engine.tower import mean_over_ranks
from foldserve.server.engine.vision import IndexMap, KeptTokens, TokenHistory


def encode_reducing(
    visual: Any, pixels: Tensor, grid: Sequence[int], plan: Plan, cells: Cells | None = None
) -> list[KeptTokens]:
    """Run images with one grid and one plan through the tower. The caller does what the plan does after the tower.

    Args:
        visual: vLLM's vision transformer of Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
        pixels: (patches of all images, values).
        grid: (1, rows, columns) of each image's patches.
        cells: tokens of each image that enter; None: all.

    Returns:
        What is left of each image in raster order; deepstack levels are the last columns of the features.
    """
    return _run_tower(visual, pixels, grid, plan, cells).finish()


def encode_showing_patches(
    visual: Any, pixels: Tensor, grid: Sequence[int], plan: Plan, cells: Cells | None = None
) -> tuple[list[KeptTokens], list[Tensor]]:
    """`encode_reducing` for a plan that acts after the tower.

    Returns:
        images: unreduced.
        means: (n, C) per image, in raster order: mean of each token's patches before the merger.
    """
    tower_pass = _run_tower(visual, pixels, grid, plan, cells)
    return tower_pass.finish(), [*tower_pass.means()]


def _run_tower(visual: Any, pixels: Tensor, grid: Sequence[int], plan: Plan, cells: Cells | None) -> TowerPass:
    tower_pass = TowerPass(visual, pixels, grid, plan, cells)
    for index, layer in enumerate(visual.blocks):
        tower_pass.run_layer(layer, index)
    return tower_pass


class _Windows(NamedTuple):
    """Qwen2.5-VL's windows of one image."""

    window: Tensor  # (n,) int64, the window of each token; tokens enter window by window
    number: int  # of windows
    most: int  # tokens that a window may hold

    @classmethod
    def of(cls, visual: Any, ends: Tensor, tokens: int) -> _Windows:
        """Takes 0 and the ends of the windows, in patches."""
        number = len(ends) - 1
        lengths = ends.diff() // visual.spatial_merge_unit
        each = torch.arange(number, device=ends.device)
        window = torch.repeat_interleave(
            each, lengths, output_size=tokens
        )  # with a size, torch does not wait for the device
        side = visual.window_size // visual.spatial_merge_size // visual.patch_size
        return cls(window, number, side**2)


class TowerPass:
    """Images with one grid and one plan on their way through the layers.

    Tokens are (B, n, patches * C); the layers see (B * n * patches, 1, C). `_source` (B, n) numbers an image's tokens
    in the order in which they enter, which is not raster order if there are windows.
    """

    def __init__(
        self, visual: Any, pixels: Tensor, grid: Sequence[int], plan: Plan, cells: Cells | None = None
    ) -> None:
        self._visual, self._plan = visual, plan
        self._method = plan.reducer if isinstance(plan.reducer, InTower) else None
        self._patches, self._taps = visual.spatial_merge_size**2, getattr(visual, "deepstack_visual_indexes", ())
        tables = visual.prepare_encoder_metadata([list(grid)])  # of one image: all are alike
        n, device = prod(grid) // self._patches, visual.device
        self._raster, self._windows = torch.arange(n, device=device), None
        if "window_index" in tables:
            self._raster = tables["window_index"]
            self._windows = _Windows.of(visual, tables["cu_window_seqlens"], n)
        entering = torch.arange(n, device=device)  # in the order of the windows
        if cells is not None:
            entering = self._raster.argsort()[async_tensor_h2d(cells.places(), device)].sort().values
        raster = self._raster[entering]
        patches = pixels.to(device).view(-1, n, self._patches * pixels.shape[-1])[:, raster]
        hidden = visual.patch_embed(visual.input_norm(patches.view(-1, pixels.shape[-1]), visual.dtype))
        self._tokens = hidden.view(len(patches), len(raster), -1)
        if "pos_embeds" in tables:
            self._tokens = self._tokens + tables["pos_embeds"].view(n, -1)[raster]
        rotary = (tables["rotary_pos_emb_cos"], tables["rotary_pos_emb_sin"])
        self._rotary = [table.view(n, self._patches, -1) for table in rotary]
        self._levels: list[Tensor] = []
        self._source = entering.expand(len(patches), -1)
        self._sizes = torch.ones_like(self._source)
        self._maps = [IndexMap(raster.expand_as(self._source), n)]
        self._is_reduced = False
        self._lay_out()

    def run_layer(self, layer: Any, index: int) -> None:
        """Run a layer with the plan's steps in it."""
        steps = self._plan.removed_in(index)
        key_bias = None
        if self._is_reduced and self._method is not None and self._method.proportional_attention:
            key_bias = self._sizes.log().repeat_interleave(self._patches, dim=1)
        if steps or key_bias is not None:
            if self._ends_tower:
                self._into_raster_order()
            hidden, attention = self._attend(layer, index, key_bias)
            self._take_back(hidden)
            if steps and not self._ends_tower:
                self._reduce(attention, steps)
            hidden = self._flat()
            self._take_back(hidden + layer.mlp(layer.norm2(hidden)))
            if self._ends_tower:
                self._reduce(attention, steps)
        else:
            cos, sin = self._tables
            sequences = self._sequences(index)
            if not isinstance(layer.attn, Qwen2VisionAttention):
                sequences["sequence_lengths"] = None  # of FlashInfer
            self._take_back(layer(self._flat(), rotary_pos_emb_cos=cos, rotary_pos_emb_sin=sin, **sequences))
        if index in self._taps:
            tap = self._visual.deepstack_merger_list[self._taps.index(index)]
            self._levels.append(tap(self._flat()).view(*self._source.shape, -1))

    @property
    def tokens(self) -> Tensor:
        """(B, n, patches * C), window by window if there are windows."""
        return self._tokens

    @property
    def sizes(self) -> Tensor:
        """(B, n) int64, original tokens in each token, in raster order."""
        return self._sizes.gather(1, self._raster[self._source].argsort(dim=1))

    def means(self) -> Tensor:
        """(B, n, C), fp32: mean of each token's patches, in raster order."""
        means = self._tokens.unflatten(-1, (self._patches, -1)).mean(dim=2, dtype=torch.float32)
        order = self._raster[self._source].argsort(dim=1)
        return means.gather(1, order.unsqueeze(-1).expand_as(means))

    def finish(self) -> list[KeptTokens]:
        hidden = self._flat()
        if self._windows is not None and hidden.dtype == torch.float16:
            hidden = cast_overflow_tensors(hidden)  # as vLLM does
        merged = self._visual.merger(hidden).view(*self._source.shape, -1)
        features, source = torch.cat([merged, *self._levels], dim=-1), self._raster[self._source]
        order = source.argsort(dim=1)
        maps = [*self._maps, IndexMap(order, order.shape[1])]
        each = enumerate(zip(features, source, order, strict=True))
        return [KeptTokens(own[places], tokens[places], TokenHistory(maps, row)) for row, (own, tokens, places) in each]

    @property
    def _ends_tower(self) -> bool:
        """Whether the method acts on the last layer's output."""
        return isinstance(self._method, AfterLastLayer)

    def _flat(self) -> Tensor:
        return self._tokens.view(-1, 1, self._tokens.shape[-1] // self._patches)

    def _take_back(self, hidden: Tensor) -> None:
        self._tokens = hidden.view(*self._source.shape, -1)

    def _lay_out(self) -> None:
        """Rotary tables and sequence lengths of the tokens that are left.

        How many tokens a window holds stays on the device: kernels accept an upper bound and sequences of length 0.
        vLLM's CPU attention reads the lengths.
        """
        images, tokens = self._source.shape
        self._tables = [table[self._source].flatten(0, 2) for table in self._rotary]
        length, device = tokens * self._patches, self._source.device
        self._whole = torch.arange(0, images * length + 1, length, dtype=torch.int32, device=device), length
        if self._windows is not None:
            window, number, most = self._windows
            held = torch.zeros(images, number, dtype=torch.int64, device=device)
            held.scatter_add_(1, window[self._source], torch.ones_like(self._source))
            ends = F.pad(held.flatten().cumsum(0), (1, 0))
            self._cut = (ends * self._patches).int(), most * self._patches

    def _sequences(self, index: int) -> dict[str, Tensor | None]:
        ends, longest = self._cut if self._is_cut(index) else self._whole
        return {"cu_seqlens": ends, "max_seqlen": torch.tensor(longest, dtype=torch.int32)}

    def _is_cut(self, index: int) -> bool:
        return self._windows is not None and index not in self._visual.fullatt_block_indexes

    def _attend(self, layer: Any, index: int, key_bias: Tensor | None) -> tuple[Tensor, PatchAttention]:
        """First half of a layer: hidden states after the attention's residual, and the attention."""
        hidden, attention = self._flat(), layer.attn
        qkv, _ = attention.qkv(layer.norm1(hidden))
        heads = (attention.num_attention_heads_per_partition, attention.hidden_size_per_attention_head)
        if isinstance(attention, Qwen2VisionAttention):
            query, key, value = (part.transpose(0, 1) for part in attention.split_qkv(qkv))
        else:
            query, key, value = qkv.transpose(0, 1).unflatten(-1, (3, *heads)).unbind(dim=2)
        rotated = attention.apply_rotary_emb(torch.cat([query, key]), *self._tables)
        # a view, which keeps three times its memory alive: only for methods that need it
        unrotated_key = key.view(len(self._source), -1, *heads) if self._ends_tower else None
        query, key = rotated.chunk(2)  # (1, B * n * patches, heads here, head_dim)
        if key_bias is None:
            attended = attention.attn(query=query, key=key, value=value, **self._sequences(index))
        else:
            attended = self._attend_with_bias(index, torch.cat([query, key, value]), key_bias, heads[1] ** -0.5)
        projected, _ = attention.proj(attended.reshape(len(hidden), 1, -1))
        query, key = (part.view(len(self._source), -1, *heads) for part in (query, key))
        seen = PatchAttention(
            query, key, heads[1] ** -0.5, key_bias, unrotated_key=unrotated_key, patches=self._patches
        )
        if attention.tp_size > 1:
            seen = replace(seen, ranks=attention.tp_size, mean_over_ranks=mean_over_ranks)
        return hidden + projected, seen

    def _attend_with_bias(self, index: int, qkv: Tensor, key_bias: Tensor, scale: float) -> Tensor:
        """(3, patches of all images, heads, head_dim) -> (patches of all images, heads, head_dim).

        vLLM's encoder attention takes no bias. Windows are padded to their full size, so that no shape depends on what
        is left in them.
        """
        bias, place, heads = key_bias, None, qkv.shape[2:]
        if self._windows is not None and self._is_cut(index):
            place, rows, most = self._places(self._windows)
            nothing = key_bias.new_full((rows * most,), torch.finfo(torch.float32).min)
            bias = nothing.index_copy(0, place, key_bias.flatten()).view(rows, most)
            qkv = qkv.new_zeros(3, rows * most, *heads).index_copy(1, place, qkv)
        query, key, value = qkv.view(3, *bias.shape, *heads).transpose(2, 3)
        mask = bias[:, None, None].to(query.dtype)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        attended = attended.transpose(1, 2).flatten(0, 1)
        return attended if place is None else attended[place]

    def _places(self, windows: _Windows) -> tuple[Tensor, int, int]:
        """Index of each patch among padded windows, the number of windows, and patches per window."""
        images, tokens = self._source.shape
        ends, most = self._cut
        image = torch.arange(images, device=ends.device).unsqueeze(1)
        window = (windows.window[self._source] + image * windows.number).flatten().repeat_interleave(self._patches)
        patch = torch.arange(images * tokens * self._patches, device=ends.device)
        return window * most + patch - ends[window], images * windows.number, most

    def _into_raster_order(self) -> None:
        """Sort tokens from window order into raster order; only for layers that see the whole image."""
        if self._windows is not None:
            order = self._raster[self._source].argsort(dim=1)
            self._tokens = self._tokens.gather(1, order.unsqueeze(-1).expand_as(self._tokens))
            self._sizes, self._source = self._sizes.gather(1, order), self._source.gather(1, order)
            self._lay_out()

    def _reduce(self, attention: PatchAttention, steps: tuple[int, ...]) -> None:
        columns = torch.cat([self._tokens, *self._levels], dim=-1)
        widths = [part.shape[-1] for part in (self._tokens, *self._levels)]
        assert self._method is not None  # it has steps
        columns, sizes, place, group = self._method.reduce(columns, self._sizes, attention, steps, self._plan)
        self._maps.append(IndexMap(group))
        source = self._source.gather(1, place)
        if self._windows is not None:  # back into window order, which the method may have changed
            order = source.argsort(dim=1)
            columns = columns.gather(1, order.unsqueeze(-1).expand_as(columns))
            sizes, source = sizes.gather(1, order), source.gather(1, order)
            self._maps.append(IndexMap(order, order.shape[1]))
        tokens, *self._levels = columns.split_with_sizes(widths, dim=-1)
        self._tokens, self._sizes, self._source = tokens.contiguous(), sizes, source
        self._is_reduced = True
        self._lay_out()
