"""Video-LLaVA and LLaVA-NeXT-Video with token reduction in plain PyTorch and transformers, frame by frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaNextVideoForConditionalGeneration, VideoLlavaForConditionalGeneration

from foldserve.reducers.folder import Scale, folder
from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.item import ItemPlan, Layout, Part, plan_item
from foldserve.reducers.reduction import Reduction
from tests.engine.keeping_reference import Answer, Keeping
from tests.engine.plain_tower import after_tower
from tests.engine.withdrawal.reference import WithdrawingReference
from tests.reducers.naive import ACROSS_FRAMES

Video = np.ndarray[Any, Any]
"""(frames, height, width, 3) bytes."""


class VideoLlavaReference(WithdrawingReference):
    """Modifications to the reference: a frame is a grid behind its class token, which stays."""

    model_class: Any = VideoLlavaForConditionalGeneration
    tower_name = "image_tower"
    first = 1
    """Tokens in front of each frame's grid."""

    def generate(self, prompt: str, images: Any, reductions: Any, tokens: int, tail: Sequence[int] = ()) -> Answer:
        """`images` are images and videos, in the order of the prompt."""
        return super().generate(prompt.replace("<video>", "<image>"), images, reductions, tokens, tail)

    def plans(self, images: Sequence[Any], reductions: Sequence[dict[str, object]]) -> list[ItemPlan]:
        each = zip(images, reductions, strict=True)
        return [plan_item(Reduction.parse(reduction), self.layout(image)) for image, reduction in each]

    def layout(self, image: Any) -> Layout:
        if not isinstance(image, np.ndarray):
            return Layout((Part(self.geometry),), (0,))
        grid, count = (self.side, self.side), len(image)
        frame = VisionGeometry(self.side**2, grid, behind_class_token=bool(self.first))
        return Layout((Part(frame, count, separators=self.first * count, can_join=True),), (count,))

    @property
    def side(self) -> int:
        """Of a frame, in tokens."""
        return int(self.config.vision_config.image_size // self.config.vision_config.patch_size)

    def image_features(self, image: Any, plan: ItemPlan) -> Tensor:
        return self.survivors(image, plan)[0]

    @torch.no_grad()
    def survivors(self, image: Any, plan: ItemPlan) -> tuple[Tensor, list[int]]:
        """(plan.kept, hidden), and the position of each in the image or video."""
        if isinstance(image, np.ndarray):
            pixels = self.processor.video_processor(image, return_tensors="pt")["pixel_values_videos"][0]
            left, places = self.film(pixels, self.seeded(plan, pixels))
        else:
            pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values_images"]
            grid_plan = self.seeded(plan, pixels).grids[0]
            tokens, source = self.tower.survivors(pixels, grid_plan, self.model.model.multi_modal_projector)
            left, places = [*tokens[0]], source[0].tolist()
        order = sorted(range(len(left)), key=places.__getitem__) if plan.keeps_positions else range(len(left))
        found = [places[i] for i in order] if plan.keeps_positions else list(order)
        return torch.stack([left[i] for i in order]), found

    def seeded(self, plan: ItemPlan, pixels: Tensor) -> ItemPlan:
        return plan.with_seed(crc32(pixels[0].numpy().tobytes())) if plan.is_seeded else plan

    def film(self, pixels: Tensor, plan: ItemPlan) -> tuple[list[Tensor], list[int]]:
        out: list[Tensor] = []
        places: list[int] = []
        frames, project = self.frames(pixels), self.model.model.multi_modal_projector
        choose = ACROSS_FRAMES.get(plan.grids[0].method)
        stay = choose(frames[:, self.first :].flatten(0, 1), len(frames), plan.grids[0].kept) if choose else []
        for i, frame in enumerate(frames):
            grid, start = frame[self.first :], i * len(frame)
            if choose:
                own = [*range(self.first), *(self.first + j % len(grid) for j in stay if j // len(grid) == i)]
                out += [*project(frame[own])]
                places += [start + j for j in own]
                continue
            if self.first and True in plan.grids[0].options:  # `match_class_token`
                scale: Scale = "official" if "official" in plan.grids[0].options else "none"
                matched = folder(frame[None], plan.grids[0].folds, scale=scale, class_token=True)
                out += [*project(matched.tokens[0])]
                places += (matched.source[0] + start).tolist()
                continue
            left, source = after_tower(grid[None], torch.arange(len(grid))[None], plan.grids[0], project)
            out += [*project(frame[: self.first]), *left[0]]
            places += [*range(start, start + self.first), *(source[0] + start + self.first).tolist()]
        return out, places

    def frames(self, pixels: Tensor) -> Tensor:
        """(frames, 3, H, W) -> (frames, tokens, C)"""
        tower = self.model.model.video_tower
        states: Tensor = tower(pixels, output_hidden_states=True).hidden_states[self.config.vision_feature_layer]
        return states


class LlavaNextVideoReference(VideoLlavaReference):
    """Modifications: frames are pooled, and nothing stands in front of them."""

    model_class: Any = LlavaNextVideoForConditionalGeneration
    tower_name = "vision_tower"
    first = 0

    @property
    def side(self) -> int:
        return super().side // 2

    def frames(self, pixels: Tensor) -> Tensor:
        tower, side = self.model.model.vision_tower, super().side
        states = tower(pixels, output_hidden_states=True).hidden_states[self.config.vision_feature_layer]
        grids = states[:, 1:].view(len(states), side, side, -1).permute(0, 3, 1, 2)
        return F.avg_pool2d(grids, 2).flatten(2).mT


class KeepingVideoReference(Keeping, VideoLlavaReference):
    """`VideoLlavaReference` with kept positions."""

    survivors = VideoLlavaReference.survivors

    def __init__(self, path: Any, layer: int) -> None:
        super().__init__(path, layer)

    def generate(self, prompt: str, images: Any, reductions: Any, tokens: int, tail: Sequence[int] = ()) -> Answer:
        self.place(prompt.replace("<video>", "<image>"), images, reductions)
        return super().generate(prompt, images, reductions, tokens, tail)


class KeepingNextVideoReference(KeepingVideoReference, LlavaNextVideoReference):
    """`LlavaNextVideoReference` with kept positions."""
