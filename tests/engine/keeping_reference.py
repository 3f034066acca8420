"""The plain references with kept positions, which take each row's rotary position from a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from PIL import Image
from torch import Tensor, nn

from foldserve.reducers.item import ItemPlan
from tests.engine.reference import Reference
from tests.engine.withdrawal.reference import WithdrawingReference

Answer = tuple[list[int], list[float]]


class Placed(nn.Module):
    """Rotary embedding of a decoder that is given the numbers of rows instead of positions."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary
        self.places: list[int] = []
        self.following = 0

    def of(self, row: int) -> int:
        """Position of a row; those behind the prompt count on."""
        return self.places[row] if row < len(self.places) else self.following + row - len(self.places)

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        return self.rotary(x, torch.tensor([[self.of(row) for row in position_ids[0].tolist()]]))


class Keeping(Reference):
    """Modifications: tokens of an image whose plan keeps positions come in the order of these, and have them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        decoder = self.model.model.language_model
        decoder.rotary_emb = self.placed = Placed(decoder.rotary_emb)

    def image_features(self, image: Image.Image, plan: ItemPlan) -> Tensor:
        return self.survivors(image, plan)[0]

    @torch.no_grad()
    def survivors(self, image: Image.Image, plan: ItemPlan) -> tuple[Tensor, list[int]]:
        """Projected vision tokens (plan.kept, hidden), and the position of each in the image."""
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        seeded = plan.with_seed(crc32(pixels[0].numpy().tobytes())) if plan.method == "random" else plan
        entering = None if plan.cells is None else plan.cells.places()
        projector = self.model.model.multi_modal_projector
        tokens, source = self.tower.survivors(pixels, seeded.grids[0], projector, entering)
        if not plan.keeps_positions:
            return tokens[0], list(range(plan.kept))
        order = sorted(range(plan.kept), key=source[0].tolist().__getitem__)
        return tokens[0, order], source[0, order].tolist()

    def place(self, prompt: str, images: Sequence[Image.Image], reductions: Sequence[dict[str, object]]) -> list[int]:
        """Writes the table for a prompt, and returns its positions: text goes on from the full length of an image."""
        remaining = list(zip(images, self.plans(images, reductions), strict=True))[::-1]
        places: list[int] = []
        following = 0
        for token in self.processor.tokenizer(prompt)["input_ids"]:
            if token == self.config.image_token_index:
                image, plan = remaining.pop()
                places += [following + position for position in self.survivors(image, plan)[1]]
                following += plan.encoded if plan.keeps_positions else plan.kept
            else:
                places.append(following)
                following += 1
        self.placed.places, self.placed.following = places, following
        return places


class KeepingReference(Keeping):
    """`Reference` with kept positions."""

    def generate(
        self, prompt: str, images: Sequence[Image.Image], reductions: Sequence[dict[str, object]], tokens: int
    ) -> Answer:
        self.place(prompt, images, reductions)
        return super().generate(prompt, images, reductions, tokens)


class KeepingWithdrawingReference(Keeping, WithdrawingReference):
    """`WithdrawingReference` with kept positions."""

    def __init__(self, path: Path, layer: int) -> None:
        super().__init__(path, layer)

    def generate(
        self,
        prompt: str,
        images: Sequence[Image.Image],
        reductions: Sequence[dict[str, object]],
        tokens: int,
        tail: Sequence[int] = (),
    ) -> Answer:
        self.place(prompt, images, reductions)
        self.placed.places += range(self.placed.following, self.placed.following + len(tail))
        self.placed.following += len(tail)
        return WithdrawingReference.generate(self, prompt, images, reductions, tokens, tail)
