"""Common base of Qwen's vision-language models: images and videos of any size, a grid per frame, and M-RoPE.

The vision tower gives a token for 2 x 2 patches, in raster order. Qwen3-VL adds *deepstack levels*: features of some
tower layers that are added in the decoder's first layers. They are further columns of the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_transforms import to_pil_image
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageProcessorItems, ImageSize, MultiModalDataItems, VideoProcessorItems
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from foldserve.kernels.warm_up import Widths
from foldserve.reducers import METHODS
from foldserve.reducers.downsample import Downsample
from foldserve.reducers.geometry import Stage, VisionGeometry
from foldserve.reducers.item import ItemPlan, Layout, Part
from foldserve.reducers.method import AfterProjector, BeforeTower, InTower
from foldserve.reducers.pixelprune import Cells
from foldserve.reducers.plan import Plan
from foldserve.reducers.reduction import InvalidReduction, Positions, Reduction
from foldserve.server.engine.family import (
    FRAME_OPTIONS,
    PIXEL_FIELDS,
    EqualGridsFamily,
    Modality,
    of_each_grid,
    refuse_cells_of_video,
    refuse_choice_in_pieces,
)
from foldserve.server.engine.mrope import GridPositions, PositionGrid, positions_taken
from foldserve.server.engine.processor import ShortenedRuns
from foldserve.server.engine.qwen_tower import encode_reducing, encode_showing_patches
from foldserve.server.engine.vision import KeptTokens, reduce_features, run_in_groups, take_members

_RECURRENT = "and some layers of this model's keep a recurrent state, which can't forget tokens that it has seen"
_GRIDS: Mapping[Modality, str] = {"image": "image_grid_thw", "video": "video_grid_thw"}


class QwenVLFamily(EqualGridsFamily):
    """`Layout.shape` is (rows, columns, frames) of tokens; a video's frames, each of two pictures, share one plan.

    By default tokens keep their positions, since the model was trained on such rows and columns. With a method that
    keeps a grid they get those of a smaller image instead.
    """

    modalities = ("image", "video")
    shape_ints = 3
    sends_bytes = False  # vLLM does so for these models (`mm_device_do_normalize`)

    def __init__(self, model_config: ModelConfig) -> None:
        self._model_config = model_config
        self._any_size = _any_size(model_config)
        self._image_grid = lru_cache(maxsize=4096)(_image_grid)  # a request's image is planned four times

    @classmethod
    def of(cls, model_config: ModelConfig) -> QwenVLFamily:
        return cls(model_config)

    @cached_property
    def largest(self) -> Layout:
        info = MULTIMODAL_REGISTRY.get_processing_info(self._model_config)
        return self.layout((*_image_grid(info, info.get_image_size_with_most_features()), 1))

    def shape(self, images: Any, index: int, info: Any, kwargs: Mapping[str, object]) -> tuple[int, ...]:
        size = images.get_image_size(index)
        return *(_image_grid(info, size, kwargs) if kwargs else self._image_grid(info, size)), 1

    def video_shape(self, videos: Any, index: int, info: Any, kwargs: Mapping[str, object]) -> tuple[int, ...] | None:
        video = videos.get(index)
        processor = info.get_hf_processor().video_processor
        pictures, metadata = video if isinstance(video, tuple) else (video, {})
        # vLLM uses the metadata for Qwen3-VL; for the others the HF processor decides
        chosen_later = (
            metadata.get("do_sample_frames", False) if self._has_text_between_frames else processor.do_sample_frames
        )
        asked = info._merge_and_resolve_mm_processor_kwargs(kwargs).get("videos_kwargs", {})
        if chosen_later or asked.keys() & FRAME_OPTIONS:
            return None
        size = VideoProcessorItems([pictures]).get_frame_size(0)  # vLLM's `videos` mistakes the pair for the pictures
        grid = _grid(info, processor, size, kwargs, len(pictures))
        return *grid, -(-len(pictures) // info.get_hf_config().vision_config.temporal_patch_size)

    def of_video(self, reduction: Reduction) -> Reduction:
        if isinstance(METHODS[reduction.method], BeforeTower):
            raise InvalidReduction(f"method {reduction.method!r} makes images smaller, not videos", "method")
        refuse_cells_of_video(reduction)
        if self._has_text_between_frames:
            refuse_choice_in_pieces(reduction)
        return reduction

    def layout(self, shape: tuple[int, ...]) -> Layout:
        return _layout(self._any_size, not self._has_text_between_frames, *shape)

    @property
    def shortest_video(self) -> Layout:
        return self.largest

    def pixels(self, processed: Mapping[str, Any], modality: Modality) -> Sequence[Tensor]:
        return _each(processed[PIXEL_FIELDS[modality]], processed[_GRIDS[modality]])

    def cells(self, pixels: Tensor, layout: Layout) -> Tensor:
        """A token's patches are adjacent; they hold an image's pixels twice, as two pictures of a video."""
        (part,) = layout.parts
        assert part.geometry.grid is not None
        return pixels.view(*part.geometry.grid, -1)

    def select(self, inputs: Mapping[str, Any], places: Sequence[int]) -> dict[str, Any]:
        modality: Modality = "image" if _GRIDS["image"] in inputs else "video"
        pixels = self.pixels(inputs, modality)
        others = {name: take_members(value, places) for name, value in inputs.items() if name != PIXEL_FIELDS[modality]}
        return {PIXEL_FIELDS[modality]: torch.cat([pixels[i] for i in places]), **others}

    def row_width(self, model_config: ModelConfig) -> int:
        levels = len(getattr(model_config.hf_config.vision_config, "deepstack_visual_indexes", ()))
        return super().row_width(model_config) * (1 + levels)

    def widths(self, model_config: ModelConfig) -> Widths:
        hidden, heads = super().row_width(model_config), model_config.hf_config.vision_config.num_heads
        return Widths(self.row_width(model_config), hidden // heads, deciding=hidden)

    def encode(
        self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan], queries: Sequence[Tensor] = ()
    ) -> Sequence[KeptTokens]:
        """Runs images or frames of one size and plan together through `qwen_tower` if vLLM's own tower will not do.

        That is if tokens are removed before or in the tower, or compared by the merger's input.
        """
        after_tower = super().encode

        def encode(group: _GridGroup | None, members: list[int]) -> Sequence[KeptTokens]:
            own = inputs if len(members) == len(plans) else self.select(inputs, members)
            own_queries = [queries[i] for i in members] if queries else []
            if group is None:
                return after_tower(model, own, [plans[i] for i in members], own_queries)
            counts = [plans[i].layout.parts[0].count for i in members]
            frames = iter(self._walked(model, own, group, of_each_grid(own_queries, counts)))
            left = [(plans[i], list(islice(frames, count))) for i, count in zip(members, counts, strict=True)]
            return [self.pack(model, own_frames, plan) for plan, own_frames in left]

        return run_in_groups(plans, _group, encode)

    def kept_grids(
        self, model: Any, inputs: Mapping[str, Any], plan: ItemPlan, queries: Sequence[Tensor] = ()
    ) -> Sequence[KeptTokens]:
        group = _group(plan)
        if group is None:
            return super().kept_grids(model, inputs, plan, queries)
        return self._walked(model, inputs, group, of_each_grid(queries, [plan.layout.parts[0].count]))

    def _walked(
        self, model: Any, inputs: Mapping[str, Any], group: _GridGroup, queries: Sequence[Tensor]
    ) -> list[KeptTokens]:
        """What is left of images or videos of one size; the tower treats a video's frames as images."""
        modality: Modality = "image" if _GRIDS["image"] in inputs else "video"
        _, height, width = inputs[_GRIDS[modality]][0].tolist()
        grid, pixels = (1, height, width), inputs[PIXEL_FIELDS[modality]]
        means: list[Tensor] | None = None
        if _compares_patches(group.plan):
            walked, means = encode_showing_patches(model.visual, pixels, grid, group.plan, group.cells)
        else:
            walked = encode_reducing(model.visual, pixels, grid, group.plan, group.cells)
        plans, deciding = [group.plan] * len(walked), self.deciding_columns(model)
        return reduce_features(walked, plans, width=deciding, tower=means, queries=queries)

    def deciding_columns(self, model: Any) -> int:
        return self._model_config.get_inputs_embeds_size()

    def pack(self, model: Any, grids: Sequence[KeptTokens], plan: ItemPlan) -> KeptTokens:
        (grid_plan,) = plan.grids
        method = grid_plan.reducer
        if isinstance(method, BeforeTower):
            assert grid_plan.grid is not None and grid_plan.whole_grid is not None
            (image,) = grids
            return image._replace(source=method.source(grid_plan.whole_grid, grid_plan.grid, image.source.device))
        return super().pack(model, grids, plan)

    def low_detail(self, default: Reduction, ratio: float | None) -> Reduction:
        """A smaller image, which also saves time in the tower."""
        return replace(super().low_detail(default, ratio), method=Downsample.name, options=(), first=None, query=None)

    def default_positions(self, reduction: Reduction) -> Positions:
        return "renumber" if METHODS[reduction.method].keeps_grid else "keep"

    def position_map(self, features: Sequence[Any]) -> GridPositions | None:
        return GridPositions.of(self, features)

    def frame_step(self, feature: Any) -> float:
        seconds = feature.data.get("second_per_grid_ts")
        if seconds is None:
            return 1.0
        return float(seconds.data) * getattr(self._model_config.hf_config.vision_config, "tokens_per_second", 1.0)

    def positions_beyond_tokens(self, plan: ItemPlan) -> int:
        """A video's frame rate is unknown here: assumes one position per frame, as at two frames a second."""
        rows, columns, frames = plan.layout.shape
        runs = frames if self._has_text_between_frames else 1
        return runs * positions_taken(plan, PositionGrid(frames // runs, rows, columns), plan.kept // runs) - plan.kept

    @property
    def _has_text_between_frames(self) -> bool:
        """Whether the prompt has text between a video's frames."""
        return self._model_config.hf_config.model_type.startswith("qwen3")


class QwenImages(ShortenedRuns):
    """Modification beside those of `ShortenedRuns`: smaller images."""

    def _processed(
        self,
        mm_items: MultiModalDataItems,
        planned: Mapping[Modality, Sequence[ItemPlan]],
        hf_kwargs: Mapping[str, object],
    ) -> BatchFeature:
        """Processes images that are made smaller separately, so that the minimum image size does not apply to them."""
        plans = planned.get("image", [])
        smaller = [i for i, plan in enumerate(plans) if isinstance(plan.grids[0].reducer, BeforeTower)]
        if smaller:
            others = [i for i in range(len(plans)) if i not in smaller]
            processed = super()._processed(_with_images(mm_items, others), planned, hf_kwargs)
            small = ImageProcessorItems([self._resized(mm_items["image"].get(i), plans[i]) for i in smaller])
            as_they_are = {**hf_kwargs, "do_resize": False}
            found = super()._processed(MultiModalDataItems({"image": small}), planned, as_they_are)
            images = dict(zip(smaller, _images(found), strict=True))
            if others:
                images |= zip(others, _images(processed), strict=True)
            each = [images[i] for i in range(len(plans))]
            processed["pixel_values"] = torch.cat([pixels for pixels, _ in each])
            processed[_GRIDS["image"]] = torch.stack([grid for _, grid in each])
        else:
            processed = super()._processed(mm_items, planned, hf_kwargs)
        for modality, made in planned.items():
            self._check_grids(processed[_GRIDS[modality]], made)
        return processed

    def _apply_stock(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        """Images without options go to the image processor alone; the full HF processor takes twice as long."""
        images = mm_items.get("image")
        if hf_kwargs or len(mm_items) > 1 or not images or not self._has_no_options:
            return super()._apply_stock(mm_items, hf_kwargs)
        data, passthrough = images.get_processor_data(), images.get_passthrough_data()
        processed = self.info.ctx.call_hf_processor(self.info.get_image_processor(), data) if data else None
        return self._finalize_hf_mm_data(data, hf_kwargs, passthrough, processed)

    @cached_property
    def _has_no_options(self) -> bool:
        """The operator gave no processor options; vLLM sets the two allowed ones, as its model scales pixels."""
        return self.info.ctx.get_merged_mm_kwargs({}).keys() <= {"do_normalize", "do_rescale"}

    def _resized(self, image: Any, plan: ItemPlan) -> Image.Image:
        """The client's image, resized to the plan's grid."""
        vision, grid = self.info.get_hf_config().vision_config, plan.grids[0].grid
        assert grid is not None
        token = vision.patch_size * vision.spatial_merge_size
        picture = image if isinstance(image, Image.Image) else to_pil_image(image)
        return picture.convert("RGB").resize((grid[1] * token, grid[0] * token), Image.Resampling.BICUBIC)

    def _check_grids(self, grids: Tensor, plans: Sequence[ItemPlan]) -> None:
        """The HF processor's grids have to agree with those planned from the sizes."""
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        for (frames, height, width), plan in zip(grids.tolist(), plans, strict=True):
            is_smaller = isinstance(plan.grids[0].reducer, BeforeTower)
            expected = (*plan.grids[0].grid, 1) if is_smaller and plan.grids[0].grid else plan.layout.shape
            if (height // merge, width // merge, frames) != expected:
                raise RuntimeError(f"an image of {expected} tokens by its size came out as {height} x {width} patches")


def _with_images(mm_items: MultiModalDataItems, places: Sequence[int]) -> MultiModalDataItems:
    """The items with only these images."""
    others = {modality: items for modality, items in mm_items.items() if modality != "image"}
    images = {"image": ImageProcessorItems([mm_items["image"].get(i) for i in places])} if places else {}
    return MultiModalDataItems({**images, **others})


def _images(processed: BatchFeature) -> list[tuple[Tensor, Tensor]]:
    """(pixels, grid) of each image."""
    grids = processed[_GRIDS["image"]]
    return list(zip(_each(processed["pixel_values"], grids), grids, strict=True))


def _each(pixels: Tensor, grids: Tensor) -> Sequence[Tensor]:
    """(patches of all items, values) -> one tensor per item; grids are (frames, rows, columns) of patches."""
    images: Sequence[Tensor] = pixels.split_with_sizes(grids.prod(-1).tolist())
    return images


def _image_grid(info: Any, size: ImageSize, kwargs: Mapping[str, object] = MappingProxyType({})) -> tuple[int, int]:
    return _grid(info, info.get_image_processor(), size, kwargs)


def _grid(
    info: Any, processor: Any, size: ImageSize, kwargs: Mapping[str, object], pictures: int | None = None
) -> tuple[int, int]:
    """(rows, columns) of the tokens of an image, or of a video of `pictures` pictures, by vLLM's formula."""
    vision = info.get_hf_config().vision_config
    resized, _ = info._get_vision_info(
        image_width=size.width,
        image_height=size.height,
        num_frames=pictures or 1,
        image_processor=processor,
        mm_kwargs=kwargs,
        modality="video" if pictures else "image",
    )
    token = vision.patch_size * vision.spatial_merge_size
    return resized.height // token, resized.width // token


class _GridGroup(NamedTuple):
    """The common properties of images that run through the tower together."""

    grid: tuple[int, int]
    plan: Plan
    cells: Cells | None


def _group(plan: ItemPlan) -> _GridGroup | None:
    """None if vLLM's own tower suffices."""
    (grid_plan,) = plan.grids
    (part,) = plan.layout.parts
    assert part.geometry.grid is not None
    acts = plan.cells is not None or isinstance(grid_plan.reducer, InTower) or _compares_patches(grid_plan)
    return _GridGroup(part.geometry.grid, grid_plan, plan.cells) if acts else None


def _compares_patches(plan: Plan) -> bool:
    """Whether the plan's method needs the merger's input."""
    return isinstance(plan.reducer, AfterProjector) and plan.reducer.needs_tower


def _any_size(model_config: ModelConfig) -> VisionGeometry:
    """The tower's geometry, without the fields that depend on an image."""
    vision, options = model_config.hf_config.vision_config, model_config.multimodal_config
    stages = {Stage.BEFORE_TOWER, Stage.IN_TOWER, Stage.AFTER_TOWER}
    if not model_config.is_hybrid:
        stages.add(Stage.DECODER)
    if options is not None and options.mm_encoder_attn_backend == AttentionBackendEnum.FLASHINFER:
        stages.remove(Stage.IN_TOWER)  # needs sequences in its own format, computed on the host
    takes_cells = Stage.IN_TOWER in stages  # both need `qwen_tower`
    whole = getattr(vision, "fullatt_block_indexes", range(vision.depth))  # of Qwen2.5-VL
    windowed = tuple(layer for layer in range(vision.depth) if layer not in whole)
    return VisionGeometry(
        0,
        layers=vision.depth,
        stages=frozenset(stages),
        decoder_refusal=_RECURRENT if model_config.is_hybrid else "",
        varies=True,
        takes_cells=takes_cells,
        windowed_layers=windowed,
        shows_tower=True,
        merges_patches=True,
    )


@lru_cache(maxsize=4096)
def _layout(any_size: VisionGeometry, can_join: bool, rows: int, columns: int, frames: int) -> Layout:
    geometry = replace(any_size, tokens=rows * columns, grid=(rows, columns))
    return Layout((Part(geometry, frames, can_join=can_join),), (rows, columns, frames))
