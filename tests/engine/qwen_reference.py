"""Qwen-VL with reduced images in plain transformers: fp32, no KV cache, and no code of foldserve's.

FOLDER is written as loops over tokens, positions as loops over a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

Answer = tuple[list[int], list[float]]
Place = tuple[int, int, int]


@dataclass
class Left:
    """What is left of an image.

    Attributes:
        levels: (kept, hidden) each: the tokens, then deepstack levels.
        places: (0, row, column) of each.
        taken: positions up to the text behind the image.
    """

    levels: list[Tensor]
    places: list[Place]
    taken: int


class QwenReference:
    def __init__(self, path: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(path)
        self.config = self.model.config
        self.token = self.config.vision_config.patch_size * self.config.vision_config.spatial_merge_size

    @torch.inference_mode()
    def generate(
        self, prompt: str, images: Sequence[Image.Image], reductions: Sequence[Mapping[str, Any]], tokens: int
    ) -> Answer:
        """Greedy tokens, and the log-probability of each."""
        waiting = [self.left(image, asked) for image, asked in zip(images, reductions, strict=True)]
        levels = [torch.cat(level) for level in zip(*(left.levels for left in waiting), strict=True)]
        ids: list[int] = []
        places: list[Place] = []
        is_vision: list[bool] = []
        following = 0
        for token in self.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]:
            if token != self.config.image_token_id:
                ids.append(token)
                places.append((following,) * 3)
                is_vision.append(False)
                following += 1
                continue
            image = waiting.pop(0)
            ids += [token] * len(image.places)
            places += [(t + following, y + following, x + following) for t, y, x in image.places]
            is_vision += [True] * len(image.places)
            following += image.taken
        return self._greedy(ids, places, is_vision, levels, following, tokens)

    def left(self, image: Image.Image, asked: Mapping[str, Any]) -> Left:
        method, positions = asked.get("method", "folder"), asked.get("positions")
        rows, columns = self._grid(image)
        if method == "downsample":
            (less, fewer), whole = asked["expected_grid"], (rows, columns)
            levels, _ = self._encode(image.resize((fewer * self.token, less * self.token), 3), do_resize=False)
            if positions == "keep":
                centres = [
                    (0, (2 * y + 1) * whole[0] // (2 * less), (2 * x + 1) * whole[1] // (2 * fewer))
                    for y in range(less)
                    for x in range(fewer)
                ]
                return Left(levels, centres, max(whole))
            return Left(levels, _raster(less, fewer), max(less, fewer))
        levels, seed = self._encode(image)
        n = rows * columns
        removed = int(n * asked.get("ratio", 0.0)) if "keep_tokens" not in asked else max(0, n - asked["keep_tokens"])
        if not removed:
            return Left(levels, _raster(rows, columns), max(rows, columns))
        if method == "pool":
            return self._pooled(levels, (rows, columns), n - removed, positions)
        if method == "folder":
            groups = folder_groups(levels[0].numpy(), removed)
        else:
            assert method == "random"
            drawn = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: n - removed]
            groups = [(int(i), [int(i)]) for i in drawn.sort().values]
        levels = [torch.stack([level[members].mean(0) for _, members in groups]) for level in levels]
        if positions == "renumber":
            return Left(levels, [(i, i, i) for i in range(len(groups))], len(groups))
        return Left(levels, [(0, i // columns, i % columns) for i, _ in groups], max(rows, columns))

    def _pooled(self, levels: list[Tensor], grid: tuple[int, int], most: int, positions: str | None) -> Left:
        """The smallest windows that leave at most so many; the last of a row or column may be smaller."""
        rows, columns = grid
        k = next(k for k in range(2, max(grid) + 1) if -(-rows // k) * -(-columns // k) <= most)
        down, across = -(-rows // k), -(-columns // k)
        windows: list[list[int]] = [[] for _ in range(down * across)]
        for i in range(rows * columns):
            windows[i // columns // k * across + i % columns // k].append(i)
        pooled = [torch.stack([level[window].mean(0) for window in windows]) for level in levels]
        if positions == "keep":
            return Left(pooled, [(0, w[0] // columns, w[0] % columns) for w in windows], max(grid))
        return Left(pooled, _raster(down, across), max(down, across))

    def _grid(self, image: Image.Image) -> tuple[int, int]:
        _, height, width = self.processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"][0]
        merge = self.config.vision_config.spatial_merge_size
        return int(height) // merge, int(width) // merge

    def _encode(self, image: Image.Image, **options: Any) -> tuple[list[Tensor], int]:
        """Tokens and deepstack levels, and the seed of a random choice: of the image's bytes."""
        process = self.processor.image_processor
        inputs = process(images=[image], return_tensors="pt", **options)
        found = self.model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"], return_dict=True)
        raw = process(images=[image], return_tensors="pt", do_rescale=False, do_normalize=False, **options)
        seed = crc32(raw["pixel_values"].float().contiguous().numpy().data)
        return [found.pooler_output, *(getattr(found, "deepstack_features", None) or [])], seed

    def _greedy(
        self,
        ids: list[int],
        places: list[Place],
        is_vision: list[bool],
        levels: list[Tensor],
        following: int,
        tokens: int,
    ) -> Answer:
        decoder, head = self.model.model.language_model, self.model.lm_head
        embeds, mask = decoder.embed_tokens(torch.tensor(ids)), torch.tensor(is_vision)
        if levels:
            embeds[mask] = levels[0]
        answer: list[int] = []
        logprobs: list[float] = []
        for _ in range(tokens):
            more: dict[str, Any] = {}
            if len(levels) > 1:
                more = {"visual_pos_masks": mask[None], "deepstack_visual_embeds": levels[1:]}
            position_ids = torch.tensor(places).T[:, None]
            hidden = decoder(inputs_embeds=embeds[None], position_ids=position_ids, use_cache=False, **more)
            found = head(hidden.last_hidden_state[0, -1]).log_softmax(-1)
            token = int(found.argmax())
            answer.append(token)
            logprobs.append(float(found[token]))
            embeds = torch.cat([embeds, decoder.embed_tokens(torch.tensor([token]))])
            mask = torch.cat([mask, torch.tensor([False])])
            places = [*places, (following,) * 3]
            following += 1
        return answer, logprobs


def _raster(rows: int, columns: int) -> list[Place]:
    return [(0, y, x) for y in range(rows) for x in range(columns)]


def folder_groups(x: NDArray[np.float32], removed: int) -> list[tuple[int, list[int]]]:
    """FOLDER on (n, d): for each token that stays, in order, its own number and all that are in it."""
    tokens = [(i, [i]) for i in range(len(x))]
    while removed:
        k = min((len(tokens) - 1) // 2, removed)
        removed -= k
        means = np.stack([x[members].mean(0) for _, members in tokens]).astype(np.float64)
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        best: list[tuple[float, int, int]] = []
        for even in range(0, len(tokens), 2):
            scores = [float(means[even] @ means[odd]) for odd in range(1, len(tokens), 2)]
            partner = int(np.argmax(scores))
            best.append((-scores[partner], even, 2 * partner + 1))
        gone = {even: odd for _, even, odd in sorted(best)[:k]}
        merged = {i: (tokens[i][0], list(tokens[i][1])) for i in range(len(tokens)) if i not in gone}
        for even, odd in gone.items():
            merged[odd][1].extend(tokens[even][1])
        tokens = [merged[i] for i in sorted(merged)]
    return tokens
