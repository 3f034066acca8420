"""Base classes of reduction methods, one per stage at which tokens are removed."""

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
    "NO_SIDE_INPUTS",
    "QUERY_TOKENS",
    "AcrossFrames",
    "AfterLastLayer",
    "AfterProjector",
    "AfterTower",
    "BeforeTower",
    "InDecoder",
    "InProjector",
    "InTower",
    "Kind",
    "Method",
    "Preselection",
    "ScoredInDecoder",
    "SideInputs",
    "Stage",
    "Step",
]


QUERY_TOKENS = 64  # tokens of a query that methods use; the rest is cut off


class Kind(Enum):
    """What becomes of removed tokens. Benchmarks compare methods of the same kind."""

    MERGE = "merge"  # into tokens that stay
    DROP = "drop"
    INPUT = "input"  # the tower sees less of the image
    DECODER = "decoder"  # dropped or merged inside the decoder


class Step(NamedTuple):
    removed: int
    layer: int | None = None  # tower layer, from 0; None outside the tower


class Method(ABC):
    """Base of all methods; a method subclasses one of the classes below, which say where it works."""

    name: ClassVar[str]  # value of `reduction.method` in a request
    summary: ClassVar[str]  # one sentence for users
    paper: ClassVar[str] = ""  # title
    kind: ClassVar[Kind]
    stage: ClassVar[Stage]
    options: ClassVar[tuple[Option[Any], ...]] = ()  # fields of `reduction` beside those common to all methods
    is_seeded: ClassVar[bool] = False  # draws at random, seeded by the image
    keeps_grid: ClassVar[bool] = False  # the tokens that stay are a smaller grid
    keeps_positions: ClassVar[bool] = False  # the default of `positions` is "keep"
    takes_query: ClassVar[bool] = False  # chooses tokens by the question about the image, see `query_texts`
    decoder_half: ClassVar[str | None] = None  # name of the Decoder method that `decoder: true` adds

    def __init__(self, *values: Value) -> None:
        """Takes a value for each option, in order, or none for the defaults; each becomes an attribute."""
        self.values = values or tuple(option.default for option in self.options)
        for option, value in zip(self.options, self.values, strict=True):
            setattr(self, option.name, value)

    def resolved_options(self, geometry: VisionGeometry, *, keeps_positions: bool) -> tuple[Value, ...]:
        """Values of the options on this model, which decides those that are None.

        Raises:
            InvalidReduction: an option contradicts `positions`.
        """
        return self.values

    def check(self, geometry: VisionGeometry) -> None:
        """Raises InvalidReduction if the method does not work with this model."""
        if self.stage not in geometry.stages:
            fixed = f": its projector is {geometry.projector!r}, which needs every token in place"
            raise InvalidReduction(
                f"method {self.name!r} works {self.stage.value.replace('_', ' ')}, where this model can't be reduced"
                f"{fixed if geometry.projector else ''}",
                "method",
            )

    def removable(self, geometry: VisionGeometry, removed: int) -> int:
        """How many tokens are removed if `removed` > 0 are asked for; raises InvalidReduction if that is impossible."""
        return removed

    def grid(self, geometry: VisionGeometry, removed: int) -> tuple[int, int] | None:
        """(rows, columns) of the tokens that stay, for methods with `keeps_grid`."""
        return None

    def schedule(self, geometry: VisionGeometry, removed: int) -> tuple[Step, ...]:
        """The steps, in order, which together remove `removed` tokens."""
        return (Step(removed),)

    def query_texts(self, query: str) -> list[str]:
        """Parts of the query to tokenize one by one, for methods with `takes_query`."""
        return [query]


class Preselection(Method):
    """Decides which parts of an image the tower sees; a method after the tower may reduce these further (`a+b`)."""

    stage = Stage.BEFORE_TOWER


class BeforeTower(Method):
    """Resizes the image to `Plan.grid` before the tower."""

    stage = Stage.BEFORE_TOWER

    @abstractmethod
    def resize(self, pixels: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
        """(B, 3, H, W) -> (B, 3, rows * patch, columns * patch)."""

    @abstractmethod
    def source(self, whole: tuple[int, int], grid: tuple[int, int], device: torch.device) -> Tensor:
        """(rows * columns,) int64: the token of the `whole` grid whose place each token of `grid` takes."""

    @abstractmethod
    def group(self, whole: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """(tokens of `whole`,) int64 on the CPU: the token of `grid` that covers each one's place, -1 if none does."""


class InTower(Method):
    """Removes tokens in tower layers, between the attention's residual and the MLP."""

    stage = Stage.IN_TOWER
    proportional_attention: ClassVar[bool] = False  # later layers add ln(size) of each token to its key's logits
    needs_class_token: ClassVar[bool] = False
    lays_out_squares: ClassVar[bool] = False  # the paper lays out the kept tokens of a tile as a smaller square

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
                f"method {self.name!r} needs a class token, but this model's vision tower has none", "method"
            )

    @abstractmethod
    def schedule(self, geometry: VisionGeometry, removed: int) -> tuple[Step, ...]:
        """The steps, sorted by layer."""

    @abstractmethod
    def reduce(
        self, x: Tensor, sizes: Tensor, attention: LayerAttention, removed: tuple[int, ...], plan: Plan
    ) -> Reduced:
        """Remove sum(removed) tokens in one layer; `removed` has an entry per step of the plan in this layer.

        Args:
            x: (B, n, d) after the layer's attention; a class token comes first and stays first.
            sizes: (B, n) int64, original tokens in each token, as in the result.
        """


class AfterLastLayer(InTower):
    """Removes tokens after the last layer that runs, its MLP included, by the attention of that layer.

    `reduce` gets tokens in raster order behind the class token. It returns the `plan.kept` tokens for the projector,
    among them the class token if the method chooses so.
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
    """Removes tokens from the output of the tower, or of a projector that the checkpoint fixes."""

    stage = Stage.AFTER_TOWER

    @property
    def takes_class_token(self) -> bool:
        """`reduce` also gets the class token in front of the grid and returns it first."""
        return False

    @abstractmethod
    def reduce(self, x: Tensor, plan: Plan, width: int | None = None) -> Reduced:
        """(B, n, d) -> plan.kept tokens, compared by their first `width` columns (None: all)."""


class AcrossFrames(AfterTower):
    """Chooses among the tokens of all frames of a video: only the total is known before the video is encoded.

    `reduce` gets (B, plan.frames * tokens per frame, d), frame by frame.
    """

    kind = Kind.DROP

    @abstractmethod
    def min_kept(self, geometry: VisionGeometry) -> tuple[int, str]:
        """The least number of tokens that it keeps of a video, and what these are, for messages."""

    def check(self, geometry: VisionGeometry) -> None:
        super().check(geometry)
        if not geometry.frames:
            raise InvalidReduction(
                f"method {self.name!r} compares the frames of a video: choose another method for images", "method"
            )

    def removable(self, geometry: VisionGeometry, removed: int) -> int:
        tokens, (least, what) = geometry.tokens, self.min_kept(geometry)
        if tokens - removed < least:
            raise InvalidReduction(
                f"method {self.name!r} keeps {what} of a video, {least} of {tokens} tokens here, not "
                f"{tokens - removed}: give a ratio of at most {int(1e4 * (tokens - least) / tokens) / 1e4:g}",
                "ratio",
            )
        return removed


class SideInputs(NamedTuple):
    """What a method after the projector may see beside the projected tokens.

    Attributes:
        tower: (B, n, C), the projector's input; for a merger, the mean of the patches of each token. Only for methods
            with `needs_tower`.
        queries: per image (m, D), m >= 0: the decoder's embeddings of the query's tokens; None: no image has a query.
    """

    tower: Tensor | None = None
    queries: Sequence[Tensor] | None = None


NO_SIDE_INPUTS = SideInputs()


class AfterProjector(AfterTower):
    """Removes tokens after the projector, by their projected values."""

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
    def reduce(self, x: Tensor, plan: Plan, width: int | None = None, side: SideInputs = NO_SIDE_INPUTS) -> Reduced:
        """(B, n, D) of the decoder's width -> plan.kept tokens; see `AfterTower.reduce`."""


class InProjector(Method):
    """Trained into a checkpoint's projector, which fixes the number of tokens; requests cannot choose it."""

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


class InDecoder(Method):
    """Removes tokens from the decoder, from the server's withdrawal layer K on."""

    kind = Kind.DECODER
    stage = Stage.DECODER
    default_ratio: ClassVar[float | None] = None  # None: the share cannot be chosen

    def check(self, geometry: VisionGeometry) -> None:
        if self.stage not in geometry.stages:
            reason = geometry.decoder_refusal or "which this model does not allow"
            raise InvalidReduction(
                f"{self.name!r} removes tokens in the decoder, {reason}: choose a method before the decoder",
                "withdraw" if self.default_ratio is None else "method",
            )

    @abstractmethod
    def removed(self, tokens: int, ratio: float | None) -> int:
        """Tokens to remove from an image that has so many."""


class ScoredInDecoder(InDecoder):
    """Keeps the tokens to which the prompt's last token attends most in layer K - 1."""

    merges: ClassVar[bool] = False  # into tokens that stay, which needs the hidden states after layer K - 1

    @abstractmethod
    def reduce(self, x: Tensor, score: Tensor, removed: int) -> Reduced:
        """(1, n, d) tokens, (1, n) scores -> n - removed tokens, in order. Must be linear in x."""
