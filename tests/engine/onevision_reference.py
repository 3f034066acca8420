"""LLaVA-OneVision with token reduction in plain PyTorch and transformers: images as LLaVA-NeXT's, and videos."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt, sqrt
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaOnevisionForConditionalGeneration

from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.item import ItemPlan, Layout, Part
from tests.engine.keeping_reference import Answer, Keeping
from tests.engine.next_reference import NextReference
from tests.reducers.naive import ACROSS_FRAMES

Video = np.ndarray[Any, Any]
"""(frames, height, width, 3) bytes."""


class OnevisionReference(NextReference):
    """Modifications: all is projected first; large mosaics are shrunk; frames are pooled, with a newline at the end."""

    model_class: Any = LlavaOnevisionForConditionalGeneration

    def generate(self, prompt: str, images: Any, reductions: Any, tokens: int, tail: Sequence[int] = ()) -> Answer:
        """`images` are images and videos, in the order of the prompt."""
        return super().generate(prompt.replace("<video>", "<image>"), images, reductions, tokens, tail)

    def layout(self, image: Any) -> Layout:
        if isinstance(image, np.ndarray):
            return self.of_squares((len(image), 0), isqrt(self.geometry.tokens))
        return super().layout(image)

    def of_squares(self, shape: tuple[int, ...], side: int) -> Layout:
        if shape[1]:
            return super().of_squares(shape, side)
        half = (side + 1) // 2
        return Layout(
            (Part(VisionGeometry(half**2, (half, half)), shape[0], separators=1, can_join=True),), shape, self
        )

    def base(self, shape: tuple[int, ...]) -> Layout | None:
        return super().base(shape) if shape[1] else None

    def mosaic_grid(self, shape: tuple[int, ...], side: int) -> tuple[int, int]:
        rows, columns = super().mosaic_grid(shape, side)
        ratio = sqrt(rows * columns / (9 * side**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)

    @torch.no_grad()
    def survivors(self, image: Any, plan: ItemPlan) -> tuple[Tensor, list[int]]:
        if not isinstance(image, np.ndarray):
            return super().survivors(image, plan)
        pixels = self.processor.video_processor(image, return_tensors="pt")["pixel_values_videos"][0]
        seeded = plan.with_seed(crc32(pixels[0].numpy().tobytes())) if plan.is_seeded else plan
        out, positions, frames = [], [], [self.pooled(tokens) for tokens in self.tiles(pixels, plan)]
        if choose := ACROSS_FRAMES.get(plan.grids[0].method):
            whole = torch.cat(frames)
            positions = choose(whole, len(frames), plan.grids[0].kept)
            out = [whole[i] for i in positions]
            frames = []
        for i, frame in enumerate(frames):
            left, source = self.reduced(frame, seeded.grids[0])
            out += [*left]
            positions += (source + i * len(frame)).tolist()
        out, positions = [*out, self.model.model.image_newline], [*positions, plan.encoded - 1]
        order = sorted(range(len(out)), key=positions.__getitem__) if plan.keeps_positions else range(len(out))
        places = [positions[i] for i in order] if plan.keeps_positions else list(order)
        return torch.stack([out[i] for i in order]), places

    def pooled(self, tokens: Tensor) -> Tensor:
        """(n, C) of a square -> the same of half the side."""
        side = isqrt(len(tokens))
        half = (side + 1) // 2
        frame = F.interpolate(tokens.view(side, side, -1).permute(2, 0, 1)[None], (half, half), mode="bilinear")
        return frame[0].flatten(1).mT

    def tiles(self, pixels: Tensor, plan: ItemPlan) -> Tensor:
        return super().project(super().tiles(pixels, plan))

    def mosaic(self, tiles: Tensor, shape: tuple[int, ...]) -> Tensor:
        mosaic, side = super().mosaic(tiles, shape), isqrt(tiles.shape[1])
        if (wanted := self.mosaic_grid(shape, side)) == mosaic.shape[:2]:
            return mosaic
        return F.interpolate(mosaic.permute(2, 0, 1)[None], wanted, mode="bilinear")[0].permute(1, 2, 0)

    def project(self, tokens: Tensor) -> Tensor:
        return tokens  # has been


class KeepingOnevisionReference(Keeping, OnevisionReference):
    """`OnevisionReference` with kept positions."""

    survivors = OnevisionReference.survivors

    def __init__(self, path: Any, layer: int) -> None:
        super().__init__(path, layer)

    def generate(self, prompt: str, images: Any, reductions: Any, tokens: int, tail: Sequence[int] = ()) -> Answer:
        self.place(prompt.replace("<video>", "<image>"), images, reductions)
        return super().generate(prompt, images, reductions, tokens, tail)
