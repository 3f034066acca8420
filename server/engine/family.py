"""What differs between model families. Everything else of a reduction is the same for all of them."""

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
from foldserve.reducers.method import AcrossFrames, ScoredInDecoder
from foldserve.reducers.plan import Plan
from foldserve.reducers.reduction import InvalidReduction, Positions, Reduction
from foldserve.server.engine.positions import PositionMap, SequencePositions
from foldserve.server.engine.regions import WHOLE, Box, Region, sides
from foldserve.server.engine.vision import KeptTokens, all_kept, join_grids, reduce_features, take_members

Modality = Literal["image", "video"]
MODALITIES: Sequence[Modality] = get_args(Modality)

PLAN_FIELDS: Mapping[Modality, str] = MappingProxyType({"image": "image_plan", "video": "video_plan"})
"""Multimodal fields that carry each item's `ItemPlan.to_ints()` to the model, on the CPU."""

QUERY_FIELDS: Mapping[Modality, str] = MappingProxyType({"image": "image_query", "video": "video_query"})
"""Multimodal fields that carry the token ids of each item's query, if its plan asks for one."""

FRAME_OPTIONS = frozenset({"fps", "num_frames", "do_sample_frames"})
"""Options with which an HF processor chooses a video's frames itself."""

PIXEL_FIELDS: Mapping[Modality, str] = MappingProxyType({"image": "pixel_values", "video": "pixel_values_videos"})
"""Names of pixels in most HF processors."""

LOW_DETAIL_RATIO = 0.75  # default for images with `"detail": "low"`


class Family(ABC):
    """One object per checkpoint.

    Attributes:
        modalities: what can be reduced.
        shape_ints: length of `Layout.shape`; 0 if all images have the layout `largest`.
        sends_bytes: images travel to the engine as uint8, see module `pixels`.
        media_tokens: placeholder tokens as text, if config.json does not have their ids.
        is_capturable: CUDA graphs may hold `encode`: all images enter the tower in one shape, and methods that choose
            by the image's pixels, question or seed aside, nothing is read from the device or copied to it.
    """

    modalities: tuple[Modality, ...] = ("image",)
    shape_ints: int = 0
    sends_bytes: bool = True
    media_tokens: Mapping[Modality, str] = MappingProxyType({})
    is_capturable: bool = False

    @classmethod
    @abstractmethod
    def of(cls, model_config: ModelConfig) -> Family | None:
        """The family of a checkpoint; None for a variant that can't be reduced; ValueError if the config is wrong."""

    @cached_property
    def largest(self) -> Layout:
        """Layout of the image or frame (`unit`) with the most tokens. A family with a single layout assigns it."""
        raise NotImplementedError

    @property
    def takes_cells(self) -> bool:
        """Pixels can decide how much stays of an image: its cells are its tokens, see `cells`."""
        return self.largest.parts[0].geometry.takes_cells

    def row_width(self, model_config: ModelConfig) -> int:
        """Width of an embedding in the encoder cache, without the columns of `positions.attach`."""
        return int(model_config.get_inputs_embeds_size())

    def widths(self, model_config: ModelConfig) -> Widths:
        """Widths of the tensors that are reduced, for which kernels are compiled at start-up."""
        vision = model_config.hf_config.vision_config
        head = vision.hidden_size // vision.num_attention_heads
        return Widths(vision.hidden_size, head, embedding=self.row_width(model_config))

    @abstractmethod
    def encode(
        self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan], queries: Sequence[Tensor] = ()
    ) -> Sequence[KeptTokens]:
        """Tower, projector and reduction of some images: embeddings (plan.kept, hidden) of each.

        Args:
            model: vLLM's model.
            inputs: those of vLLM's `embed_multimodal`, one image per plan, with normalized pixels.
            plans: some of them remove tokens before the decoder.
            queries: one per image, see `SideInputs`; empty if no image has one.
        """

    @abstractmethod
    def kept_grids(
        self, model: Any, inputs: Mapping[str, Any], plan: ItemPlan, queries: Sequence[Tensor] = ()
    ) -> Sequence[KeptTokens]:
        """What stays of each encoded grid of one image, in the order of `regions`; the plan removes some tokens."""

    def regions(self, plan: ItemPlan, modality: Modality, size: tuple[int, int], info: Any) -> list[Region]:
        """The grids of an image or video of (width, height) pixels, in prompt order, and what each shows.

        Raises:
            InvalidReduction: this model's tokens are not a grid.
        """
        ((part, grid_plan),) = zip(plan.layout.parts, plan.grids, strict=True)
        names = [f"frame {i + 1}" for i in range(part.count)] if modality == "video" else [""] * part.count
        return [Region(name, *sides(part.geometry), self.box(size, info), grid_plan) for name in names]

    def box(self, size: tuple[int, int], info: Any) -> Box:
        """The part of an image or frame of (width, height) pixels that the tower sees."""
        return WHOLE

    def shape(self, images: Any, index: int, info: Any, kwargs: Mapping[str, object]) -> tuple[int, ...]:
        """`shape_ints` integers that determine the layout of images[index].

        Args:
            images: vLLM's `ImageProcessorItems` of a request.
            info: vLLM's processing info of the model.
            kwargs: the request's options for the HF processor.
        """
        return ()

    def video_shape(self, videos: Any, index: int, info: Any, kwargs: Mapping[str, object]) -> tuple[int, ...] | None:
        """`shape` of a video; None if the number of frames is unknown before processing."""
        raise NotImplementedError  # families with videos override it

    def most_frames(self, reduction: Reduction) -> int | None:
        """Most frames that a server samples from a video with this reduction; None: the operator's limit applies."""
        return None

    def of_video(self, reduction: Reduction) -> Reduction:
        """The reduction adapted to videos; raises InvalidReduction if it is for images only."""
        if reduction.base_only:
            raise InvalidReduction("method 'base_only' is for images: videos have no base tile", "method")
        refuse_cells_of_video(reduction)
        return reduction

    @property
    def shortest_video(self) -> Layout:
        """Layout of a video of one frame; its size does not matter."""
        return self.layout((1,))

    def of_image(self, reduction: Reduction, layout: Layout) -> Reduction:
        """The reduction adapted to an image of this layout; raises InvalidReduction if it does not allow it."""
        if isinstance(METHODS[reduction.method], AcrossFrames):
            raise InvalidReduction(f"method {reduction.method!r} is for videos: reduce images by another one", "method")
        return reduction

    def cells(self, pixels: Tensor, layout: Layout) -> Tensor:
        """An image's `pixels` as (rows, columns, values): the values from which the tower computes each token.

        For families whose geometry `takes_cells`. The order of the values does not matter.
        """
        raise NotImplementedError

    def pixels(self, processed: Mapping[str, Any], modality: Modality) -> Sequence[Tensor]:
        """Pixels of each image or video in an HF processor's output."""
        return list(processed[PIXEL_FIELDS[modality]])

    def select(self, inputs: Mapping[str, Any], places: Sequence[int]) -> dict[str, Any]:
        """Inputs of `embed_multimodal` for some of its images or videos."""
        return {name: take_members(value, places) for name, value in inputs.items()}

    def layout(self, shape: tuple[int, ...]) -> Layout:
        return self.largest

    @property
    def sizes_matter(self) -> bool:
        """Whether the number of tokens depends on the image's size."""
        return self.shape_ints > 0

    @property
    def unit(self) -> Literal["image", "frame"]:
        """What `largest` is: a frame if the model takes no images."""
        return "image" if "image" in self.modalities else "frame"

    def default_positions(self, reduction: Reduction) -> Positions:
        return "keep" if METHODS[reduction.first or reduction.method].keeps_positions else "renumber"

    def low_detail(self, default: Reduction, ratio: float | None) -> Reduction:
        """Reduction of `detail: "low"`: the base tile if there is one, else `default` with a higher ratio.

        Args:
            default: the server's reduction.
            ratio: the operator's choice, which has precedence.
        """
        if ratio is None and self.largest.tiling is not None:
            return Reduction(
                first="base_only",
                positions=default.positions,
                decoder=default.decoder,
                decoder_ratio=default.decoder_ratio,
            )
        return default.with_ratio(LOW_DETAIL_RATIO if ratio is None else ratio)

    def with_positions(self, reduction: Reduction, default: Positions | None = None) -> Reduction:
        """Fills in the default positions if none are given and tokens are removed before the decoder.

        Args:
            default: the operator's choice, which has precedence over the family's.
        """
        if reduction.positions is not None or not reduction.acts_before_decoder:
            return reduction
        return replace(reduction, positions=default or self.default_positions(reduction))

    def position_map(self, features: Sequence[Any]) -> PositionMap | None:
        """Positions of a request with these multimodal features; None if they are vLLM's."""
        return SequencePositions.of(features)

    def frame_step(self, feature: Any) -> float:
        """Rotary positions between two frames of a video, for M-RoPE models."""
        return 1.0

    def positions_beyond_tokens(self, plan: ItemPlan) -> int:
        """How many rotary positions an image takes beyond one per token."""
        return plan.removed if plan.keeps_positions else 0

    def read_plan(self, ints: Sequence[int]) -> ItemPlan:
        """Inverse of `ItemPlan.to_ints`."""
        return ItemPlan.from_ints(ints[self.shape_ints :], self.layout(tuple(ints[: self.shape_ints])))

    def plan_of(self, feature: Any) -> ItemPlan | None:
        """Plan of a request's multimodal feature; None if it has none, or if its data is not in this process."""
        field = None if feature.data is None else feature.data.get(PLAN_FIELDS.get(feature.modality))
        return None if field is None else self.read_plan(field.data.tolist())


class AfterTowerFamily(Family):
    """A family that is reduced grid by grid after its tower, without knowledge of the tower's layers."""

    @abstractmethod
    def grids(self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan]) -> list[list[Tensor]]:
        """Unreduced features of each image: (part.count, tokens, C) for each part of `plan.laid_out`."""

    def deciding_columns(self, model: Any) -> int | None:
        """How many leading columns of the features methods compare; None: all."""
        return None

    def project(self, model: Any, features: Sequence[Tensor]) -> Sequence[Tensor]:
        """(n, C) features of some grids -> (n, hidden), token by token."""
        return features

    @abstractmethod
    def pack(self, model: Any, grids: Sequence[KeptTokens], plan: ItemPlan) -> KeptTokens:
        """Join what is left of an image's grids, (kept, hidden) each, and its separators, in prompt order.

        `source` indexes a grid's tokens in `grids`, and the unreduced image's embeddings in the result.
        """

    def encode(
        self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan], queries: Sequence[Tensor] = ()
    ) -> Sequence[KeptTokens]:
        grids = iter(self._kept_grids(model, inputs, plans, queries))
        counts = [sum(part.count for part in plan.laid_out.parts) for plan in plans]
        return [self.pack(model, list(islice(grids, n)), plan) for n, plan in zip(counts, plans, strict=True)]

    def kept_grids(
        self, model: Any, inputs: Mapping[str, Any], plan: ItemPlan, queries: Sequence[Tensor] = ()
    ) -> Sequence[KeptTokens]:
        return self._kept_grids(model, inputs, [plan], queries)

    def _kept_grids(
        self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan], queries: Sequence[Tensor]
    ) -> list[KeptTokens]:
        """What is left of the grids of all images, projected."""
        whole: list[KeptTokens] = []
        grid_plans: list[Plan] = []
        for parts, plan in zip(self.grids(model, inputs, plans), plans, strict=True):
            for features, grid_plan in zip(parts, plan.grids, strict=True):
                whole += all_kept(features)
                grid_plans += [grid_plan] * len(features)
        project, deciding = partial(self.project, model), self.deciding_columns(model)
        own_queries = of_each_grid(queries, [sum(part.count for part in plan.laid_out.parts) for plan in plans])
        return reduce_features(whole, grid_plans, project, deciding, queries=own_queries)


def of_each_grid(queries: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Repeat each image's query for each of its grids."""
    return [query for query, count in zip(queries, counts, strict=False) for _ in range(count)]


class EqualGridsFamily(AfterTowerFamily):
    """A family whose images are one part of equal grids (tiles or frames), which vLLM's own model returns in order."""

    def grids(self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan]) -> list[list[Tensor]]:
        each = zip(model.unreduced(**inputs), plans, strict=True)
        return [[item.view(plan.laid_out.parts[0].count, -1, item.shape[-1])] for item, plan in each]

    def pack(self, model: Any, grids: Sequence[KeptTokens], plan: ItemPlan) -> KeptTokens:
        (grid_plan,) = plan.grids
        return join_grids(grids, grid_plan.encoded)


def refuse_choice_in_pieces(reduction: Reduction, pieces: str = "a video's frames") -> None:
    """Raises InvalidReduction if a method chooses among tokens of several `pieces` with text between them."""
    if isinstance(METHODS.get(reduction.decoder or ""), ScoredInDecoder):
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
    """Raises InvalidReduction for methods whose token counts depend on an image's pixels."""
    if reduction.pruning is not None:
        raise InvalidReduction(
            f"method {reduction.pruning.name!r} is for images: it leaves a number of its own in each frame of a video, "
            "and all have to keep equally many; choose another method",
            "method",
        )


def asks_for_frames(info: Any, kwargs: Mapping[str, object]) -> bool:
    """Whether options of the request or the operator make the HF processor choose a video's frames."""
    asked = info._merge_and_resolve_mm_processor_kwargs(kwargs).get("videos_kwargs", {})
    return bool(asked.keys() & FRAME_OPTIONS)
