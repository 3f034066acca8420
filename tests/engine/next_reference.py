"""LLaVA-NeXT with token reduction in plain PyTorch and transformers, packed token by token."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
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
from tests.engine.withdrawal.reference import WithdrawingReference


class NextReference(WithdrawingReference):
    """Modifications to the reference: an image is a tile and a mosaic, each reduced by itself; newlines stay."""

    model_class = LlavaNextForConditionalGeneration

    def plans(self, images: Sequence[Image.Image], reductions: Sequence[dict[str, object]]) -> list[ItemPlan]:
        return [
            plan_item(Reduction.parse(reduction), self.layout(image))
            for image, reduction in zip(images, reductions, strict=True)
        ]

    def layout(self, image: Image.Image) -> Layout:
        """From the mosaic itself, in which every place is written down."""
        _, mosaic = self.places(image)
        rows, columns = len(mosaic), len(mosaic[0])
        side = isqrt(self.geometry.tokens)
        parts = Part(VisionGeometry(side**2, (side, side))), Part(VisionGeometry(rows * columns, (rows, columns)))
        return Layout((parts[0], Part(parts[1].geometry, separators=rows)), (image.height, image.width))

    def places(self, image: Image.Image) -> tuple[int, list[list[tuple[int, int]]]]:
        """How many tiles the mosaic has, and (tile, token) of each place in it that is not padding."""
        tile, side = self.config.vision_config.image_size, isqrt(self.geometry.tokens)
        height, width = select_best_resolution((image.height, image.width), self.config.image_grid_pinpoints)
        down, across = height // tile, width // tile
        rows, columns = down * side, across * side
        mosaic = [
            [(y // side * across + x // side, y % side * side + x % side) for x in range(columns)] for y in range(rows)
        ]
        if image.width / image.height > columns / rows:
            cut = (rows - int(round(image.height * (columns / image.width), 7))) // 2
            mosaic = mosaic[cut : rows - cut]
        else:
            cut = (columns - int(round(image.width * (rows / image.height), 7))) // 2
            mosaic = [row[cut : columns - cut] for row in mosaic]
        return down * across, mosaic

    def image_features(self, image: Image.Image, plan: ItemPlan) -> Tensor:
        return self.survivors(image, plan)[0]

    @torch.no_grad()
    def survivors(self, image: Image.Image, plan: ItemPlan) -> tuple[Tensor, list[int]]:
        """(plan.kept, hidden), and the position of each in the image."""
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
        model = self.model.model
        seeded = plan.with_seed(crc32(pixels[0].numpy().tobytes())) if plan.method == "random" else plan
        states = model.vision_tower(pixels, output_hidden_states=True).hidden_states
        tiles = states[self.config.vision_feature_layer][:, 1:]
        _, mosaic = self.places(image)
        columns = len(mosaic[0])
        whole, source = self.reduced(tiles[0], seeded.grids[0])
        out, positions = list(model.multi_modal_projector(whole)), source.tolist()
        rest, source = self.reduced(torch.stack([tiles[1 + t, i] for row in mosaic for t, i in row]), seeded.grids[1])
        for y in range(len(mosaic)):
            row = self.geometry.tokens + y * (columns + 1)
            out += [*model.multi_modal_projector(rest[source // columns == y]), model.image_newline]
            positions += [row + int(place) % columns for place in source if place // columns == y] + [row + columns]
        order = sorted(range(len(out)), key=positions.__getitem__) if plan.keeps_positions else range(len(out))
        places = [positions[i] for i in order] if plan.keeps_positions else list(order)
        return torch.stack([out[i] for i in order]), places

    def reduced(self, grid: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """(n, C) -> (kept, C), and the place that each stands for."""
        tokens, source = after_tower(grid[None], torch.arange(len(grid))[None], plan)
        return tokens[0], source[0]


class KeepingNextReference(Keeping, NextReference):
    """`NextReference` with kept positions."""

    survivors = NextReference.survivors

    def generate(self, prompt: str, images: Any, reductions: Any, tokens: int, tail: Sequence[int] = ()) -> Answer:
        self.place(prompt, images, reductions)
        return super().generate(prompt, images, reductions, tokens, tail)
