"""Idefics3 and SmolVLM with reduced images in plain transformers; tiles are counted here, marks written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from tests.engine.tiles_reference import WithdrawingTilesReference


def tiling(width: int, height: int, side: int, longest: int) -> tuple[int, int]:
    """(rows, columns) of tiles: the longer side is made `longest`, the other one even, and both rounded up to tiles."""
    if width >= height:
        wide, high = longest, int(longest / (width / height))
        high += high % 2
    else:
        high, wide = longest, int(longest * (width / height))
        wide += wide % 2
    return -(-max(high, 1) // side), -(-max(wide, 1) // side)


class Idefics3Reference(WithdrawingTilesReference):
    """See `WithdrawingTilesReference`."""

    mark = "<image>"

    def __init__(self, path: Path, layer: int) -> None:
        super().__init__(path, layer)
        vision = self.config.vision_config
        self.tile_side, self.side = (
            vision.image_size,
            vision.image_size // vision.patch_size // self.config.scale_factor,
        )

    def decoder(self) -> Any:
        return self.model.model.text_model

    def pieces(self, image: Image.Image) -> list[str | int]:
        longest = self.processor.image_processor.size["longest_edge"]
        rows, columns = tiling(*image.size, self.tile_side, longest)
        pieces: list[str | int] = []
        if rows * columns > 1:
            for row in range(rows):
                for column in range(columns):
                    pieces += [f"<fake_token_around_image><row_{row + 1}_col_{column + 1}>", row * columns + column]
                pieces += ["\n"]
            pieces += ["\n"]
        tiles = sum(isinstance(piece, int) for piece in pieces)
        return [*pieces, "<fake_token_around_image><global-img>", tiles, "<fake_token_around_image>"]

    def pixels(self, image: Image.Image) -> Tensor:
        found: Tensor = self.processor.image_processor([[image]], return_tensors="pt")["pixel_values"][0]
        return found

    def features(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.model.model.get_image_features(pixels[None], return_dict=True).pooler_output
        return found
