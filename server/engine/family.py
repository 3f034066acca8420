"""What the engine has to know of a model family. Everything else of a reduction is the same for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from types import MappingProxyType
from typing import Any, Literal, get_args

from torch import Tensor
from vllm.config import ModelConfig

from foldserve.kernels.warm_up import Widths
from foldserve.reducers import METHODS
from foldserve.reducers.item import ItemPlan, Layout
from foldserve.reducers.method import AcrossFrames, ScoringDecoder
from foldserve.reducers.plan import Plan
from foldserve.reducers.reduction import InvalidReduction, Positions, Reduction
from foldserve.server.engine.positions import PositionMap, SequencePositions
from foldserve.server.engine.regions import WHOLE, Box, Region, sides
from foldserve.server.engine.vision import Survivors, one_after_another, reduce_features, rows, untouched

Modality = Literal["image", "video"]
MODALITIES: Sequence[Modality] = get_args(Modality)

PLAN_FIELDS: Mapping[Modality, str] = MappingProxyType({"image": "image_plan", "video": "video_plan"})
"""Multimodal fields that carry `ItemPlan.to_ints()` of each image or video to the model, on the CPU."""

QUERY_FIELDS: Mapping[Modality, str] = MappingProxyType({"image": "image_query", "video": "video_query"})
"""Multimodal fields that carry the token ids of each item's query, of items whose plans ask for one."""

FRAME_OPTIONS = frozenset({"fps", "num_frames", "do_sample_frames"})
"""Options of an HF processor that choose a video's frames while it is processed."""

PIXEL_FIELDS: Mapping[Modality, str] = MappingProxyType({"image": "pixel_values", "video": "pixel_values_videos"})
"""What most HF processors of transformers call pixels."""

LOW_DETAIL_RATIO = 0.75
"""Of images sent with `"detail": "low"`, where nothing else is chosen."""


class Family(ABC):
    """One object per checkpoint.

    Attributes:
        modalities: what can be reduced.
        shape_ints: length of `Layout.shape`; 0 where every image has the layout `largest`, whatever its size.
        sends_bytes: images travel to the engine as bytes, see `pixels`; False where vLLM has its own way for that.
        media_tokens: texts of the tokens that stand for embeddings in a prompt, where config.json has no id for them.
    """

    modalities: tuple[Modality, ...] = ("image",)
    shape_ints: int = 0
    sends_bytes: bool = True
    media_tokens: Mapping[Modality, str] = MappingProxyType({})

    @classmethod
    @abstractmethod
    def of(cls, model_config: ModelConfig) -> Family | None:
        """The family as this checkpoint's config describes it; None where it is a variant that can't be reduced.

        Raises:
            ValueError: the config is wrong.
        """

    @cached_property
    def largest(self) -> Layout:
        """Of the image, see `unit`, that has the most tokens. A family whose images are all alike sets it."""
        raise NotImplementedError

    @property
    def takes_cells(self) -> bool:
        """Pixels can decide how much stays of an image: its cells are its tokens, see `cells`."""
        return self.largest.parts[0].geometry.takes_cells

    def row_width(self, model_config: ModelConfig) -> int:
        """Columns of an embedding in the encoder cache, without those of `positions.attach`."""
        return int(model_config.get_inputs_embeds_size())

    def widths(self, model_config: ModelConfig) -> Widths:
        """Of what is reduced, for kernels that are compiled before a server serves."""
        vision = model_config.hf_config.vision_config
        head = vision.hidden_size // vision.num_attention_heads
        return Widths(vision.hidden_size, head, embedding=self.row_width(model_config))

    @abstractmethod
    def encode(
        self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan], queries: Sequence[Tensor] = ()
    ) -> Sequence[Survivors]:
        """Tower, projector and reduction: embeddings (plan.kept, hidden) of each image, each by its plan.

        Args:
            model: vLLM's model.
            inputs: what vLLM's `embed_multimodal` takes, of one image per plan; pixels as the tower takes them.
            plans: of which some remove tokens before the decoder.
            queries: of each image, see `Seen`; none where no image has one.
        """

    @abstractmethod
    def left(
        self, model: Any, inputs: Mapping[str, Any], plan: ItemPlan, queries: Sequence[Tensor] = ()
    ) -> Sequence[Survivors]:
        """What is left of one image's grids: of those `regions` that are encoded, in their order.

        Args:
            plan: removes tokens before the decoder.
            queries: the image's, where it has one.
        """

    def regions(self, plan: ItemPlan, modality: Modality, size: tuple[int, int], info: Any) -> list[Region]:
        """The grids of an image or video, in the order of the prompt, and what each shows of it.

        Args:
            size: (width, height) in pixels.
            info: vLLM's processing info of the model.

        Raises:
            InvalidReduction: tokens of this model are no grid.
        """
        ((part, grid_plan),) = zip(plan.layout.parts, plan.grids, strict=True)
        names = [f"frame {i + 1}" for i in range(part.count)] if modality == "video" else [""] * part.count
        return [Region(name, *sides(part.geometry), self.box(size, info), grid_plan) for name in names]

    def box(self, size: tuple[int, int], info: Any) -> Box:
        """What of an image or picture of (width, height) pixels the tower sees."""
        return WHOLE

    def shape(self, images: Any, index: int, info: Any, kwargs: Mapping[str, object]) -> tuple[int, ...]:
        """What of an image's size decides its layout, `shape_ints` integers.

        Args:
            images: vLLM's `ImageProcessorItems` of a request.
            index: of the image.
            info: vLLM's processing info of the model.
            kwargs: the request's for the HF processor.
        """
        return ()

    def video_shape(self, videos: Any, index: int, info: Any, kwargs: Mapping[str, object]) -> tuple[int, ...] | None:
        """`shape` of a video; None where nobody knows before it is processed how many frames it will have."""
        raise NotImplementedError  # of families that have videos among their modalities

    def most_frames(self, reduction: Reduction) -> int | None:
        """Frames that a server takes of a video at most where it is reduced so; None: as many as the operator says."""
        return None

    def of_video(self, reduction: Reduction) -> Reduction:
        """What is asked of a video; raises InvalidReduction where only images can be reduced so."""
        if reduction.base_only:
            raise InvalidReduction("method 'base_only' is for images: videos have no base tile", "method")
        refuse_cells_of_video(reduction)
        return reduction

    @property
    def shortest_video(self) -> Layout:
        """Of a video of one frame, of any size."""
        return self.layout((1,))

    def of_image(self, reduction: Reduction, layout: Layout) -> Reduction:
        """What is asked of an image of this layout; raises InvalidReduction where it can't be reduced so."""
        if isinstance(METHODS[reduction.method], AcrossFrames):
            raise InvalidReduction(f"method {reduction.method!r} is for videos: reduce images by another one", "method")
        return reduction

    def cells(self, pixels: Tensor, layout: Layout) -> Tensor:
        """What the tower makes its tokens of: (rows, columns, values) of an image's `pixels`, of any order of values.

        Of families whose geometry `takes_cells`.
        """
        raise NotImplementedError

    def pixels(self, processed: Mapping[str, Any], modality: Modality) -> Sequence[Tensor]:
        """Of each image or video, in what an HF processor gives."""
        return list(processed[PIXEL_FIELDS[modality]])

    def select(self, inputs: Mapping[str, Any], places: Sequence[int]) -> dict[str, Any]:
        """What `embed_multimodal` takes, of some of its images or videos."""
        return {name: rows(value, places) for name, value in inputs.items()}

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Of an unreduced image of this shape."""
        return self.largest

    @property
    def sizes_matter(self) -> bool:
        """Whether an image's size decides how many tokens it has."""
        return self.shape_ints > 0

    @property
    def unit(self) -> Literal["image", "frame"]:
        """What `largest` is: of a model that takes no images, a frame of a video."""
        return "image" if "image" in self.modalities else "frame"

    def default_positions(self, reduction: Reduction) -> Positions:
        """Where nobody says whether tokens that stay keep their positions."""
        return "keep" if METHODS[reduction.first or reduction.method].keeps_positions else "renumber"

    def low_detail(self, default: Reduction, ratio: float | None) -> Reduction:
        """What `detail: "low"` asks for: by default the base tile where there is one, else the server's reduction.

        Args:
            default: the server's.
            ratio: that the operator chose for it, or None.
        """
        if ratio is None and self.largest.tiling is not None:
            return replace(
                default,
                method=Reduction().method,
                options=(),
                ratio=None,
                keep_tokens=None,
                first="base_only",
                query=None,
            )
        return default.with_ratio(LOW_DETAIL_RATIO if ratio is None else ratio)

    def with_positions(self, reduction: Reduction) -> Reduction:
        """The default where it is left open, as far as anything is removed."""
        if reduction.positions is not None or not reduction.acts_before_decoder:
            return reduction
        return replace(reduction, positions=self.default_positions(reduction))

    def position_map(self, features: Sequence[Any]) -> PositionMap | None:
        """Of a request with these multimodal features; None if all its tokens are where vLLM's runner puts them."""
        return SequencePositions.of(features)

    def frame_step(self, feature: Any) -> float:
        """Rotary positions from a video's frame to the next, of a multimodal feature; of M-RoPE models."""
        return 1.0

    def positions_beyond_tokens(self, plan: ItemPlan) -> int:
        """How many rotary positions an image takes beyond one for each of its tokens."""
        return plan.removed if plan.keeps_positions else 0

    def read_plan(self, ints: Sequence[int]) -> ItemPlan:
        """Inverse of `ItemPlan.to_ints`."""
        return ItemPlan.from_ints(ints[self.shape_ints :], self.layout(tuple(ints[: self.shape_ints])))

    def plan_of(self, feature: Any) -> ItemPlan | None:
        """Of a multimodal feature of a request; None where no plan came with it, or it has not come to this process."""
        field = None if feature.data is None else feature.data.get(PLAN_FIELDS.get(feature.modality))
        return None if field is None else self.read_plan(field.data.tolist())


class AfterTowerFamily(Family):
    """A family that is reduced after its tower, grid by grid, so that the tower's own layers need not be known."""

    @abstractmethod
    def grids(self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan]) -> list[list[Tensor]]:
        """Features of each image before reduction: for each part of `plan.laid_out`, (part.count, tokens, C)."""

    def deciding_columns(self, model: Any) -> int | None:
        """Of the features: those that methods look at; the others go the way of their token. None: all."""
        return None

    def project(self, model: Any, features: Sequence[Tensor]) -> Sequence[Tensor]:
        """Features (n, C) of all grids of some images, in order -> those of the decoder's width, token by token."""
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

    def encode(
        self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan], queries: Sequence[Tensor] = ()
    ) -> Sequence[Survivors]:
        grids = iter(self._left(model, inputs, plans, queries))
        counts = [sum(part.count for part in plan.laid_out.parts) for plan in plans]
        return [self.pack(model, list(islice(grids, n)), plan) for n, plan in zip(counts, plans, strict=True)]

    def left(
        self, model: Any, inputs: Mapping[str, Any], plan: ItemPlan, queries: Sequence[Tensor] = ()
    ) -> Sequence[Survivors]:
        return self._left(model, inputs, [plan], queries)

    def _left(
        self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan], queries: Sequence[Tensor]
    ) -> list[Survivors]:
        """What is left of the grids of all images, of the decoder's width."""
        whole: list[Survivors] = []
        grid_plans: list[Plan] = []
        for parts, plan in zip(self.grids(model, inputs, plans), plans, strict=True):
            for features, grid_plan in zip(parts, plan.grids, strict=True):
                whole += untouched(features)
                grid_plans += [grid_plan] * len(features)
        project, deciding = partial(self.project, model), self.deciding_columns(model)
        own_queries = of_each_grid(queries, [sum(part.count for part in plan.laid_out.parts) for plan in plans])
        return reduce_features(whole, grid_plans, project, deciding, queries=own_queries)


def of_each_grid(queries: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """The query of each grid, of images of so many grids."""
    return [query for query, count in zip(queries, counts, strict=False) for _ in range(count)]


class EqualGridsFamily(AfterTowerFamily):
    """An image is one part, whose grids vLLM's own model gives one after the other: tiles, or a video's frames."""

    def grids(self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan]) -> list[list[Tensor]]:
        each = zip(model.unreduced(**inputs), plans, strict=True)
        return [[item.view(plan.laid_out.parts[0].count, -1, item.shape[-1])] for item, plan in each]

    def pack(self, model: Any, grids: Sequence[Survivors], plan: ItemPlan) -> Survivors:
        (grid_plan,) = plan.grids
        return one_after_another(grids, grid_plan.encoded)


def refuse_choice_in_pieces(reduction: Reduction, pieces: str = "a video's frames") -> None:
    """Raises InvalidReduction where tokens are to be chosen among `pieces` between which the prompt has text."""
    if isinstance(METHODS.get(reduction.decoder or ""), ScoringDecoder):
        raise InvalidReduction(
            f"method {reduction.decoder!r} chooses among tokens that lie in one piece, and this model puts text "
            f"between {pieces}: withdraw them all, or reduce before the decoder",
            "method",
        )
    if isinstance(METHODS[reduction.method], AcrossFrames):
        raise InvalidReduction(
            f"method {reduction.method!r} chooses how many tokens each frame keeps once all are encoded, and this "
            f"model puts text between {pieces}, so that the prompt needs the numbers before: choose a method that "
            "works frame by frame",
            "method",
        )


def refuse_cells_of_video(reduction: Reduction) -> None:
    """Raises InvalidReduction where a video's pixels were to decide how many of its tokens stay."""
    if reduction.pruning is not None:
        raise InvalidReduction(
            f"method {reduction.pruning.name!r} is for images: it leaves a number of its own in each frame of a video, "
            "and all have to keep equally many; choose another method",
            "method",
        )


def asks_for_frames(info: Any, kwargs: Mapping[str, object]) -> bool:
    """Whether options of a request, or the operator's, have the HF processor choose a video's frames."""
    asked = info._merge_and_resolve_mm_processor_kwargs(kwargs).get("videos_kwargs", {})
    return bool(asked.keys() & FRAME_OPTIONS)
