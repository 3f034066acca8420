"""M-RoPE: rotary positions of three dimensions, time, row and column, of prompts with reduced images.

The host knows where each image begins and where text goes on after it, but not which tokens of an image stay where they
keep their positions: it puts those at the image's first position, and the runner adds row and column on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from foldserve.reducers.item import ItemPlan
from foldserve.server.engine.identity import ItemIdentity
from foldserve.server.engine.model import FoldModel
from foldserve.server.engine.positions import PositionMap

if TYPE_CHECKING:
    from foldserve.server.engine.family import Family


class GridPositions(PositionMap):
    """Tokens that stay keep row and column; everything else is where `MropeModel` says."""

    def __init__(self, columns: Mapping[int, int], beyond: int) -> None:
        """Takes the columns of each image that keeps its positions, by its place in the prompt."""
        self._columns, self.beyond = columns, beyond

    @classmethod
    def of(cls, family: Family, features: Sequence[Any]) -> GridPositions | None:
        """As `Family.position_map`."""
        columns, beyond = {}, 0
        for feature in features:
            plan = family.plan_of(feature)
            if plan is None:
                continue
            beyond += family.positions_beyond_tokens(plan)
            if ItemIdentity.parse(feature.identifier).full_length is not None:
                columns[feature.mm_position.offset] = grid_of(plan)[1]
        return cls(columns, beyond) if columns else None

    def shifts(self, start: int, end: int) -> NDArray[np.int64]:
        return np.zeros(end - start, np.int64)

    def places(self, feature: Any, source: torch.Tensor) -> torch.Tensor:
        columns = self._columns[feature.mm_position.offset]
        return torch.stack([torch.zeros_like(source), source // columns, source % columns])


class MropeModel(FoldModel):
    """Mixin before a model class of vLLM with M-RoPE. Modification: positions of prompts with reduced images.

    - tokens that keep theirs begin where the image does (`GridPositions` adds the rest), and text goes on as after the
      whole image;
    - of a method that keeps a grid, tokens have the positions of an image of that size;
    - others are numbered as text is: time, row and column alike.
    """

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[torch.Tensor, int]:
        """(3, tokens) int64 of a prompt, and what to add to a token's number from there on."""
        family = self.family
        plans = [None if family is None else family.plan_of(feature) for feature in mm_features]
        if all(plan is None or plan.is_identity for plan in plans):
            return super().get_mrope_input_positions(input_tokens, mm_features)
        parts: list[NDArray[np.int64]] = []
        done = following = 0  # tokens, and the position after them
        for feature, plan in sorted(zip(mm_features, plans, strict=True), key=lambda pair: pair[0].mm_position.offset):
            place = feature.mm_position
            text, end = place.offset - done, place.offset + place.length
            if plan is None or plan.is_identity:
                alone = replace(feature, mm_position=replace(place, offset=0))
                found, delta = super().get_mrope_input_positions(input_tokens[place.offset : end], [alone])
                own, taken = found.numpy(), place.length + delta
            else:
                own, taken = reduced_positions(plan), positions_taken(plan)
            parts += [_text(text) + following, own + following + text]
            done, following = end, following + text + taken
        parts.append(_text(len(input_tokens) - done) + following)
        positions = torch.from_numpy(np.concatenate(parts, axis=1))
        return positions, following - done


def grid_of(plan: ItemPlan) -> tuple[int, int]:
    """(rows, columns) of the unreduced image."""
    (part,) = plan.layout.parts
    assert part.geometry.grid is not None  # images of these models are grids
    return part.geometry.grid


def positions_taken(plan: ItemPlan) -> int:
    """Positions from an image's first token to the text behind it."""
    (grid_plan,) = plan.grids
    if plan.is_identity or plan.keeps_positions:
        return max(grid_of(plan))
    return max(grid_plan.grid) if grid_plan.grid is not None else plan.kept


def reduced_positions(plan: ItemPlan) -> NDArray[np.int64]:
    """(3, plan.kept) of a reduced image that begins at 0; only where it begins, if its tokens keep theirs."""
    (grid_plan,) = plan.grids
    if plan.keeps_positions:
        return np.zeros((3, plan.kept), np.int64)
    return _text(plan.kept) if grid_plan.grid is None else np.indices((1, *grid_plan.grid)).reshape(3, -1)


def _text(tokens: int) -> NDArray[np.int64]:
    return np.broadcast_to(np.arange(tokens), (3, tokens))
