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

    Attributes:
        tokens: tokens of the grid that reach the decoder.
        grid: (rows, columns) of those tokens in raster order; None if they are not a grid.
        layers: encoder layers that run, up to the one whose output is used.
        class_token: token 0 of the tower is a class token, which the tower drops at its end.
        stages: where methods may work; not DECODER if some decoder layers keep a recurrent state.
        varies: the grid depends on the image's size, which the client may not know. An impossible amount is then
            lowered to the next possible number of tokens instead of refused.
        any_resolution: the model lays out the tokens of each tile as a square, so the kept number must be a square.
        projector: name of the method that the checkpoint's projector was trained with.
        takes_cells: the tower can run on a subset of the tokens, each with its own pixels.
        shows_tower: methods can see the projector's input beside its output.
        merges_patches: the tower ends in Qwen-VL's merger, which makes one token of 2 x 2 patches.
        windowed_layers: encoder layers with windowed attention, in which not all tokens can be compared.
        behind_class_token: the class token stays, in front of the grid in the prompt.
        frames: number of frames, if the grid is a whole video, frame by frame; else 0.
    """

    tokens: int
    grid: tuple[int, int] | None = None
    layers: int = 0
    class_token: bool = False
    stages: frozenset[Stage] = frozenset(Stage) - {Stage.PROJECTOR}
    varies: bool = False
    any_resolution: bool = False
    projector: str | None = None
    takes_cells: bool = False
    shows_tower: bool = False
    merges_patches: bool = False
    windowed_layers: tuple[int, ...] = ()
    behind_class_token: bool = False
    frames: int = 0

    @property
    def reducing_layers(self) -> tuple[int, ...]:
        """Encoder layers in which tokens may be removed."""
        return tuple(layer for layer in range(self.layers) if layer not in self.windowed_layers)
