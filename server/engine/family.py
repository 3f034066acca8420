"""What the engine has to know of a model family. Everything else of a reduction is the same for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from foldserve.reducers.item import ItemPlan, Layout
from foldserve.server.engine.vision import Survivors


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
