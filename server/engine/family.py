"""What the engine has to know of a model family. Everything else of a reduction is the same for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from foldserve.reducers.item import ItemPlan, Layout
from foldserve.reducers.plan import Plan
from foldserve.server.engine.vision import Survivors, reduce_features, untouched


class Family(ABC):
    """One object per checkpoint.

    Attributes:
        largest: layout of the image that has the most tokens.
        shape_ints: length of `Layout.shape`; 0 where every image has the layout `largest`, whatever its size.
    """

    largest: Layout
    shape_ints: int = 0

    @classmethod
    @abstractmethod
    def of(cls, hf_config: PretrainedConfig) -> Family | None:
        """The family as this checkpoint's config describes it; None where it is a variant that can't be reduced.

        Raises:
            ValueError: the config is wrong.
        """

    @abstractmethod
    def encode(self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan]) -> Sequence[Survivors]:
        """Tower, projector and reduction: embeddings (plan.kept, hidden) of each image, each by its plan.

        Args:
            model: vLLM's model.
            inputs: what vLLM's `embed_multimodal` takes, of one image per plan; pixels as the tower takes them.
            plans: of which some remove tokens before the decoder.
        """

    def shape(self, images: Any, index: int, info: Any) -> tuple[int, ...]:
        """What of an image's size decides its layout, `shape_ints` integers.

        Args:
            images: vLLM's `ImageProcessorItems` of a request.
            index: of the image.
            info: vLLM's processing info of the model.
        """
        return ()

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Of an unreduced image of this shape."""
        return self.largest

    @property
    def sizes_matter(self) -> bool:
        """Whether an image's size decides how many tokens it has."""
        return self.shape_ints > 0

    def read_plan(self, ints: Sequence[int]) -> ItemPlan:
        """Inverse of `ItemPlan.to_ints`."""
        return ItemPlan.from_ints(ints[self.shape_ints :], self.layout(tuple(ints[: self.shape_ints])))


class AfterTowerFamily(Family):
    """A family that is reduced after its tower, grid by grid, so that the tower's own layers need not be known."""

    @abstractmethod
    def grids(self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan]) -> list[list[Tensor]]:
        """Features of each image's parts before reduction, each (part.count, tokens, C)."""

    def project(self, model: Any, features: Tensor) -> Tensor:
        """What is left of all grids, (n, C), to the decoder's width, token by token."""
        return features

    @abstractmethod
    def pack(self, model: Any, grids: Sequence[Survivors], plan: ItemPlan) -> Survivors:
        """What is left of an image's grids, and its separators, in the order of the prompt.

        Args:
            model: vLLM's model.
            grids: of all parts, (kept, hidden) each; `source` counts the tokens of the grid.
            plan: of the image.

        Returns:
            (plan.kept, hidden); `source` counts the embeddings of the unreduced image.
        """

    def encode(self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan]) -> Sequence[Survivors]:
        whole: list[Survivors] = []
        grid_plans: list[Plan] = []
        for parts, plan in zip(self.grids(model, inputs, plans), plans, strict=True):
            for features, grid_plan in zip(parts, plan.grids, strict=True):
                whole += untouched(features)
                grid_plans += [grid_plan] * len(features)
        left = reduce_features(whole, grid_plans)
        lengths = [len(grid.features) for grid in left]
        embeds = self.project(model, torch.cat([grid.features for grid in left])).split_with_sizes(lengths)
        grids = iter([grid._replace(features=own) for grid, own in zip(left, embeds, strict=True)])
        counts = [sum(part.count for part in plan.layout.parts) for plan in plans]
        return [self.pack(model, list(islice(grids, n)), plan) for n, plan in zip(counts, plans, strict=True)]
