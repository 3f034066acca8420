"""M-RoPE: rotary positions (time, row, column) of prompts with reduced images and videos.

The host knows where each item begins and where the text after it continues, but not which tokens stay. It gives tokens
that keep their positions the item's first position; the runner adds the rest on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from foldserve.reducers.item import ItemPlan
from foldserve.server.engine.identity import ItemIdentity
from foldserve.server.engine.model import FoldModel
from foldserve.server.engine.positions import PositionMap

if TYPE_CHECKING:
    from foldserve.server.engine.family import Family


class PositionGrid(NamedTuple):
    """Grid of an unreduced image or video, or of one frame of a video with text between its frames."""

    frames: int
    rows: int
    columns: int
    step: float = 1.0  # positions in time between two frames

    def places(self, source: torch.Tensor) -> torch.Tensor:
        """(n,) token indices in raster order, frame by frame -> (3, n) positions relative to the item's first."""
        frame, place = source // (self.rows * self.columns), source % (self.rows * self.columns)
        time = (frame.double() * self.step).long() if self.frames > 1 else torch.zeros_like(source)
        return torch.stack([time, place // self.columns, place % self.columns])

    def all_places(self) -> NDArray[np.int64]:
        """(3, tokens): `places` of all tokens."""
        places = np.indices((self.frames, self.rows, self.columns)).reshape(3, -1)
        places[0] = (places[0] * self.step).astype(np.int64)
        return places

    @property
    def taken(self) -> int:
        """Number of positions up to the text after the last token."""
        return max(int((self.frames - 1) * self.step), self.rows - 1, self.columns - 1) + 1


class GridPositions(PositionMap):
    """Kept tokens keep time, row and column; all other positions are those of `MropeModel`."""

    def __init__(self, grids: Mapping[int, PositionGrid], beyond: int) -> None:
        """Takes the grids of items that keep their positions, by the item's offset in the prompt."""
        self._grids, self.beyond = grids, beyond

    @classmethod
    def of(cls, family: Family, features: Sequence[Any]) -> GridPositions | None:
        """See `Family.position_map`."""
        grids, beyond = {}, 0
        for feature in features:
            plan = family.plan_of(feature)
            if plan is None:
                continue
            beyond += family.positions_beyond_tokens(plan)
            if ItemIdentity.parse(feature.identifier).full_length is not None:
                grids[feature.mm_position.offset] = grid_of(feature, plan, family)
        return cls(grids, beyond) if grids else None

    def shifts(self, start: int, end: int) -> NDArray[np.int64]:
        return np.zeros(end - start, np.int64)

    def places(self, feature: Any, source: torch.Tensor) -> torch.Tensor:
        return self._grids[feature.mm_position.offset].places(source)


class MropeModel(FoldModel):
    """Mixin before a vLLM model class with M-RoPE. Modification: positions of prompts with reduced items.

    - tokens that keep their positions get the item's first position (`GridPositions` adds the rest), and text continues
      as after the whole item;
    - if the method keeps a grid, tokens get the positions of an image of that size;
    - all other tokens are numbered like text, with equal time, row and column.
    """

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[torch.Tensor, int]:
        """(3, tokens) int64 positions of a prompt, and what to add to the index of each later token."""
        family = self.family
        plans = [None if family is None else family.plan_of(feature) for feature in mm_features]
        if all(plan is None or plan.is_identity for plan in plans):
            return super().get_mrope_input_positions(input_tokens, mm_features)
        parts: list[NDArray[np.int64]] = []
        done = following = 0  # tokens, and the position after them
        for feature, plan in sorted(zip(mm_features, plans, strict=True), key=lambda pair: pair[0].mm_position.offset):
            for start, places, taken in self._spans(input_tokens, feature, plan):
                text = start - done
                parts += [_text(text) + following, places + following + text]
                done, following = start + places.shape[1], following + text + taken
        parts.append(_text(len(input_tokens) - done) + following)
        positions = torch.from_numpy(np.concatenate(parts, axis=1))
        return positions, following - done

    def _spans(
        self, input_tokens: list[int], feature: Any, plan: ItemPlan | None
    ) -> Iterator[tuple[int, NDArray[np.int64], int]]:
        """For each run of an item's tokens: start, (3, n) positions relative to its first, and how many it takes."""
        place = feature.mm_position
        if plan is None or plan.is_identity:
            tokens = input_tokens[place.offset : place.offset + place.length]
            alone = replace(feature, mm_position=replace(place, offset=0))
            found, delta = super().get_mrope_input_positions(tokens, [alone])
            yield place.offset, found.numpy(), place.length + delta
            return
        assert self.family is not None
        grid = grid_of(feature, plan, self.family)
        for first, last in place.extract_embeds_range():
            tokens = last + 1 - first
            yield first, _reduced_positions(plan, grid, tokens), positions_taken(plan, grid, tokens)


def grid_of(feature: Any, plan: ItemPlan, family: Family) -> PositionGrid:
    """Grid of a multimodal feature; of one frame, if there is text between its frames."""
    rows, columns, frames = plan.layout.shape
    apart = len(feature.mm_position.extract_embeds_range()) > 1
    return PositionGrid(1 if apart else frames, rows, columns, family.frame_step(feature))


def positions_taken(plan: ItemPlan, grid: PositionGrid, tokens: int) -> int:
    """How many positions an item or frame takes of which `tokens` are left; see `MropeModel`."""
    left = _kept_grid(plan, grid)
    return tokens if left is None else left.taken


def _reduced_positions(plan: ItemPlan, grid: PositionGrid, tokens: int) -> NDArray[np.int64]:
    """(3, tokens) relative positions of an item or frame; 0 for tokens that keep their positions."""
    if plan.keeps_positions:
        return np.zeros((3, tokens), np.int64)
    left = _kept_grid(plan, grid)
    return _text(tokens) if left is None else left.all_places()


def _kept_grid(plan: ItemPlan, grid: PositionGrid) -> PositionGrid | None:
    """Grid whose positions the remaining tokens take; None if they are numbered like text."""
    (grid_plan,) = plan.grids
    if plan.is_identity or plan.keeps_positions:
        return grid
    return None if grid_plan.grid is None else grid._replace(rows=grid_plan.grid[0], columns=grid_plan.grid[1])


def _text(tokens: int) -> NDArray[np.int64]:
    return np.broadcast_to(np.arange(tokens), (3, tokens))
