"""Gemma-3 with reduced images in plain transformers: masks are laid out here, crops are counted here."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tests.engine.keeping_reference import Answer
from tests.engine.tiles_reference import Sequenced, TilesReference


def crops(width: int, height: int, least: int, most: int = 4, from_ratio: float = 1.2) -> int:
    """Parts that a long image is cut into, of at least so many pixels."""
    long, short = max(width, height), min(width, height)
    if long / short < from_ratio:
        return 0
    count = min(most, max(2, min(long // least, floor(long / short + 0.5))))
    return 0 if min(-(-long // count), short) < least else count


class Gemma3Reference(TilesReference):
    """Of a checkpoint whose images are cut into crops of at least `least` pixels; 0: they are not.

    Args:
        both_ways: an image's tokens attend to each other in both directions, as on a GPU; vLLM's CPU backend does not
            do so.
    """

    mark = "<start_of_image>"

    def __init__(self, path: Path, *, least: int = 0, both_ways: bool = False) -> None:
        super().__init__(path)
        self.least, self.both_ways = least, both_ways
        self.side = int(self.config.mm_tokens_per_image**0.5)
        self.decoder = self.model.model.language_model

    def pieces(self, image: Image.Image) -> list[str | int]:
        def sequence(tile: int) -> list[str | int]:
            return ["\n\n<start_of_image>", tile, "<end_of_image>\n\n"]

        count = crops(*image.size, self.least) if self.least else 0
        if not count:
            return sequence(0)
        pieces = ["Here is the original image ", *sequence(0), " and here are some crops to help you see better "]
        for i in range(count):
            pieces += [*([" "] if i else []), *sequence(1 + i)]
        return pieces

    def pixels(self, image: Image.Image) -> Tensor:
        process = self.processor.image_processor
        if not self.least:
            found: Tensor = process(image, return_tensors="pt")["pixel_values"]
            return found
        options = {"pan_and_scan_max_num_crops": 4, "pan_and_scan_min_ratio_to_activate": 1.2}
        options |= {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": self.least}
        found = process(image, return_tensors="pt", **options)["pixel_values"]
        return found

    def features(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.model.model.get_image_features(pixels, return_dict=True).pooler_output
        return found

    def greedy(self, prompt: Sequenced, tokens: int) -> Answer:
        embeds, places = prompt.embeds, list(prompt.places)
        out: list[int] = []
        logprobs: list[float] = []
        for i in range(tokens):
            hidden = self._forward(embeds, places, prompt.runs if self.both_ways else ())
            distribution = self.model.lm_head(hidden).log_softmax(-1)
            out.append(int(distribution.argmax()))
            logprobs.append(float(distribution[out[-1]]))
            embeds = torch.cat([embeds, self.model.get_input_embeddings()(torch.tensor([out[-1]]))])
            places.append(prompt.following + i)
        return out, logprobs

    def _forward(self, embeds: Tensor, places: Sequence[int], runs: Sequence[tuple[int, int]]) -> Tensor:
        """(hidden,) of the last token."""
        decoder = self.decoder
        rows = torch.arange(len(embeds))
        distance = rows[:, None] - rows
        masks = {"full_attention": distance >= 0}
        masks["sliding_attention"] = masks["full_attention"] & (distance < decoder.config.sliding_window)
        for mask in masks.values():
            for first, last in runs:
                mask[first : last + 1, first : last + 1] = True
        hidden, positions = embeds[None], torch.tensor([places])
        for block, kind in zip(decoder.layers, decoder.config.layer_types, strict=True):
            rotary = decoder.rotary_emb(hidden, positions, kind)
            hidden = block(hidden, position_embeddings=rotary, attention_mask=masks[kind][None, None])
        normed: Tensor = decoder.norm(hidden)[0, -1]
        return normed


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """(tokens, heads, d) of queries, of fewer heads of keys and values, (tokens, tokens) bool -> (tokens, heads, d)"""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)
