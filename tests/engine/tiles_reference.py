"""Models whose images are tiles with text between them, in plain transformers: fp32, no KV cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.item import ItemPlan, Layout, Part, plan_item
from foldserve.reducers.reduction import Reduction
from tests.engine.keeping_reference import Answer, Placed
from tests.engine.plain_tower import after_tower
from tests.engine.withdrawal.reference import withdrawn_forward


class Sequenced(NamedTuple):
    """A prompt.

    Attributes:
        embeds: (tokens, hidden).
        places: rotary position of each token.
        following: the next one.
        rows: of the tokens of each image, beside its plan.
        runs: first and last row of each run of an image's tokens.
    """

    embeds: Tensor
    places: list[int]
    following: int
    rows: list[tuple[ItemPlan, list[int]]]
    runs: list[tuple[int, int]]


class TilesReference(ABC):
    """Takes a checkpoint.

    Attributes:
        mark: what stands for an image in a prompt.
        side: of a tile, in tokens.
    """

    mark: str
    side: int

    def __init__(self, path: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(path)
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        self.config = self.model.config

    @abstractmethod
    def pieces(self, image: Image.Image) -> list[str | int]:
        """Of the prompt: text, and numbers of tiles."""

    @abstractmethod
    def pixels(self, image: Image.Image) -> Tensor:
        """(tiles, 3, H, W)"""

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """(tiles, 3, H, W) -> (tiles, tokens, hidden), as the decoder would get them."""

    @abstractmethod
    def greedy(self, prompt: Sequenced, tokens: int) -> Answer:
        """Greedy tokens, and the log-probability of each."""

    @torch.inference_mode()
    def generate(
        self, prompt: str, images: Sequence[Image.Image], reductions: Sequence[Mapping[str, Any]], tokens: int
    ) -> Answer:
        return self.greedy(self.sequence(prompt, images, reductions), tokens)

    @torch.inference_mode()
    def sequence(
        self, prompt: str, images: Sequence[Image.Image], reductions: Sequence[Mapping[str, Any]]
    ) -> Sequenced:
        embeds: list[Tensor] = []
        places: list[int] = []
        following = 0
        rows: list[tuple[ItemPlan, list[int]]] = []
        runs: list[tuple[int, int]] = []
        given = iter(zip(images, reductions, strict=True))
        texts = prompt.split(self.mark)
        pieces: list[str | tuple[ItemPlan, Tensor, Tensor]] = [texts[0]]
        for after in texts[1:]:
            image, asked = next(given)
            plan, tiles = self.reduced(image, asked)
            rows.append((plan, []))
            pieces += [piece if isinstance(piece, str) else (plan, *tiles[piece]) for piece in self.pieces(image)]
            pieces.append(after)
        images_done = -1
        last: ItemPlan | None = None
        for piece in self.joined(pieces):
            if isinstance(piece, list):
                embeds += self.model.get_input_embeddings()(torch.tensor(piece, dtype=torch.int64))
                places += range(following, following + len(piece))
                following += len(piece)
                continue
            plan, tile, source = piece
            images_done += plan is not last
            last = plan
            own = range(len(embeds), len(embeds) + len(tile))
            rows[images_done][1].extend(own)
            runs.append((own[0], own[-1]))
            embeds += tile
            places += [following + place for place in (source.tolist() if plan.keeps_positions else range(len(tile)))]
            following += self.side**2 if plan.keeps_positions else len(tile)
        return Sequenced(torch.stack(embeds), places, following, rows, runs)

    def joined(self, pieces: Sequence[Any]) -> list[Any]:
        """Text between tiles as token ids, tiles as they are."""
        tokenizer = self.processor.tokenizer
        out: list[Any] = []
        for is_text, group in groupby(pieces, key=lambda piece: isinstance(piece, str)):
            if is_text:
                out.append(tokenizer("".join(group), add_special_tokens=not out)["input_ids"])
            else:
                out += group
        return out

    def reduced(self, image: Image.Image, asked: Mapping[str, Any]) -> tuple[ItemPlan, list[tuple[Tensor, Tensor]]]:
        """A plan, an object for each image, and what it leaves of each tile, and which tokens these were."""
        pixels, n = self.pixels(image), self.side**2
        tile = VisionGeometry(n, (self.side, self.side))
        plan = plan_item(Reduction.parse(dict(asked)), Layout((Part(tile, len(pixels)),), (len(pixels),)))
        plan = plan.with_seed(crc32(pixels[0].contiguous().numpy().tobytes()))
        left = [after_tower(one[None], torch.arange(n)[None], plan.grids[0]) for one in self.features(pixels)]
        tiles = [(tokens[0], source[0]) for tokens, source in left]
        if plan.keeps_positions:
            tiles = [(tokens[source.argsort()], source.sort().values) for tokens, source in tiles]
        return plan, tiles


class WithdrawingTilesReference(TilesReference):
    """Tokens of images that withdraw are gone from layer K on, of decoders whose layers are named as Llama's."""

    def __init__(self, path: Path, layer: int) -> None:
        super().__init__(path)
        self.layer = layer
        self.decoder().rotary_emb = self.placed = Placed(self.decoder().rotary_emb)

    def decoder(self) -> Any:
        return self.model.model.language_model

    def greedy(self, prompt: Sequenced, tokens: int) -> Answer:
        embeds, kept = prompt.embeds, torch.ones(len(prompt.embeds), dtype=torch.bool)
        for plan, rows in prompt.rows:
            kept[rows] = plan.decoder != "withdraw"
        self.placed.places, self.placed.following = prompt.places, prompt.following
        out: list[int] = []
        logprobs: list[float] = []
        for _ in range(tokens):
            hidden = withdrawn_forward(self.decoder(), embeds, kept, self.layer)
            distribution = self.model.lm_head(hidden[-1]).log_softmax(-1)
            out.append(int(distribution.argmax()))
            logprobs.append(float(distribution[out[-1]]))
            embeds = torch.cat([embeds, self.model.get_input_embeddings()(torch.tensor([out[-1]]))])
            kept = torch.cat([kept, torch.ones(1, dtype=torch.bool)])
        return out, logprobs
