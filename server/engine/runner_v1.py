"""Model runner V1: positions "keep"."""

from __future__ import annotations

from typing import Any

import torch

from foldserve.server.engine.per_request import PerRequest
from foldserve.server.engine.positions import (
    Chunk,
    PositionMap,
    checked_position_map,
    position_changes,
    trained_positions,
)


class PositionsRunner:
    """Mixin before a V1 runner class. Modification: positions of steps with images that keep their positions."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._position_maps = PerRequest(self._position_map)

    def _gather_mm_embeddings(
        self: Any, scheduler_output: Any, shift_computed_tokens: int = 0
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Called once per step, after slot mapping and before the model gets the positions."""
        embeds, is_embed = super()._gather_mm_embeddings(  # type: ignore[misc]
            scheduler_output, shift_computed_tokens
        )
        if not getattr(self.get_model(), "can_keep_positions", False):
            return embeds, is_embed
        maps = {name: self._position_maps.of(self.requests, name) for name in self.input_batch.req_ids}
        if any(maps.values()):
            changes, embeds = position_changes((self._chunk(scheduler_output, *one) for one in maps.items()), embeds)
            changes.apply(self.mrope_positions.gpu if self.uses_mrope else self.positions)
        return embeds, is_embed

    def _chunk(self: Any, scheduler_output: Any, request_id: str, positions: PositionMap | None) -> Chunk:
        state = self.requests[request_id]
        start = state.num_computed_tokens
        return Chunk(state.mm_features, positions, start, start + scheduler_output.num_scheduled_tokens[request_id])

    def _position_map(self: Any, state: Any) -> PositionMap | None:
        asked = state.sampling_params.max_tokens
        family, limit = self.get_model().family, trained_positions(self.model_config)
        return checked_position_map(family, state.mm_features, state.num_prompt_tokens, asked, limit)
