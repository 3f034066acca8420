"""Qwen-VL with reduced images in plain transformers: fp32, no KV cache.

FOLDER is written as loops over tokens, positions as loops over a prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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

from foldserve.reducers.downsample import grid_for
from tests.engine import plain_diversity, qwen_tower_reference
from tests.engine.withdrawal.reference import Merge, chosen
from tests.reducers.naive import ACROSS_FRAMES, naive_mmtok, naive_pixelprune

Answer = tuple[list[int], list[float]]
Place = tuple[int, int, int]
Film = tuple[NDArray[np.uint8], dict[str, Any]]
"""(pictures, height, width, 3), and vLLM's metadata."""


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
    """Takes a checkpoint, and the layer K from which on tokens may be gone."""

    def __init__(self, path: Path, layer: int) -> None:
        self.layer = layer
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(path)
        self.config = self.model.config
        self.token = self.config.vision_config.patch_size * self.config.vision_config.spatial_merge_size

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
        pictures = iter([(image, asked) for image, asked in zip(images, reductions, strict=True)])
        videos = iter(films)
        all_asked: list[Mapping[str, Any]] = []
        levels: list[Tensor] = []
        rows: list[list[int]] = []
        ids: list[int] = []
        places: list[Place] = []
        is_vision: list[bool] = []
        following = 0
        for token in self.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]:
            pieces: list[list[int] | Left] = [[token]]
            if token == self.config.image_token_id:
                image, asked = next(pictures)
                pieces = [self.left(image, asked)]
            elif token == self.config.video_token_id:
                film, asked = next(videos)
                pieces = self.film(film, asked)
            if pieces != [[token]]:
                all_asked.append(asked)
                rows.append([])
            for piece in pieces:
                if isinstance(piece, list):
                    ids += piece
                    places += [(following + i,) * 3 for i in range(len(piece))]
                    is_vision += [False] * len(piece)
                    following += len(piece)
                    continue
                rows[-1] += range(len(ids), len(ids) + len(piece.places))
                ids += [token] * len(piece.places)
                places += [(t + following, y + following, x + following) for t, y, x in piece.places]
                is_vision += [True] * len(piece.places)
                following += piece.taken
                before = levels or [level[:0] for level in piece.levels]
                levels = [torch.cat(both) for both in zip(before, piece.levels, strict=True)]
        embeds = self.model.model.language_model.embed_tokens(torch.tensor(ids))
        mask = torch.tensor(is_vision)
        if levels:
            embeds[mask] = levels[0]
        added = [torch.zeros_like(embeds) for _ in levels[1:]]
        for level, whole in zip(levels[1:], added, strict=True):
            whole[mask] = level
        gone, merges = self._gone(embeds, added, places, rows, all_asked)
        return self._greedy(embeds, added, places, gone, merges, following, tokens)

    def film(self, film: Film, asked: Mapping[str, Any]) -> list[list[int] | Left]:
        """The frames of a video as they are left, or one after the other, and text between them."""
        pictures, metadata = film
        process, tokenizer = self.processor.video_processor, self.processor.tokenizer
        known = {name: value for name, value in metadata.items() if name != "do_sample_frames"}
        inputs = process(videos=[pictures], video_metadata=[known], do_sample_frames=False, return_tensors="pt")
        pixels, (grid,) = inputs["pixel_values_videos"], inputs["video_grid_thw"].tolist()
        found = self.model.model.visual(pixels, grid_thw=inputs["video_grid_thw"], return_dict=True)
        levels = [found.pooler_output, *(getattr(found, "deepstack_features", None) or [])]
        merge, vision = self.config.vision_config.spatial_merge_size, self.config.vision_config
        rows, columns = grid[1] // merge, grid[2] // merge
        n, together = rows * columns, vision.temporal_patch_size
        step = together / metadata["fps"] * getattr(vision, "tokens_per_second", 1.0)
        step = step if self.config.model_type == "qwen2_5_vl" else 1.0
        if choose := ACROSS_FRAMES.get(asked.get("method", "").partition("+")[0]):
            whole = levels[0]
            source = choose(whole, len(whole) // n, len(whole) - int(len(whole) * asked["ratio"]))
            left, last = [level[source] for level in levels], len(whole) // n - 1
            if asked.get("positions") == "renumber":
                return [Left(left, [(i, i, i) for i in range(len(source))], len(source))]
            places = [(int(i // n * step), i % n // columns, i % n % columns) for i in source]
            return [Left(left, places, max(int(last * step) + 1, rows, columns))]
        frames = [
            self._reduced([level[f * n : (f + 1) * n] for level in levels], (rows, columns), asked, 0, frame_pixels)
            for f, frame_pixels in enumerate(pixels.split(n * merge**2))
        ]
        if self.config.model_type.startswith("qwen3"):
            pieces: list[list[int] | Left] = []
            indices = metadata["frames_indices"]  # the last picture stands in where a frame lacks one
            for f, frame in enumerate(frames):
                seconds = [
                    indices[min(i, len(indices) - 1)] / metadata["fps"] for i in (f * together, (f + 1) * together - 1)
                ]
                stamp = f"<{sum(seconds) / 2:.1f} seconds>"
                pieces += [
                    tokenizer(stamp, add_special_tokens=False)["input_ids"],
                    [self.config.vision_start_token_id],
                    frame,
                    [self.config.vision_end_token_id],
                ]
            return pieces
        whole = [torch.cat(level) for level in zip(*(frame.levels for frame in frames), strict=True)]
        kept = len(frames[0].places)
        if asked.get("positions") == "renumber" and kept < n:
            return [Left(whole, [(i, i, i) for i in range(kept * len(frames))], kept * len(frames))]
        places = [(int(f * step), y, x) for f, frame in enumerate(frames) for _, y, x in frame.places]
        return [Left(whole, places, max(int((len(frames) - 1) * step) + 1, frames[0].taken))]

    def left(self, image: Image.Image, asked: Mapping[str, Any]) -> Left:
        whole = self._grid(image)
        if asked.get("method") == "downsample":
            less, fewer = grid_for(whole[0] * whole[1] - int(whole[0] * whole[1] * asked["ratio"]), whole)
            levels, _, _ = self._encode(image.resize((fewer * self.token, less * self.token), 3), do_resize=False)
            if asked.get("positions") == "keep":
                centres = [
                    (0, (2 * y + 1) * whole[0] // (2 * less), (2 * x + 1) * whole[1] // (2 * fewer))
                    for y in range(less)
                    for x in range(fewer)
                ]
                return Left(levels, centres, max(whole))
            return Left(levels, _raster(less, fewer), max(less, fewer))
        if str(asked.get("method")).startswith("pixelprune"):
            return self._pruned(image, whole, asked)
        levels, seed, pixels = self._encode(image)
        return self._reduced(levels, whole, asked, seed, pixels)

    def _pruned(self, image: Image.Image, grid: tuple[int, int], asked: Mapping[str, Any]) -> Left:
        """Cells one by one, then the tower on those that stay; a method behind it has no more than its amount left."""
        (rows, columns), process = grid, self.processor.image_processor
        raw = process(images=[image], return_tensors="pt", do_rescale=False, do_normalize=False)["pixel_values"]
        values = raw.int().view(rows, columns, -1).tolist()
        stay = naive_pixelprune(values, asked.get("tau", 0), anchored=asked.get("predictor") != "sliding")
        pixels = process(images=[image], return_tensors="pt")["pixel_values"]
        kept = qwen_tower_reference.encode(self.model.model.visual, pixels, grid, 0, asked, stay)
        levels = [torch.stack(level) for level in zip(*(token.levels for token in kept), strict=True)]
        places = [(0, *token.at) for token in kept]
        most = rows * columns - int(rows * columns * asked.get("ratio", 0.0))
        second = asked["method"].partition("+")[2]
        if second and len(kept) > most:
            groups = self._groups(second, levels[0], kept, most, asked)
            levels = [torch.stack([level[members].mean(0) for _, members in groups]) for level in levels]
            places = [places[i] for i, _ in groups]
        if asked.get("positions") == "renumber":
            return Left(levels, [(i, i, i) for i in range(len(places))], len(places))
        return Left(levels, places, max(rows, columns))

    def _reduced(
        self, levels: list[Tensor], grid: tuple[int, int], asked: Mapping[str, Any], seed: int, pixels: Tensor
    ) -> Left:
        """Of an image, or of a frame of a video; methods in the tower begin from its pixels once more."""
        method, positions = asked.get("method", "folder"), asked.get("positions")
        (rows, columns), n = grid, grid[0] * grid[1]
        in_decoder = method in ("fastv", "illava_decoder")  # alone, so that the ratio is theirs
        removed = 0 if in_decoder else int(n * asked.get("ratio", 0.0))
        removed = max(0, n - asked["keep_tokens"]) if "keep_tokens" in asked else removed
        if not removed:
            return Left(levels, _raster(rows, columns), max(rows, columns))
        if method in ("illava", "tome", "visionzip"):
            kept = qwen_tower_reference.encode(self.model.model.visual, pixels, (rows, columns), removed, asked)
            levels = [torch.stack(level) for level in zip(*(token.levels for token in kept), strict=True)]
            if positions == "renumber":
                return Left(levels, [(i, i, i) for i in range(len(kept))], len(kept))
            return Left(levels, [(0, *token.at) for token in kept], max(rows, columns))
        if method == "pool":
            return self._pooled(levels, grid, n - removed, positions)
        if method == "random":
            drawn = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: n - removed]
            groups = [(int(i), [int(i)]) for i in drawn.sort().values]
        else:
            visual, untouched = self.model.model.visual, {"method": "illava"}
            tower = qwen_tower_reference.encode(visual, pixels, grid, 0, untouched) if method == "mmtok" else ()
            groups = self._groups(method.partition("+")[0], levels[0], tower, n - removed, asked)
        levels = [torch.stack([level[members].mean(0) for _, members in groups]) for level in levels]
        if positions == "renumber":
            return Left(levels, [(i, i, i) for i in range(len(groups))], len(groups))
        return Left(levels, [(0, i // columns, i % columns) for i, _ in groups], max(rows, columns))

    def _groups(
        self,
        method: str,
        tokens: Tensor,
        tower: Sequence[qwen_tower_reference.Token],
        kept: int,
        asked: Mapping[str, Any],
    ) -> list[tuple[int, list[int]]]:
        """Of each token that a method after the tower leaves: its own number, and all that are in it.

        Args:
            tokens: (n, hidden).
            tower: what enters the merger, for MMTok.
        """
        if method in plain_diversity.METHODS:
            geometry = {"plain": "plain", "centered": "standardized"}[asked.get("geometry", "plain")]
            return plain_diversity.groups(method, tokens.numpy(), kept, geometry, asked.get("rest", "drop"))
        if method == "mmtok":
            question = f"Question: {asked['query']}" if asked.get("query") else ""
            ids = self.processor.tokenizer(question, add_special_tokens=False)["input_ids"][:64]
            text = self.model.model.language_model.embed_tokens(torch.tensor(ids, dtype=torch.int64))
            means = torch.stack([token.patches.mean(0) for token in tower])
            return [(i, [i]) for i in naive_mmtok(tokens, means, text, kept, 0.01)]
        assert method == "folder"
        return folder_groups(tokens.numpy(), len(tokens) - kept)

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

    def _encode(self, image: Image.Image, **options: Any) -> tuple[list[Tensor], int, Tensor]:
        """Tokens and deepstack levels, the seed of a random choice (of the image's bytes), and what the tower takes."""
        process = self.processor.image_processor
        inputs = process(images=[image], return_tensors="pt", **options)
        found = self.model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"], return_dict=True)
        raw = process(images=[image], return_tensors="pt", do_rescale=False, do_normalize=False, **options)
        seed = crc32(raw["pixel_values"].float().contiguous().numpy().data)
        levels = [found.pooler_output, *(getattr(found, "deepstack_features", None) or [])]
        return levels, seed, inputs["pixel_values"]

    def _gone(
        self,
        embeds: Tensor,
        added: list[Tensor],
        places: list[Place],
        items: Sequence[list[int]],
        reductions: Sequence[Mapping[str, Any]],
    ) -> tuple[set[int], list[Merge]]:
        """Rows that leave before layer K, and what others become there."""
        gone: set[int] = set()
        merges: list[Merge] = []
        for rows, asked in zip(items, reductions, strict=True):
            decoder = asked.get("method", "folder").rpartition("+")[2]
            decoder = f"{decoder}_decoder" if asked.get("decoder") else decoder
            if asked.get("withdraw"):
                gone |= set(rows)
            elif decoder in ("fastv", "illava_decoder"):
                share = asked.get("decoder_ratio", asked["ratio"])
                removed = len(rows) - round(len(rows) * (1 - share)) if decoder == "fastv" else round(len(rows) * share)
                scores = self._last_row(embeds, added, places)[rows].tolist()
                leaving, merged = chosen(decoder, rows, scores, removed)
                gone |= set(leaving)
                merges += merged
        return gone, merges

    def _last_row(self, embeds: Tensor, added: list[Tensor], places: list[Place]) -> Tensor:
        """(tokens,): softmaxed attention of the last token in layer K - 1, mean over the heads."""
        decoder = self.model.model.language_model
        hidden, rope = self._through(embeds, added, places, self.layer - 1)
        block, usual = decoder.layers[self.layer - 1], decoder.config._attn_implementation
        decoder.config._attn_implementation = "eager"  # which returns its weights
        _, weights = block.self_attn(block.input_layernorm(hidden), position_embeddings=rope, attention_mask=None)
        decoder.config._attn_implementation = usual
        row: Tensor = weights[0, :, -1].mean(0)
        return row

    def _through(
        self,
        embeds: Tensor,
        added: list[Tensor],
        places: list[Place],
        layers: int,
        gone: Collection[int] = (),
        merges: Sequence[Merge] = (),
    ) -> tuple[Tensor, Any]:
        """Hidden states after so many layers, and the rotary table of their rows."""
        decoder = self.model.model.language_model
        hidden = embeds[None]
        rope = decoder.rotary_emb(hidden, torch.tensor(places).T[:, None])
        for index, block in enumerate(decoder.layers[:layers]):
            if index == self.layer:
                rows = [merge.weights @ hidden[0, merge.rows] for merge in merges]
                for merge, row in zip(merges, rows, strict=True):
                    hidden[0, merge.at] = row
                kept = [i for i in range(len(embeds)) if i not in gone]
                hidden, rope = hidden[:, kept], tuple(table[..., kept, :] for table in rope)
            causal = torch.full((hidden.shape[1],) * 2, -torch.inf).triu(1)[None, None]
            mask = None if hasattr(block, "linear_attn") else causal  # a recurrent state sees what came before
            output = block(hidden, attention_mask=mask, position_embeddings=rope, position_ids=None)
            hidden = output[0] if isinstance(output, tuple) else output
            if index < len(added):
                hidden = hidden + added[index]
        return hidden, rope

    def _greedy(
        self,
        embeds: Tensor,
        added: list[Tensor],
        places: list[Place],
        gone: set[int],
        merges: Sequence[Merge],
        following: int,
        tokens: int,
    ) -> Answer:
        decoder, head = self.model.model.language_model, self.model.lm_head
        answer: list[int] = []
        logprobs: list[float] = []
        for _ in range(tokens):
            hidden, _ = self._through(embeds, added, places, len(decoder.layers), gone, merges)
            found = head(decoder.norm(hidden)[0, -1]).log_softmax(-1)
            token = int(found.argmax())
            answer.append(token)
            logprobs.append(float(found[token]))
            embeds = torch.cat([embeds, decoder.embed_tokens(torch.tensor([token]))])
            added = [torch.cat([level, torch.zeros(1, level.shape[1])]) for level in added]
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
