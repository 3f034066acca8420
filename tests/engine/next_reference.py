"""LLaVA-NeXT with token reduction in plain PyTorch and transformers, packed token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration
from transformers.image_processing_utils import select_best_resolution

from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.item import ItemPlan, Layout, Part, plan_item
from foldserve.reducers.plan import Plan, Reduction
from tests.engine.keeping_reference import Answer, Keeping
from tests.engine.plain_tower import after_tower
from tests.engine.reference import KEYWORDS
from tests.engine.withdrawal.reference import WithdrawingReference
from tests.reducers.naive import naive_mmtok


class NextReference(WithdrawingReference):
    """Modifications to the reference: an image is a tile and a mosaic, each reduced by itself; newlines stay.

    Tiles that are reduced in the tower, or made smaller before it, are squares of fewer tokens. A prompt has one query.
    """

    model_class: Any = LlavaNextForConditionalGeneration

    def __init__(self, path: Path, layer: int) -> None:
        super().__init__(path, layer)
        self.tile = replace(self.geometry, any_resolution=True)

    def plans(self, images: Sequence[Any], reductions: Sequence[dict[str, object]]) -> list[ItemPlan]:
        self.words = next((KEYWORDS[str(asked["query"])] for asked in reductions if "query" in asked), [])
        return [
            plan_item(Reduction.parse(reduction), self.layout(image))
            for image, reduction in zip(images, reductions, strict=True)
        ]

    def layout(self, image: Image.Image) -> Layout:
        """From the mosaic itself, in which every place is written down."""
        return self.of_squares((image.height, image.width), isqrt(self.geometry.tokens))

    def base(self, shape: tuple[int, ...]) -> Layout | None:
        return Layout((Part(self.geometry, separators=1),), shape, self)

    def of_squares(self, shape: tuple[int, ...], side: int) -> Layout:
        rows, columns = self.mosaic_grid(shape, side)
        whole, mosaic = (
            VisionGeometry(down * across, (down, across), shows_tower=True)
            for down, across in ((side, side), (rows, columns))
        )
        return Layout((Part(whole, name="base"), Part(mosaic, separators=rows, name="mosaic")), shape, self)

    def mosaic_grid(self, shape: tuple[int, ...], side: int) -> tuple[int, int]:
        mosaic = self.places(shape, side)
        return len(mosaic), len(mosaic[0])

    def places(self, shape: tuple[int, ...], side: int) -> list[list[tuple[int, int]]]:
        """(tile, token) of each place in the mosaic that is not padding, of tiles of side x side tokens."""
        tile, (image_height, image_width) = self.config.vision_config.image_size, shape
        height, width = select_best_resolution((image_height, image_width), self.config.image_grid_pinpoints)
        rows, columns = height // tile * side, width // tile * side
        mosaic = [
            [(y // side * (columns // side) + x // side, y % side * side + x % side) for x in range(columns)]
            for y in range(rows)
        ]
        if image_width / image_height > columns / rows:
            cut = (rows - int(round(image_height * (columns / image_width), 7))) // 2
            return mosaic[cut : rows - cut]
        cut = (columns - int(round(image_width * (rows / image_height), 7))) // 2
        return [row[cut : columns - cut] for row in mosaic]

    def image_features(self, image: Any, plan: ItemPlan) -> Tensor:
        return self.survivors(image, plan)[0]

    @torch.no_grad()
    def survivors(self, image: Any, plan: ItemPlan) -> tuple[Tensor, list[int]]:
        """(plan.kept, hidden), and the position of each in the image."""
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
        seeded = plan.with_seed(crc32(pixels[0].numpy().tobytes())) if plan.is_seeded else plan
        tiles = self.tiles(pixels[:1] if plan.base_only else pixels, plan)
        newline = self.model.model.image_newline
        whole, source = self.reduced(tiles[0], seeded.grids[0])
        out, positions = list(whole), source.tolist()
        if plan.base_only:
            out, positions = [*out, newline], [*positions, plan.encoded - 1]
        else:
            mosaic = self.mosaic(tiles[1:], plan.layout.shape)
            rows, columns = mosaic.shape[:2]
            rest, source = self.reduced(mosaic.flatten(0, 1), seeded.grids[1])
            for y in range(rows):
                row = len(tiles[0]) + y * (columns + 1)
                out += [*rest[source // columns == y], newline]
                positions += [row + int(place) % columns for place in source if place // columns == y] + [row + columns]
        order = sorted(range(len(out)), key=positions.__getitem__) if plan.keeps_positions else range(len(out))
        places = [positions[i] for i in order] if plan.keeps_positions else list(order)
        return torch.stack([out[i] for i in order]), places

    def tiles(self, pixels: Tensor, plan: ItemPlan) -> Tensor:
        """(tiles, 3, H, W) -> (tiles, n, C)"""
        assert plan.tile is not None
        if not plan.tile.is_identity:
            return self.tower.features(pixels, plan.tile)
        states = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        features: Tensor = states[self.config.vision_feature_layer]
        return features[:, 1:] if self.tower.class_token else features

    def mosaic(self, tiles: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(rows, columns, C) of the mosaic's tiles."""
        places = self.places(shape, isqrt(tiles.shape[1]))
        return torch.stack([torch.stack([tiles[tile, token] for tile, token in row]) for row in places])

    def project(self, tokens: Tensor) -> Tensor:
        """Token by token."""
        projected: Tensor = self.model.model.multi_modal_projector(tokens)
        return projected

    def reduced(self, grid: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """(n, C) -> (kept, hidden), and the place that each stands for."""
        if plan.method == "mmtok":
            projected = self.project(grid)
            picks = naive_mmtok(projected, grid, self.embedded(self.words), plan.kept, 0.02)
            return projected[picks], torch.tensor(picks)
        tokens, source = after_tower(grid[None], torch.arange(len(grid))[None], plan, self.project)
        return tokens[0], source[0]


class KeepingNextReference(Keeping, NextReference):
    """`NextReference` with kept positions."""

    survivors = NextReference.survivors

    def __init__(self, path: Path, layer: int) -> None:
        super().__init__(path, layer)

    def generate(self, prompt: str, images: Any, reductions: Any, tokens: int, tail: Sequence[int] = ()) -> Answer:
        self.place(prompt, images, reductions)
        return super().generate(prompt, images, reductions, tokens, tail)
