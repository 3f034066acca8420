"""Vision tokens that stay keep the positions that they had in the image; text goes on from the full length.

A token's position is then data: which tokens stay is known on the device alone. It travels as three columns beside the
embedding, so that the encoder cache holds both, and goes into the positions that the model gets (`runner_v1`,
`state_v2`); slot mapping has used the runner's own by then.
What the host has to know, the full length of an image, is part of the image's identity, and with it of every cache's.
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

COLUMNS = 3
"""Beside an embedding: a number in base 256, of which each digit is exact in bfloat16."""

_BASE = 256


def attach(embeds: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """(n, hidden) and (n,) int64 below 256^3 -> (n, hidden + 3), in the order of positions."""
    order = source.argsort()
    embeds, source = embeds[order], source[order]
    digits = torch.stack([source // _BASE**place % _BASE for place in reversed(range(COLUMNS))], dim=-1)
    return torch.cat([embeds, digits.to(embeds.dtype)], dim=-1)


def detach(embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, hidden + 3) of `attach` -> (n, hidden) and (n,)."""
    source = torch.zeros_like(embeds[:, 0], dtype=torch.int64)
    for digit in embeds[:, -COLUMNS:].long().unbind(-1):
        source = source * _BASE + digit
    return embeds[:, :-COLUMNS], source


CANNOT_KEEP = (
    "this engine can't keep positions: none can with pipeline parallelism, speculative decoding or micro-batches, and "
    "model runner V1 needs foldserve's worker for it, which `foldserve serve` sets; send positions 'renumber' to it"
)


def limit(vllm_config: VllmConfig) -> int | None:
    """Positions that the model was trained for; None where the engine can't keep any, see `CANNOT_KEEP`."""
    parallel = vllm_config.parallel_config
    ours = vllm_config.use_v2_model_runner or parallel.worker_cls.startswith("foldserve.")
    if not ours or parallel.pipeline_parallel_size > 1 or parallel.use_ubatching or vllm_config.speculative_config:
        return None
    return trained(vllm_config.model_config)


def trained(model_config: ModelConfig) -> int:
    """Positions that the model was trained for; its rotary table ends there, and a GPU would read beyond it."""
    return max(model_config.hf_text_config.max_position_embeddings, model_config.max_model_len)


def refuse_positions(prompt_tokens: int, beyond: int, asked: int, limit: int) -> None:
    """Raises InvalidReduction where a prompt and `asked` more tokens go beyond `limit` positions.

    Args:
        beyond: positions that the prompt takes beyond one for each token. Where there are none, the length of the
            context is what bounds a prompt, and vLLM refuses.
    """
    taken = prompt_tokens + beyond
    if beyond > 0 and taken + asked > limit:
        raise InvalidReduction(
            f"with positions 'keep' the prompt takes {taken} of the model's {limit} positions, and {asked} more are "
            "asked for: shorten it, ask for fewer (max_tokens), or send positions 'renumber'",
            "positions",
        )


class PositionMap(ABC):
    """Where tokens of one request stand instead of where vLLM's runner puts them. Immutable.

    Attributes:
        beyond: positions that the prompt takes beyond one for each of its tokens; may be negative.
    """

    beyond: int

    @abstractmethod
    def shifts(self, start: int, end: int) -> NDArray[np.int64]:
        """(end - start,) what tokens start..end - 1 of the request are moved by, generated ones included.

        Tokens of an image that keeps its positions come to where its first token stands.
        """

    @abstractmethod
    def places(self, feature: Any, source: torch.Tensor) -> torch.Tensor:
        """How far from there its tokens stand: (n,) of `detach` -> (n,), or (dimensions, n) of several."""


class Run(NamedTuple):
    """Of an image's tokens, those that lie in one piece: their place, and how many positions they take beyond them."""

    start: int
    end: int
    removed: int


class SequencePositions(PositionMap):
    """One number for a token: vLLM counts through, and images that keep their positions leave gaps."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = tuple(runs)
        self.beyond = sum(run.removed for run in runs)  # what moves every token after the last run

    @classmethod
    def of(cls, features: Sequence[Any]) -> SequencePositions | None:
        """The map of a request from its multimodal features; None if its tokens are numbered as they come."""
        runs = []
        for feature in features:
            length = ItemIdentity.parse(feature.identifier).full_length
            if length is not None:
                pieces = feature.mm_position.extract_embeds_range()
                removed = (length - sum(last + 1 - first for first, last in pieces)) // len(pieces)
                runs += [Run(first, last + 1, removed) for first, last in pieces]
        return cls(runs) if runs else None

    def shifts(self, start: int, end: int) -> NDArray[np.int64]:
        if start >= self.runs[-1].end:  # as every decode step
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
    """What a step computes of one request: tokens start..end - 1.

    Attributes:
        features: the request's images.
        map: of the request; None where its tokens are where vLLM's runner puts them.
    """

    features: Sequence[Any]
    map: PositionMap | None
    start: int
    end: int


class Moves(NamedTuple):
    """Where the tokens of a step stand instead of where vLLM's runner put them.

    Attributes:
        shifts: (tokens,) what each is moved by.
        images: (first row in the step, (n,) or (dimensions, n) what its tokens are moved by beyond that) of images
            that keep their positions; of each run of tokens, where text lies between.
    """

    shifts: NDArray[np.int64]
    images: Sequence[tuple[int, torch.Tensor]]

    def apply(self, positions: torch.Tensor) -> None:
        """Moves (at least tokens,) or (dimensions, at least tokens) positions in place."""
        if self.shifts.any():
            positions[..., : len(self.shifts)] += async_tensor_h2d(self.shifts, positions.device)
        for first_row, places in self.images:
            positions[..., first_row : first_row + places.shape[-1]] += places


def moves(step: Iterable[Chunk], embeds: Iterable[torch.Tensor]) -> tuple[Moves, list[torch.Tensor]]:
    """What moves in a step, and its images' embeddings, which come in the order of the chunks, without columns."""
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
    return Moves(np.concatenate(shifts), images), plain


def _runs(place: Any, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Of tokens first..last - 1 those that hold embeddings of an item, as half-open ranges."""
    if place.offset >= last or place.offset + place.length <= first:
        return  # most steps
    for start, final in place.extract_embeds_range():
        if start < last and final >= first:
            yield max(start, first), min(final + 1, last)


def checked_map(family: Any, features: Sequence[Any], prompt_tokens: int, asked: int, limit: int) -> PositionMap | None:
    """The map of a request of a `Family`: the last place where a position beyond the model's can be refused.

    The next one is the rotary kernel. The server refuses before, and so does the processor as far as it can tell.
    """
    found: PositionMap | None = family.position_map(features)
    if found is not None:
        refuse_positions(prompt_tokens, found.beyond, asked, limit)
    return found
