"""What a method has to know of a model before it can count: the geometry of its vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Stage(Enum):
    """Where on an image's way a method removes tokens."""

    BEFORE_TOWER = "before_tower"
    IN_TOWER = "in_tower"
    AFTER_TOWER = "after_tower"
    PROJECTOR = "projector"
    DECODER = "decoder"


@dataclass(frozen=True, slots=True)
class VisionGeometry:
    """What one grid of vision tokens costs at ratio 0, and where it may be reduced on this model.

    Attributes:
        tokens: of the grid, that reach the decoder without reduction.
        grid: (rows, columns) of those tokens in raster order; None where they are no grid.
        layers: encoder layers that run, up to the one whose output is used.
        class_token: the tower has a class token, its token 0, which is dropped at its end.
        stages: where methods may work on this model; not in a decoder of which some layers keep a recurrent state.
        varies: with the image's size, so that a request can't know its counts: where an amount is beyond what a small
            grid has or a method can give, the next lower number of tokens stays, instead of a refusal.
        any_resolution: the model lays the tokens of its tiles out as squares, so that a square number has to stay.
        projector: name of the method that is trained into the checkpoint's projector, or None.
        takes_cells: the tower can run on some of the tokens alone, each from pixels of its own.
        shows_tower: what enters the projector is known too, beside what it gives.
        merges_patches: the tower ends in Qwen-VL's merger, which makes one token of 2 x 2 patches.
        windowed_layers: encoder layers that attend within windows, where an image's tokens can't be compared.
        behind_class_token: the tower's class token stands in front of the grid in the prompt, and stays.
        frames: of a video whose tokens, frame by frame, are reduced as one grid; 0 of other grids.
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
        """Encoder layers in which tokens may go."""
        return tuple(layer for layer in range(self.layers) if layer not in self.windowed_layers)
