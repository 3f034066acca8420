"""Which checkpoints are of which family. Modules are named as strings: what a process does not need is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

from transformers import PretrainedConfig

if TYPE_CHECKING:
    from foldserve.server.engine.family import Family


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a family lives.

    Attributes:
        module: its file in this package.
        family: the `Family` in it.
        model: the model class in it, which replaces vLLM's own of the architecture.
    """

    module: str
    family: str
    model: str

    @property
    def path(self) -> str:
        return f"{__package__}.{self.module}"

    @property
    def model_path(self) -> str:
        """As vLLM's registry takes it."""
        return f"{self.path}:{self.model}"


ENTRIES: Mapping[str, Entry] = MappingProxyType(
    {
        "LlavaForConditionalGeneration": Entry("llava", "LlavaFamily", "FoldLlavaForConditionalGeneration"),
        "LlavaNextForConditionalGeneration": Entry(
            "llava_next", "LlavaNextFamily", "FoldLlavaNextForConditionalGeneration"
        ),
        "LlavaStfForConditionalGeneration": Entry("llava_stf", "StfFamily", "FoldLlavaStfForConditionalGeneration"),
    }
)
"""By architecture, as config.json names it."""


def family_of(hf_config: PretrainedConfig) -> Family | None:
    """The family of a checkpoint; None for a model that foldserve does not reduce.

    Raises:
        ValueError: a checkpoint of the family whose config is wrong.
    """
    for architecture in hf_config.architectures or ():
        if (entry := ENTRIES.get(architecture)) is not None:
            family: Family | None = getattr(import_module(entry.path), entry.family).of(hf_config)
            return family
    return None
