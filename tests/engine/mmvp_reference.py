"""MMVP's LLaVA with token reduction: CLIP and decoder of transformers, DINOv2 and the rest in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from foldserve.reducers.item import ItemPlan, Layout, Part, plan_item
from foldserve.reducers.reduction import Reduction
from tests import mmvp_checkpoint
from tests.engine.keeping_reference import Answer, KeepingWithdrawingReference
from tests.engine.plain_tower import after_tower


class MmvpReference(KeepingWithdrawingReference):
    """Modifications to the reference: two towers, two projectors, their tokens written down place by place."""

    def __init__(self, path: Path, layer: int) -> None:
        super().__init__(path, layer)
        self.weights = load_file(path / "model.safetensors")

    def plan(self, reduction: dict[str, object]) -> ItemPlan:
        return plan_item(Reduction.parse(reduction), Layout((Part(self.geometry, count=2),)))

    def generate(self, prompt: str, images: Any, reductions: Any, tokens: int, tail: Sequence[int] = ()) -> Answer:
        return super().generate(prompt, images, reductions or [{}] * len(images), tokens, tail)

    @torch.no_grad()
    def survivors(self, image: Image.Image, plan: ItemPlan) -> tuple[Tensor, list[int]]:
        """(plan.kept, hidden), and the position of each in the image."""
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        seeded = plan.with_seed(crc32(pixels[0].numpy().tobytes())) if plan.method == "random" else plan
        clip = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        placed: list[tuple[int, Tensor]] = []
        for first, (name, features) in enumerate({"clip": clip, "dino": self.dino(pixels)}.items()):
            project, places = partial(self.project, name), torch.arange(features.shape[1])[None]
            tokens, source = after_tower(features, places, seeded.grids[0], project)
            placed += [(2 * place + first, embed) for place, embed in zip(source[0].tolist(), tokens[0], strict=True)]
        placed.sort(key=lambda it: it[0])
        positions = [place for place, _ in placed] if plan.keeps_positions else list(range(len(placed)))
        return torch.stack([embed for _, embed in placed]), positions

    def project(self, name: str, tokens: Tensor) -> Tensor:
        hidden = F.gelu(self.linear(f"multi_modal_projector.{name}.linear_1", tokens))
        return self.linear(f"multi_modal_projector.{name}.linear_2", hidden)

    def dino(self, pixels: Tensor) -> Tensor:
        """(1, 3, H, W) -> (1, patches, C)."""
        embeddings = "dino_tower.embeddings"
        patches = F.conv2d(pixels, *self.pair(f"{embeddings}.patch_embeddings.projection"), stride=14)
        x = torch.cat([self.weights[f"{embeddings}.cls_token"], patches.flatten(2).mT], dim=1)
        x = x + self.weights[f"{embeddings}.position_embeddings"]
        for i in range(mmvp_checkpoint.LAYERS):
            layer = f"dino_tower.encoder.layer.{i}"
            attended = self.attention(layer, self.norm(f"{layer}.norm1", x))
            x = x + self.weights[f"{layer}.layer_scale1.lambda1"] * attended
            inner = F.gelu(self.linear(f"{layer}.mlp.fc1", self.norm(f"{layer}.norm2", x)))
            x = x + self.weights[f"{layer}.layer_scale2.lambda1"] * self.linear(f"{layer}.mlp.fc2", inner)
        return x[:, 1:]

    def attention(self, layer: str, x: Tensor) -> Tensor:
        query, key, value = (
            self.linear(f"{layer}.attention.attention.{name}", x).view(*x.shape[:2], mmvp_checkpoint.HEADS, -1)
            for name in ("query", "key", "value")
        )
        weights = (torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5).softmax(-1)
        attended = torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2)
        return self.linear(f"{layer}.attention.output.dense", attended)

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, *self.pair(name))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *self.pair(name), eps=1e-6)
