"""What a reduction method is: one class per stage, so that the type says where tokens go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from foldserve.reducers.geometry import Stage, VisionGeometry
from foldserve.reducers.options import Option, Value
from foldserve.reducers.refusal import InvalidReduction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from foldserve.reducers.attention import LayerAttention
    from foldserve.reducers.fold import Reduced
    from foldserve.reducers.plan import Plan

__all__ = [
    "ONLY_TOKENS",
    "QUERY_TOKENS",
    "AcrossFrames",
    "AfterLastLayer",
    "AfterProjector",
    "AfterTower",
    "BeforeTower",
    "Decoder",
    "InTower",
    "Kind",
    "Method",
    "Preselection",
    "Projector",
    "ScoringDecoder",
    "Seen",
    "Stage",
    "Step",
]


QUERY_TOKENS = 64
"""Of a query, that count: its first ones."""


class Kind(Enum):
    """What becomes of the tokens that go: methods of one kind are compared with each other."""

    MERGE = "merge"  # others take them up
    DROP = "drop"
    INPUT = "input"  # the tower sees less of the image
    DECODER = "decoder"  # they leave inside the decoder


class Step(NamedTuple):
    """One step of a method.

    Attributes:
        removed: tokens that it removes.
        layer: 0-based tower layer in which it does; None outside the tower.
    """

    removed: int
    layer: int | None = None


class Method(ABC):
    """One entry of the registry. Subclass one of the classes below, which say where the method works.

    Attributes:
        name: what a request writes in `reduction.method`.
        summary: one sentence for users.
        paper: title of the paper that defines it; "" if there is none.
        kind: what becomes of the tokens that go.
        stage: where it removes tokens.
        options: fields of `reduction` that it takes beside those that every method takes.
        seeded: its plans carry a seed that comes from the image.
        keeps_grid: the tokens that stay are a smaller grid.
        keeps_positions: tokens that stay keep their positions unless something else is asked for.
        takes_query: it chooses by the text that is asked about the image, which `query_texts` prepares.
        decoder_half: name of the Decoder method that `decoder: true` adds, if it has one.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str] = ""
    kind: ClassVar[Kind]
    stage: ClassVar[Stage]
    options: ClassVar[tuple[Option[Any], ...]] = ()
    seeded: ClassVar[bool] = False
    keeps_grid: ClassVar[bool] = False
    keeps_positions: ClassVar[bool] = False
    takes_query: ClassVar[bool] = False
    decoder_half: ClassVar[str | None] = None

    def __init__(self, *values: Value) -> None:
        """One value for each option, in their order, or none for their defaults; each is an attribute by its name."""
        self.values = values or tuple(option.default for option in self.options)
        for option, value in zip(self.options, self.values, strict=True):
            setattr(self, option.name, value)

    def settled(self, geometry: VisionGeometry, *, keeps_positions: bool) -> tuple[Value, ...]:
        """The options' values on this model, which decides those that are None.

        Args:
            keeps_positions: tokens that stay are to keep their positions in the decoder.

        Raises:
            InvalidReduction: an option and `positions` contradict each other.
        """
        return self.values

    def check(self, geometry: VisionGeometry) -> None:
        """Raises InvalidReduction if the model is not one that the method works with."""
        if self.stage not in geometry.stages:
            fixed = f": its projector is {geometry.projector!r}, which needs every token in place"
            raise InvalidReduction(
                f"method {self.name!r} works {self.stage.value.replace('_', ' ')}, where this model can't be reduced"
                f"{fixed if geometry.projector else ''}",
                "method",
            )

    def removable(self, geometry: VisionGeometry, removed: int) -> int:
        """Tokens that really go when `removed` > 0 of them are to go; raises InvalidReduction where none can."""
        return removed

    def grid(self, geometry: VisionGeometry, removed: int) -> tuple[int, int] | None:
        """(rows, columns) of the tokens that stay, of methods with `keeps_grid`."""
        return None

    def schedule(self, geometry: VisionGeometry, removed: int) -> tuple[Step, ...]:
        """The steps, in order; they remove `removed` tokens together."""
        return (Step(removed),)

    def query_texts(self, query: str) -> list[str]:
        """What of a query is to be tokenized, text by text, of methods with `takes_query`."""
        return [query]


class Preselection(Method):
    """Decides what of an image the tower sees; a method after the tower may reduce that further, as in `a+b`."""

    stage = Stage.BEFORE_TOWER


class BeforeTower(Method):
    """Makes the image smaller: the tower runs on the `grid` of patches of the plan."""

    stage = Stage.BEFORE_TOWER

    @abstractmethod
    def resize(self, pixels: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
        """(B, 3, H, W) -> (B, 3, rows * patch, columns * patch) for a grid of (rows, columns)."""

    @abstractmethod
    def source(self, whole: tuple[int, int], grid: tuple[int, int], device: torch.device) -> Tensor:
        """(rows * columns,) int64: which token of the `whole` grid each token of `grid` stands for."""

    @abstractmethod
    def group(self, whole: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """(whole rows * columns,) int64, on the CPU: the token of `grid` that shows each token's place, -1 if none."""


class InTower(Method):
    """Removes tokens in tower layers, after the attention's residual and before the MLP.

    Attributes:
        proportional_attention: ln(size) of each token is added to the logits of its key in the layers after.
        needs_class_token: the tower has to have one.
        lays_out_squares: its paper says how what stays of a tile is laid out: as a smaller square.
    """

    stage = Stage.IN_TOWER
    proportional_attention: ClassVar[bool] = False
    needs_class_token: ClassVar[bool] = False
    lays_out_squares: ClassVar[bool] = False

    def check(self, geometry: VisionGeometry) -> None:
        super().check(geometry)
        if geometry.any_resolution and not self.lays_out_squares:
            raise InvalidReduction(
                f"method {self.name!r} leaves no grid of tokens in a tile, but this model joins the grids of tiles and "
                "cuts off their padding: choose 'illava', whose authors say how, or a method after the tower",
                "method",
            )
        if self.needs_class_token and not geometry.class_token:
            raise InvalidReduction(
                f"method {self.name!r} needs a class token, which this model's tower has not", "method"
            )

    @abstractmethod
    def schedule(self, geometry: VisionGeometry, removed: int) -> tuple[Step, ...]:
        """The steps, by layer."""

    @abstractmethod
    def reduce(
        self, x: Tensor, sizes: Tensor, attention: LayerAttention, removed: tuple[int, ...], plan: Plan
    ) -> Reduced:
        """Removes tokens in one layer.

        Args:
            x: (B, n, d), the class token first if the tower has one; it stays first.
            sizes: (B, n) int64, original tokens in each token.
            attention: of this layer, whose output x holds already.
            removed: what each of the plan's steps in this layer removes.
            plan: of the images.

        Returns:
            n - sum(removed) tokens, sizes counting original tokens; `source` and `group` index x.
        """


class AfterLastLayer(InTower):
    """Removes tokens after the whole of the last layer that runs, by the attention of that layer.

    `reduce` gets x as the layer's MLP leaves it, in raster order behind the class token. It returns `plan.kept` tokens,
    those that go on to the projector; the class token is among them if the method chooses so.
    """

    def check(self, geometry: VisionGeometry) -> None:
        super().check(geometry)
        if geometry.layers - 1 in geometry.windowed_layers:
            raise InvalidReduction(
                f"method {self.name!r} compares all tokens by the attention of the vision tower's last layer, but this "
                "model's attends within windows: choose a method after the tower, such as 'folder'",
                "method",
            )

    def schedule(self, geometry: VisionGeometry, removed: int) -> tuple[Step, ...]:
        return (Step(removed, geometry.layers - 1),)


class AfterTower(Method):
    """Removes tokens from what the tower gives, or from what a fixed projector gives."""

    stage = Stage.AFTER_TOWER

    @property
    def takes_class_token(self) -> bool:
        """`reduce` gets the class token that the grid is behind, too, and gives it back, both times first."""
        return False

    @abstractmethod
    def reduce(self, x: Tensor, plan: Plan, width: int | None = None) -> Reduced:
        """(B, n, d) -> plan.kept tokens; without a class token, but see `takes_class_token`.

        Args:
            width: columns of x that decide; those behind go the way of their token. None: all decide.
        """


class AcrossFrames(AfterTower):
    """Chooses among the tokens of all frames of a video, so that only their total is known before it is encoded.

    `reduce` gets them as (B, frames * tokens of a frame, d), frame by frame; `Plan.frames` is their number.
    """

    kind = Kind.DROP

    @abstractmethod
    def least(self, geometry: VisionGeometry) -> tuple[int, str]:
        """The least number of tokens that it keeps of a video, and what they are."""

    def check(self, geometry: VisionGeometry) -> None:
        super().check(geometry)
        if not geometry.frames:
            raise InvalidReduction(
                f"method {self.name!r} compares the frames of a video: choose another method for images", "method"
            )

    def removable(self, geometry: VisionGeometry, removed: int) -> int:
        tokens, (least, what) = geometry.tokens, self.least(geometry)
        if tokens - removed < least:
            raise InvalidReduction(
                f"method {self.name!r} keeps {what} of a video, {least} of {tokens} tokens here, not "
                f"{tokens - removed}: give a ratio of at most {int(1e4 * (tokens - least) / tokens) / 1e4:g}",
                "ratio",
            )
        return removed


class Seen(NamedTuple):
    """What a method after the projector may look at beside the projected tokens; None of what it does not ask for.

    Attributes:
        tower: (B, n, C), what enters the projector; of a merger, the mean of the patches that it makes one token of.
        queries: of each image, (m, D): the decoder's embeddings of the tokens of its query; m may be 0, and is for all
            images where this is None.
    """

    tower: Tensor | None = None
    queries: Sequence[Tensor] | None = None


ONLY_TOKENS = Seen()
"""Of a method that asks for nothing more."""


class AfterProjector(AfterTower):
    """Removes tokens by what the projector makes of them: all are projected, also where others go before it.

    Attributes:
        needs_tower: `Seen.tower` is given; so is `Seen.queries` to methods with `takes_query`.
    """

    needs_tower: ClassVar[bool] = False

    def check(self, geometry: VisionGeometry) -> None:
        super().check(geometry)
        if self.needs_tower and not geometry.shows_tower:
            raise InvalidReduction(
                f"method {self.name!r} also compares what enters the projector, which of this model is not known here: "
                "choose another method",
                "method",
            )

    @abstractmethod
    def reduce(self, x: Tensor, plan: Plan, width: int | None = None, seen: Seen = ONLY_TOKENS) -> Reduced:
        """(B, n, D) of the decoder's width -> plan.kept tokens; see `AfterTower.reduce`."""


class Projector(Method):
    """Trained into a checkpoint's projector, which fixes the number of tokens: a request cannot choose it."""

    kind = Kind.MERGE
    stage = Stage.PROJECTOR

    def check(self, geometry: VisionGeometry) -> None:
        if geometry.projector != self.name:
            raise InvalidReduction(
                f"method {self.name!r} is trained into a checkpoint's projector, and this model's has none: choose "
                "another method",
                "method",
            )

    def removable(self, geometry: VisionGeometry, removed: int) -> int:
        raise InvalidReduction(
            f"method {self.name!r} gives {geometry.tokens} tokens per image, as the checkpoint was trained: leave the "
            "amount out, or choose another method to reduce these",
            "ratio",
        )


class Decoder(Method):
    """Removes tokens from the decoder's layers from the server's withdrawal layer K on.

    Attributes:
        default_ratio: share that is removed where the request names none; None if the share can't be chosen.
    """

    kind = Kind.DECODER
    stage = Stage.DECODER
    default_ratio: ClassVar[float | None] = None

    def check(self, geometry: VisionGeometry) -> None:
        if self.stage not in geometry.stages:
            raise InvalidReduction(
                f"{self.name!r} removes tokens in the decoder, and some layers of this model's keep a recurrent state, "
                "which can't forget tokens that it has seen: choose a method before the decoder",
                "withdraw" if self.default_ratio is None else "method",
            )

    @abstractmethod
    def removed(self, tokens: int, ratio: float | None) -> int:
        """How many of an image's tokens go."""


class ScoringDecoder(Decoder):
    """Keeps some of an image's tokens, by the attention that the prompt's last token gives them in layer K - 1.

    Attributes:
        merges: tokens that stay take up those that go, so that they have to be what layer K - 1 makes of them.
    """

    merges: ClassVar[bool] = False

    @abstractmethod
    def reduce(self, x: Tensor, score: Tensor, removed: int) -> Reduced:
        """x (1, n, d), score (1, n) -> the n - removed tokens that stay, in order; linear in x."""
