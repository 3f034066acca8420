"""InternVL with reduced images in plain transformers: fp32, no KV cache; tiles are cut and counted here.

The model is transformers' in Hugging Face's layout, whichever layout is served.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, InternVLForConditionalGeneration

from foldserve.reducers.geometry import Stage, VisionGeometry
from foldserve.reducers.item import ItemPlan, Layout, Part, plan_item
from foldserve.reducers.reduction import Reduction
from tests.engine.keeping_reference import Answer, Placed
from tests.engine.plain_tower import after_tower
from tests.engine.withdrawal.reference import Merge, chosen, last_row, withdrawn_forward

Film = NDArray[np.uint8]
"""(frames, height, width, 3)"""


def tiling(width: int, height: int, side: int, most: int) -> tuple[int, int]:
    """(columns, rows) of the tiles, most like the image in shape; of equal ones the larger, if it is not too large."""
    best = (1, 1)
    grids = sorted(
        ((x, y) for x in range(1, most + 1) for y in range(1, most + 1) if x * y <= most), key=lambda it: it[0] * it[1]
    )
    for x, y in grids:
        off, least = abs(width / height - x / y), abs(width / height - best[0] / best[1])
        if off < least or (off == least and width * height > 0.5 * side * side * x * y):
            best = (x, y)
    return best


@dataclass(frozen=True)
class Tiles:
    """Of an image: see `Tiling`."""

    grid: VisionGeometry

    @property
    def tile(self) -> VisionGeometry:
        return replace(self.grid, stages=frozenset({Stage.AFTER_TOWER, Stage.DECODER}), any_resolution=True)

    def base(self, shape: tuple[int, ...]) -> Layout:
        return Layout((Part(self.grid),), shape, self)

    def of_squares(self, shape: tuple[int, ...], side: int) -> Layout:
        raise NotImplementedError


@dataclass
class Item:
    """Of a prompt: what is left of an image, or of each frame of a video.

    Attributes:
        runs: (kept, hidden) of each run of placeholders.
        places: of each run, its tokens' positions from its first.
        taken: positions of a run, up to the text behind it.
    """

    plan: ItemPlan
    runs: list[Tensor]
    places: list[list[int]]
    taken: int


class InternReference:
    """Takes a checkpoint in Hugging Face's layout, and the layer K from which on tokens may be gone.

    Args:
        chat: the model is served in OpenGVLab's layout, which has other means of pixels and no line between frames.
    """

    def __init__(self, path: Path, layer: int, *, chat: bool, most_tiles: int) -> None:
        self.layer, self.chat, self.most_tiles = layer, chat, most_tiles
        self.processor = AutoProcessor.from_pretrained(path)
        self.model = InternVLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
        self.config = self.model.config
        self.side = self.config.vision_config.image_size[0]
        grid = self.side // self.config.vision_config.patch_size[0] // 2
        self.tile = VisionGeometry(grid**2, (grid, grid))
        self.decoder = self.model.model.language_model
        self.decoder.rotary_emb = self.placed = Placed(self.decoder.rotary_emb)

    @torch.inference_mode()
    def generate(
        self,
        prompt: str,
        images: Sequence[Image.Image],
        reductions: Sequence[Mapping[str, Any]],
        tokens: int,
        films: Sequence[tuple[Film, Mapping[str, Any]]] = (),
    ) -> Answer:
        """Greedy tokens, and the log-probability of each; `films` with what is asked of each."""
        pictures = iter([self.image(*each) for each in zip(images, reductions, strict=True)])
        videos = iter([self.film(*each) for each in films])
        embeds: list[Tensor] = []
        places: list[int] = []
        following = 0
        rows_of: list[tuple[ItemPlan, list[int]]] = []

        def text(content: str) -> None:
            nonlocal following
            ids = self.processor.tokenizer(content, add_special_tokens=False)["input_ids"]
            embeds.extend(self.model.get_input_embeddings()(torch.tensor(ids, dtype=torch.int64)))
            places.extend(range(following, following + len(ids)))
            following += len(ids)

        for piece in re.split(r"(<image>|<video>)", prompt):
            if piece not in ("<image>", "<video>"):
                text(piece)
                continue
            item = next(pictures if piece == "<image>" else videos)
            rows: list[int] = []
            for i, (run, own) in enumerate(zip(item.runs, item.places, strict=True)):
                frame = f"Frame{i + 1}: " if piece == "<video>" else ""
                text(("\n" if i and not self.chat else "") + frame + "<img>")
                rows += range(len(embeds), len(embeds) + len(run))
                embeds.extend(run)
                places += [following + place for place in own]
                following += item.taken
                text("</img>")
            rows_of.append((item.plan, rows))
        self.placed.places, self.placed.following = places, following
        return self._greedy(torch.stack(embeds), rows_of, tokens)

    def image(self, image: Image.Image, asked: Mapping[str, Any]) -> Item:
        return self.reduced(self.pixels(image), asked, together=True)

    def film(self, film: Film, asked: Mapping[str, Any]) -> Item:
        if self.chat:
            pixels = torch.stack([self._normalized(Image.fromarray(frame)) for frame in film])
        else:
            pixels = self.processor.video_processor(videos=[film], return_tensors="pt")["pixel_values_videos"][0]
        return self.reduced(pixels, asked, together=False)

    def reduced(self, pixels: Tensor, asked: Mapping[str, Any], *, together: bool) -> Item:
        """Tiles (T, 3, H, W), each reduced by itself; `together` in one run."""
        count, n = len(pixels), self.tile.tokens
        layout = Layout((Part(self.tile, count),), (count,), Tiles(self.tile) if together else None)
        plan = plan_item(Reduction.parse(dict(asked)), layout)
        first = count - 1 if plan.base_only else 0  # the whole image is the last tile
        plan = plan.with_seed(crc32(pixels[0].numpy().tobytes())) if plan.is_seeded else plan
        features = self.model.model.get_image_features(pixels[first:], return_dict=True).pooler_output
        each = [after_tower(tile[None], torch.arange(n)[None], plan.grids[0]) for tile in features]
        tiles, sources = [left[0] for left, _ in each], [source[0].tolist() for _, source in each]
        if together:
            places = [i * n + place for i, own in enumerate(sources, first) for place in own]
            tiles, sources = [torch.cat(tiles)], [places]
        if not plan.keeps_positions:
            kept = len(tiles[0])
            return Item(plan, tiles, [list(range(kept))] * len(tiles), kept)
        orders = [sorted(range(len(own)), key=own.__getitem__) for own in sources]
        runs = [tile[order] for tile, order in zip(tiles, orders, strict=True)]
        return Item(plan, runs, [sorted(own) for own in sources], n * count if together else n)

    def pixels(self, image: Image.Image) -> Tensor:
        """(tiles, 3, side, side), the whole image last."""
        columns, rows = tiling(image.width, image.height, self.side, self.most_tiles)
        if not self.chat:
            found: Tensor = self.processor.image_processor(
                image, crop_to_patches=True, max_patches=self.most_tiles, return_tensors="pt"
            )["pixel_values"]
            assert len(found) == columns * rows + (columns * rows > 1)
            return found
        large = image.resize((columns * self.side, rows * self.side))
        corners = [(x * self.side, y * self.side) for y in range(rows) for x in range(columns)]
        tiles = [large.crop((x, y, x + self.side, y + self.side)) for x, y in corners]
        return torch.stack([self._normalized(tile) for tile in [*tiles, *([image] if len(tiles) > 1 else [])]])

    def _normalized(self, tile: Image.Image) -> Tensor:
        """By the means of ImageNet."""
        small = np.asarray(tile.convert("RGB").resize((self.side, self.side), Image.Resampling.BICUBIC), np.float32)
        mean, std = (np.array(each, np.float32) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return torch.from_numpy((small / np.float32(255) - mean) / std).permute(2, 0, 1).contiguous()

    def _greedy(self, embeds: Tensor, rows_of: Sequence[tuple[ItemPlan, list[int]]], tokens: int) -> Answer:
        kept = torch.ones(len(embeds), dtype=torch.bool)
        merges: list[Merge] = []
        scores = last_row(self.decoder, embeds, self.layer)
        for plan, rows in rows_of:
            if plan.decoder == "withdraw":
                kept[rows] = False
            elif plan.decoder != "none":
                gone, merge = chosen(plan.decoder, rows, scores[rows].tolist(), plan.kept - plan.kept_deep)
                kept[gone] = False
                merges += merge
        out: list[int] = []
        logprobs: list[float] = []
        for _ in range(tokens):
            hidden = withdrawn_forward(self.decoder, embeds, kept, self.layer, merges)
            distribution = self.model.lm_head(hidden[-1]).log_softmax(-1)
            best = int(distribution.argmax())
            out.append(best)
            logprobs.append(float(distribution[best]))
            embeds = torch.cat([embeds, self.model.get_input_embeddings()(torch.tensor([best]))])
            kept = torch.cat([kept, torch.ones(1, dtype=torch.bool)])
        return out, logprobs
