"""Positions "keep": kept vision tokens keep the positions they had in the image; text continues after the full length.

Only the device knows which tokens stay, so positions are data: three columns beside the embedding, which the encoder
cache stores too. The runner adds them to the model's positions after slot mapping (`runner_v1`, `state_v2`). The host
only needs an image's full length, which is part of its identity and so of all cache keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import ModelConfig, VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d

from foldserve.reducers.refusal import InvalidReduction
from foldserve.server.engine.identity import ItemIdentity
from foldserve.server.engine.worker import is_ours

COLUMNS = 3  # digits in base 256, each of which bfloat16 holds exactly

_BASE = 256


def attach(embeds: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """(n, hidden), (n,) int64 below 256^3 -> (n, hidden + 3), sorted by position."""
    order = source.argsort()
    embeds, source = embeds[order], source[order]
    digits = torch.stack([source // _BASE**place % _BASE for place in reversed(range(COLUMNS))], dim=-1)
    return torch.cat([embeds, digits.to(embeds.dtype)], dim=-1)


def detach(embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of `attach`: (n, hidden + 3) -> (n, hidden), (n,)."""
    source = torch.zeros_like(embeds[:, 0], dtype=torch.int64)
    for digit in embeds[:, -COLUMNS:].long().unbind(-1):
        source = source * _BASE + digit
    return embeds[:, :-COLUMNS], source


CANNOT_KEEP = (
    "this engine can't keep positions: none can with pipeline parallelism, speculative decoding or micro-batches, and "
    "model runner V1 needs foldserve's worker for it, which `foldserve serve` sets; send positions 'renumber' to it"
)


def position_limit(vllm_config: VllmConfig) -> int | None:
    """Positions that the model was trained for; None if the engine can't keep positions, see `CANNOT_KEEP`."""
    parallel = vllm_config.parallel_config
    ours = vllm_config.use_v2_model_runner or is_ours(vllm_config)
    if not ours or parallel.pipeline_parallel_size > 1 or parallel.use_ubatching or vllm_config.speculative_config:
        return None
    return trained_positions(vllm_config.model_config)


def trained_positions(model_config: ModelConfig) -> int:
    """Positions that the model was trained for: the end of its rotary table, beyond which a GPU would read."""
    return max(model_config.hf_text_config.max_position_embeddings, model_config.max_model_len)


def refuse_positions(prompt_tokens: int, beyond: int, asked: int, limit: int) -> None:
    """Raises InvalidReduction if a prompt and `asked` more tokens exceed `limit` positions.

    `beyond` is how many positions the prompt takes beyond one per token. If 0, vLLM's context length is the only limit.
    """
    taken = prompt_tokens + beyond
    if beyond > 0 and taken + asked > limit:
        raise InvalidReduction(
            f"with positions 'keep' the prompt takes {taken} of the model's {limit} positions, and {asked} more are "
            "asked for: shorten it, ask for fewer (max_tokens), or send positions 'renumber'",
            "positions",
        )


class PositionMap(ABC):
    """How the positions of one request differ from those of vLLM's runner. Immutable."""

    beyond: int  # positions that the prompt takes beyond one per token; may be negative

    @abstractmethod
    def shifts(self, start: int, end: int) -> NDArray[np.int64]:
        """(end - start,) position offset of the request's tokens in [start, end), generated ones included.

        It moves all tokens of an image that keeps its positions to the position of the first one.
        """

    @abstractmethod
    def places(self, feature: Any, source: torch.Tensor) -> torch.Tensor:
        """(n,) of `detach` -> (n,) or (dimensions, n): offsets of an image's tokens from that position."""


class TokenRun(NamedTuple):
    """A contiguous run [start, end) of an image's tokens; it takes `removed` positions beyond one per token."""

    start: int
    end: int
    removed: int


class SequencePositions(PositionMap):
    """One-dimensional positions: images that keep their positions leave gaps in vLLM's numbering."""

    def __init__(self, runs: Sequence[TokenRun]) -> None:
        self.runs = tuple(runs)
        self.beyond = sum(run.removed for run in runs)  # also the offset of all tokens after the last run

    @classmethod
    def of(cls, features: Sequence[Any]) -> SequencePositions | None:
        """The map of a request from its multimodal features; None if its positions are vLLM's."""
        runs = []
        for feature in features:
            length = ItemIdentity.parse(feature.identifier).full_length
            if length is not None:
                pieces = feature.mm_position.extract_embeds_range()
                removed = (length - sum(last + 1 - first for first, last in pieces)) // len(pieces)
                runs += [TokenRun(first, last + 1, removed) for first, last in pieces]
        return cls(runs) if runs else None

    def shifts(self, start: int, end: int) -> NDArray[np.int64]:
        if start >= self.runs[-1].end:  # every decode step
            return np.full(end - start, self.beyond)
        shifts = np.zeros(end - start, dtype=np.int64)
        for run in self.runs:
            inside = slice(max(run.start - start, 0), max(run.end - start, 0))
            shifts[inside] -= np.arange(start, end)[inside] - run.start
            shifts[inside.stop :] += run.removed
        return shifts

    def places(self, feature: Any, source: torch.Tensor) -> torch.Tensor:
        pieces, length = feature.mm_position.extract_embeds_range(), ItemIdentity.parse(feature.identifier).full_length
        assert length is not None
        return source if len(pieces) == 1 else source % (length // len(pieces))  # the pieces are a video's frames


class Chunk(NamedTuple):
    """The tokens [start, end) of one request in a step."""

    features: Sequence[Any]  # the request's images and videos
    map: PositionMap | None  # None: vLLM's positions
    start: int
    end: int


class PositionChanges(NamedTuple):
    """Changes to the positions of a step's tokens.

    Attributes:
        shifts: (tokens,) offsets.
        images: for each run of tokens that keep their positions: its first row in the step, and further offsets
            (n,) or (dimensions, n).
    """

    shifts: NDArray[np.int64]
    images: Sequence[tuple[int, torch.Tensor]]

    def apply(self, positions: torch.Tensor) -> None:
        """Change positions in place; their last dimension has at least as many entries as the step has tokens."""
        if self.shifts.any():
            positions[..., : len(self.shifts)] += async_tensor_h2d(self.shifts, positions.device)
        for first_row, places in self.images:
            positions[..., first_row : first_row + places.shape[-1]] += places


def position_changes(
    step: Iterable[Chunk], embeds: Iterable[torch.Tensor]
) -> tuple[PositionChanges, list[torch.Tensor]]:
    """The changes of a step, and its images' embeddings without the columns of `attach`, in the order of the chunks."""
    shifts: list[NDArray[np.int64]] = []
    plain: list[torch.Tensor] = []
    images: list[tuple[int, torch.Tensor]] = []
    remaining = iter(embeds)
    row = 0
    for chunk in step:
        length = chunk.end - chunk.start
        shifts.append(np.zeros(length, np.int64) if chunk.map is None else chunk.map.shifts(chunk.start, chunk.end))
        for feature in chunk.features:
            place = feature.mm_position
            runs = list(_runs(place, chunk.start, chunk.end))
            if not runs:
                continue
            item = next(remaining)
            if ItemIdentity.parse(feature.identifier).full_length is not None:
                assert chunk.map is not None
                item, source = detach(item)
                places = chunk.map.places(feature, source)
                done = 0
                for run, end in runs:
                    images.append((row + run - chunk.start, places[..., done : done + end - run]))
                    done += end - run
            plain.append(item)
        row += length
    return PositionChanges(np.concatenate(shifts), images), plain


def _runs(place: Any, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of the tokens in [first, last) that hold embeddings of an item."""
    if place.offset >= last or place.offset + place.length <= first:
        return  # most steps
    for start, final in place.extract_embeds_range():
        if start < last and final >= first:
            yield max(start, first), min(final + 1, last)


def checked_position_map(
    family: Any, features: Sequence[Any], prompt_tokens: int, asked: int, limit: int
) -> PositionMap | None:
    """`Family.position_map`, with a last check that no position exceeds the rotary table.

    The server checks before, and the processor as far as it knows the request.
    """
    found: PositionMap | None = family.position_map(features)
    if found is not None:
        refuse_positions(prompt_tokens, found.beyond, asked, limit)
    return found
