"""What Qwen's vision-language models share: images of any size, one grid each, and M-RoPE.

The vision tower gives a token for 2 x 2 patches, in raster order. Qwen3-VL's adds *deepstack levels*, features of some
of its layers that the decoder's first layers take up: they are further columns of the tokens, and go their way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_transforms import to_pil_image
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItems
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import PromptUpdate

from foldserve.kernels.warm_up import Widths
from foldserve.reducers import METHODS
from foldserve.reducers.downsample import Downsample
from foldserve.reducers.geometry import Stage, VisionGeometry
from foldserve.reducers.item import ItemPlan, Layout, Part
from foldserve.reducers.method import BeforeTower
from foldserve.reducers.reduction import Positions, Reduction
from foldserve.server.engine.family import AfterTowerFamily
from foldserve.server.engine.mrope import GridPositions, grid_of, positions_taken
from foldserve.server.engine.processor import FoldProcessor, without_ours
from foldserve.server.engine.vision import Survivors

_STAGES = frozenset({Stage.BEFORE_TOWER, Stage.AFTER_TOWER, Stage.DECODER})
_GRIDS = "image_grid_thw"


class QwenVLFamily(AfterTowerFamily):
    """`Layout.shape` is (rows, columns) of the image's tokens.

    Tokens that stay keep their positions unless something else is asked for, since rows and columns are then numbers
    that the model has seen in training; a method that keeps a grid gives those of a smaller image.
    """

    shape_ints = 2
    sends_bytes = False  # vLLM does so for these models (`mm_device_do_normalize`)

    def __init__(self, model_config: ModelConfig) -> None:
        self._model_config = model_config

    @classmethod
    def of(cls, model_config: ModelConfig) -> QwenVLFamily:
        return cls(model_config)

    @cached_property
    def largest(self) -> Layout:
        info = MULTIMODAL_REGISTRY.get_processing_info(self._model_config)
        size = info.get_image_size_with_most_features()
        return self.layout(_grid(info, size.width, size.height, {}))

    def shape(self, images: Any, index: int, info: Any, kwargs: Mapping[str, object]) -> tuple[int, ...]:
        size = images.get_image_size(index)
        return _grid(info, size.width, size.height, kwargs)

    def layout(self, shape: tuple[int, ...]) -> Layout:
        rows, columns = shape
        return Layout((Part(_geometry(rows, columns)),), (rows, columns))

    def pixels(self, processed: Mapping[str, Any]) -> Sequence[Tensor]:
        return _each(processed["pixel_values"], processed[_GRIDS])

    def select(self, inputs: Mapping[str, Any], places: Sequence[int]) -> dict[str, Any]:
        pixels = _each(inputs["pixel_values"], inputs[_GRIDS])
        return {"pixel_values": torch.cat([pixels[i] for i in places]), _GRIDS: inputs[_GRIDS][places]}

    def widths(self, model_config: ModelConfig) -> Widths:
        vision, hidden = model_config.hf_config.vision_config, model_config.get_inputs_embeds_size()
        levels = len(getattr(vision, "deepstack_visual_indexes", ()))
        return Widths(hidden * (1 + levels), hidden // vision.num_heads, deciding=hidden)

    def grids(self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan]) -> list[list[Tensor]]:
        return [[image[None]] for image in model.unreduced(**inputs)]

    def deciding_columns(self, model: Any) -> int:
        return self._model_config.get_inputs_embeds_size()

    def pack(self, model: Any, grids: Sequence[Survivors], plan: ItemPlan) -> Survivors:
        (image,), (grid_plan,) = grids, plan.grids
        method = grid_plan.reducer
        if not isinstance(method, BeforeTower):
            return image
        assert grid_plan.grid is not None
        return image._replace(source=method.source(grid_of(plan), grid_plan.grid, image.source.device))

    def low_detail(self, default: Reduction, ratio: float) -> Reduction:
        """A smaller image, which saves the tower's time too."""
        return replace(default, method=Downsample.name, options=(), ratio=ratio, keep_tokens=None)

    def default_positions(self, reduction: Reduction) -> Positions:
        return "renumber" if METHODS[reduction.method].keeps_grid else "keep"

    def position_map(self, features: Sequence[Any]) -> GridPositions | None:
        return GridPositions.of(self, features)

    def positions_beyond_tokens(self, plan: ItemPlan) -> int:
        return positions_taken(plan) - plan.kept


class QwenImages(FoldProcessor):
    """Modifications beside `FoldProcessor`'s: fewer placeholders for a reduced image, and smaller images."""

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        plans = self.plans(mm_items, hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, without_ours(hf_processor_mm_kwargs), out_mm_kwargs)
        return [_shortened(update, plans) if update.modality == "image" and plans else update for update in updates]

    def _processed(
        self, mm_items: MultiModalDataItems, plans: Sequence[ItemPlan], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        """Images that are made smaller are processed apart, so that the least size of others is not theirs."""
        smaller = [i for i, plan in enumerate(plans) if isinstance(plan.grids[0].reducer, BeforeTower)]
        if smaller:
            others = [i for i in range(len(plans)) if i not in smaller]
            processed = super()._processed(_with_images(mm_items, others), [plans[i] for i in others], hf_kwargs)
            small = ImageProcessorItems([self._resized(mm_items["image"].get(i), plans[i]) for i in smaller])
            as_they_are = {**hf_kwargs, "do_resize": False}
            found = super()._processed(MultiModalDataItems({"image": small}), [], as_they_are)
            images = dict(zip(smaller, _images(found), strict=True)) | dict(
                zip(others, _images(processed) if others else [], strict=True)
            )
            each = [images[i] for i in range(len(plans))]
            processed["pixel_values"] = torch.cat([pixels for pixels, _ in each])
            processed[_GRIDS] = torch.stack([grid for _, grid in each])
        else:
            processed = super()._processed(mm_items, plans, hf_kwargs)
        if plans:
            self._check_grids(processed[_GRIDS], plans)
        return processed

    def _resized(self, image: Any, plan: ItemPlan) -> Image.Image:
        """To the grid of the plan, from what the client sent."""
        vision, grid = self.info.get_hf_config().vision_config, plan.grids[0].grid
        assert grid is not None
        token = vision.patch_size * vision.spatial_merge_size
        picture = image if isinstance(image, Image.Image) else to_pil_image(image)
        return picture.convert("RGB").resize((grid[1] * token, grid[0] * token), Image.Resampling.BICUBIC)

    def _check_grids(self, grids: Tensor, plans: Sequence[ItemPlan]) -> None:
        """Sizes were known before the HF processor ran: what it made of them has to agree."""
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        for (_, height, width), plan in zip(grids.tolist(), plans, strict=True):
            is_smaller = isinstance(plan.grids[0].reducer, BeforeTower)
            expected = plan.grids[0].grid if is_smaller else grid_of(plan)
            if (height // merge, width // merge) != expected:
                raise RuntimeError(f"an image of {expected} tokens by its size came out as {height} x {width} patches")


def _shortened(update: PromptUpdate, plans: Sequence[ItemPlan]) -> PromptUpdate:
    """vLLM's own, with as many of its tokens as stay."""
    stock: Any = update.content

    def shorter(index: int) -> list[int]:
        tokens: list[int] = stock(index)
        return tokens if plans[index].is_identity else tokens[:1] * plans[index].kept

    return replace(update, replacement=shorter)


def _with_images(mm_items: MultiModalDataItems, places: Sequence[int]) -> MultiModalDataItems:
    """The items, with these images alone."""
    others = {modality: items for modality, items in mm_items.items() if modality != "image"}
    images = {"image": ImageProcessorItems([mm_items["image"].get(i) for i in places])} if places else {}
    return MultiModalDataItems({**images, **others})


def _images(processed: BatchFeature) -> list[tuple[Tensor, Tensor]]:
    """(pixels, grid) of each image."""
    grids = processed[_GRIDS]
    return list(zip(_each(processed["pixel_values"], grids), grids, strict=True))


def _each(pixels: Tensor, grids: Tensor) -> Sequence[Tensor]:
    """(patches of all images, values) -> those of each image, whose grid is (1, rows, columns) of patches."""
    images: Sequence[Tensor] = pixels.split_with_sizes(grids.prod(-1).tolist())
    return images


def _grid(info: Any, width: int, height: int, kwargs: Mapping[str, object]) -> tuple[int, int]:
    """(rows, columns) of the tokens of an image of this size in pixels, by vLLM's own formula."""
    vision = info.get_hf_config().vision_config
    size, _ = info._get_vision_info(
        image_width=width, image_height=height, image_processor=info.get_image_processor(), mm_kwargs=kwargs
    )
    token = vision.patch_size * vision.spatial_merge_size
    return size.height // token, size.width // token


@lru_cache(maxsize=4096)
def _geometry(rows: int, columns: int) -> VisionGeometry:
    return VisionGeometry(rows * columns, (rows, columns), stages=_STAGES, varies=True)
