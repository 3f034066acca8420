"""What the engine has to know of a model family. Everything else of a reduction is the same for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.plan import Plan
from foldserve.server.engine.vision import Survivors


class Family(ABC):
    """One object per checkpoint.

    Attributes:
        geometry: of one image. Equal checkpoints share the object, which the caches of plans are keyed by.
    """

    geometry: VisionGeometry

    @classmethod
    @abstractmethod
    def of(cls, hf_config: PretrainedConfig) -> Family | None:
        """The family as this checkpoint's config describes it; None where it is a variant that can't be reduced.

        Raises:
            ValueError: the config is wrong.
        """

    @abstractmethod
    def encode(self, model: Any, pixels: Tensor, plans: Sequence[Plan]) -> Sequence[Survivors]:
        """Tower, projector and reduction: embeddings (plan.kept, hidden) of each image, each by its plan.

        Args:
            model: vLLM's model.
            pixels: (B, 3, H, W) as the tower takes them.
            plans: B, of which some remove tokens before the decoder.
        """
