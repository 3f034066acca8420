"""What a method has to know about a model to compute token counts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Stage(Enum):
    """Where a method removes tokens."""

    BEFORE_TOWER = "before_tower"
    IN_TOWER = "in_tower"
    AFTER_TOWER = "after_tower"
    PROJECTOR = "projector"
    DECODER = "decoder"


@dataclass(frozen=True, slots=True)
class VisionGeometry:
    """One grid of vision tokens without reduction, and where this model allows to reduce it.

    If the grid `varies` with the image's size, which the client may not know, an impossible amount is lowered to the
    next possible number of tokens instead of refused.
    """

    tokens: int  # of the grid, that reach the decoder
    grid: tuple[int, int] | None = None  # (rows, columns) of those tokens in raster order
    layers: int = 0  # encoder layers that run, up to the one whose output is used
    class_token: bool = False  # token 0 of the tower is a class token, which the tower drops at its end
    stages: frozenset[Stage] = frozenset(Stage) - {Stage.PROJECTOR}  # where methods may work
    decoder_refusal: str = ""  # if `stages` has no decoder: why, as the middle of a sentence
    varies: bool = False
    any_resolution: bool = False  # the tokens of each tile are laid out as a square: the kept number must be a square
    projector: str | None = None  # name of the method that the checkpoint's projector was trained with
    takes_cells: bool = False  # the tower can run on a subset of the tokens, each with its own pixels
    shows_tower: bool = False  # methods can see the projector's input beside its output
    merges_patches: bool = False  # the tower ends in Qwen-VL's merger, which makes one token of 2 x 2 patches
    windowed_layers: tuple[int, ...] = ()  # encoder layers with windowed attention, where not all tokens compare
    behind_class_token: bool = False  # the class token stays, in front of the grid in the prompt
    frames: int = 0  # number of frames, if the grid is a whole video, frame by frame

    @property
    def reducing_layers(self) -> tuple[int, ...]:
        """Encoder layers in which tokens may be removed."""
        return tuple(layer for layer in range(self.layers) if layer not in self.windowed_layers)
