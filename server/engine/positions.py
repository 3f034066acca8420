"""Vision tokens that stay keep the positions that they had in the image; text goes on from the full length.

A token's position is then data: which tokens stay is known on the device alone. It travels as two columns beside the
embedding, so that the encoder cache holds both, and goes into the runner's positions after slot mapping has used them.
What the host has to know, the full length of an image, is part of the image's identity, and with it of every cache's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d

from foldserve.reducers.refusal import InvalidReduction
from foldserve.server.engine.identity import ItemIdentity
from foldserve.server.engine.per_request import PerRequest

_COLUMNS = 2  # a position in base 256: each digit is exact in bfloat16
_BASE = 256


def attach(embeds: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """(n, hidden) and (n,) int64 below 65,536 -> (n, hidden + 2), in the order of positions."""
    order = source.argsort()
    embeds, source = embeds[order], source[order]
    digits = torch.stack([source // _BASE, source % _BASE], dim=-1)
    return torch.cat([embeds, digits.to(embeds.dtype)], dim=-1)


def detach(embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, hidden + 2) of `attach` -> (n, hidden) and (n,)."""
    high, low = embeds[:, -_COLUMNS:].long().unbind(-1)
    return embeds[:, :-_COLUMNS], high * _BASE + low


CANNOT_KEEP = (
    "this engine can't keep positions: it needs foldserve's worker on model runner V1, both of which `foldserve serve` "
    "sets, without pipeline parallelism and without speculative decoding; send positions 'renumber' to it"
)


def limit(vllm_config: VllmConfig) -> int | None:
    """Positions that the model was trained for; None where the engine can't keep any, see `CANNOT_KEEP`."""
    parallel = vllm_config.parallel_config
    ours = parallel.worker_cls.startswith("foldserve.") and not vllm_config.use_v2_model_runner
    if not ours or parallel.pipeline_parallel_size > 1 or vllm_config.speculative_config is not None:
        return None
    return trained(vllm_config.model_config)


def trained(model_config: ModelConfig) -> int:
    """Positions that the model was trained for; its rotary table ends there, and a GPU would read beyond it."""
    return max(model_config.hf_text_config.max_position_embeddings, model_config.max_model_len)


def refuse_positions(prompt_tokens: int, gaps: int, asked: int, limit: int) -> None:
    """Raises InvalidReduction where a prompt with `gaps` and `asked` more tokens go beyond `limit` positions."""
    taken = prompt_tokens + gaps
    if gaps and taken + asked > limit:
        raise InvalidReduction(
            f"with positions 'keep' the prompt takes {taken} of the model's {limit} positions, and {asked} more are "
            "asked for: shorten it, ask for fewer (max_tokens), or send positions 'renumber'",
            "positions",
        )


def worker(device: Literal["cpu", "cuda"]) -> str:
    """The `worker_cls` whose runner keeps positions; every worker of withdrawal does too."""
    return f"foldserve.server.engine.worker_{device}.FoldWorker"


class Image(NamedTuple):
    """An image of a prompt: its place among the tokens, and how many positions it takes beyond them."""

    start: int
    end: int
    removed: int


class PositionMap:
    """Rotary positions of one request's tokens. Immutable; token indices count generated tokens too."""

    __slots__ = ("images", "shift")

    def __init__(self, images: Sequence[Image]) -> None:
        self.images = tuple(images)
        self.shift = sum(image.removed for image in images)  # of every token after the last image

    @classmethod
    def of(cls, features: Sequence[Any]) -> PositionMap | None:
        """The map of a request from its multimodal features; None if its tokens are numbered as they come."""
        images = []
        for feature in features:
            length = ItemIdentity.parse(feature.identifier).full_length
            if length is not None:
                place = feature.mm_position
                images.append(Image(place.offset, place.offset + place.length, length - place.length))
        return cls(images) if images else None

    def shifts(self, start: int, end: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """What text tokens start..end - 1 are moved by; tokens of an image by what moves the image's first one."""
        if start >= self.images[-1].end:  # as every decode step
            return np.full(end - start, self.shift)
        shifts = np.zeros(end - start, dtype=np.int64)
        for image in self.images:
            shifts[max(image.end - start, 0) :] += image.removed
        return shifts


class PositionsRunner:
    """Mixin before a V1 runner class. Modification: positions of requests whose images keep theirs.

    A request that would go beyond the model's positions is an error, before anything of it is computed: the server
    refuses it before, and so does the processor as far as it can tell.
    Nothing is done in a step without such a request, nor with a model whose identities say nothing of positions.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._position_maps = PerRequest(self._checked_map)

    def _gather_mm_embeddings(
        self: Any, scheduler_output: Any, shift_computed_tokens: int = 0
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Called once per step, after slot mapping and before the positions are handed to the model."""
        embeds, is_embed = super()._gather_mm_embeddings(  # type: ignore[misc]
            scheduler_output, shift_computed_tokens
        )
        if not getattr(self.get_model(), "can_keep_positions", False):
            return embeds, is_embed
        maps = {name: self._position_maps.of(self.requests, name) for name in self.input_batch.req_ids}
        if not any(maps.values()):
            return embeds, is_embed
        return self._place(scheduler_output, maps, embeds), is_embed

    def _place(
        self: Any, scheduler_output: Any, maps: dict[str, PositionMap | None], embeds: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Moves the step's positions; returns the embeddings without their columns."""
        shifts = np.zeros(scheduler_output.total_num_scheduled_tokens, dtype=np.int64)
        plain: list[torch.Tensor] = []
        images: list[tuple[int, int, torch.Tensor]] = []  # (first row in the step, first position, tokens)
        remaining = iter(embeds)
        row = 0
        for request_id, positions in maps.items():
            state = self.requests[request_id]
            start = state.num_computed_tokens
            end = start + scheduler_output.num_scheduled_tokens[request_id]
            if positions is not None:
                shifts[row : row + end - start] = positions.shifts(start, end)
            for feature in state.mm_features:
                place = feature.mm_position
                first, last = max(place.offset, start), min(place.offset + place.length, end)
                if first >= last:
                    continue
                item = next(remaining)
                if ItemIdentity.parse(feature.identifier).full_length is not None:
                    assert positions is not None
                    item, source = detach(item)
                    base = place.offset + int(positions.shifts(place.offset, place.offset + 1)[0])
                    images.append((row + first - start, base, source))
                plain.append(item)
            row += end - start
        self.positions[:row] += async_tensor_h2d(shifts, self.positions.device)
        for first_row, base, source in images:
            self.positions[first_row : first_row + len(source)] = source + base
        return plain

    def _checked_map(self: Any, state: Any) -> PositionMap | None:
        """The last place where a position beyond the model's can be refused: the next one is the rotary kernel."""
        found = PositionMap.of(state.mm_features)
        if found is not None:
            asked = state.sampling_params.max_tokens
            refuse_positions(state.num_prompt_tokens, found.shift, asked, trained(self.model_config))
        return found
