"""LLaVA-NeXT-Video: videos only. Each frame is pooled and then reduced by the same plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import ModelConfig
from vllm.model_executor.models.llava_next_video import (
    LlavaNextVideoDummyInputsBuilder,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoMultiModalProcessor,
    LlavaNextVideoProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from foldserve.reducers.geometry import Stage, VisionGeometry
from foldserve.reducers.item import ItemPlan, Layout, Part, plan_item
from foldserve.reducers.reduction import Reduction
from foldserve.server.engine.families.llava import ImageTokens, geometry_of
from foldserve.server.engine.family import PIXEL_FIELDS, AfterTowerFamily, asks_for_frames
from foldserve.server.engine.model import FoldModel
from foldserve.server.engine.regions import Box, visible_box
from foldserve.server.engine.vision import KeptTokens, join_grids, project_together

TEXT_TOKENS = 1000
"""Tokens that the authors' demo reserves for text when it chooses the scaling of rotary positions."""


class LlavaNextVideoFamily(AfterTowerFamily):
    """`Layout.shape` is (frames,); `largest` is a video of one frame. `side` is a pooled frame's, in tokens."""

    modalities = ("video",)
    shape_ints = 1
    sends_bytes = False

    def __init__(self, side: int, context: int) -> None:
        stages = frozenset({Stage.AFTER_TOWER, Stage.DECODER})
        self._frame, self._context = VisionGeometry(side**2, (side, side), stages=stages, shows_tower=True), context
        self.largest = self.layout((1,))

    @classmethod
    def of(cls, model_config: ModelConfig) -> LlavaNextVideoFamily | None:
        hf_config = model_config.hf_config
        geometry = geometry_of(hf_config)
        if geometry is None or geometry.grid is None:
            return None
        return cls(geometry.grid[0] // hf_config.spatial_pool_stride, model_config.max_model_len)

    def video_shape(self, videos: Any, index: int, info: Any, kwargs: Mapping[str, object]) -> tuple[int, ...] | None:
        chosen_later = info.get_hf_processor().video_processor.do_sample_frames or asks_for_frames(info, kwargs)
        return None if chosen_later else (videos.get_num_frames(index),)

    def layout(self, shape: tuple[int, ...]) -> Layout:
        return Layout((Part(self._frame, shape[0], can_join=True),), shape)

    def most_frames(self, reduction: Reduction) -> int:
        """Frames that fit into the context after reduction, and into vLLM's profile run before it."""
        room, encoded = self._context - TEXT_TOKENS, self._context // self.largest.tokens
        fits = (n for n in range(encoded, 1, -1) if plan_item(reduction, self.layout((n,))).kept <= room)
        return next(fits, 1)

    def grids(self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan]) -> list[list[Tensor]]:
        videos = list(model._parse_and_validate_video_input(**inputs)[PIXEL_FIELDS["video"]])
        strategy = model.config.vision_feature_select_strategy
        frames = model.vision_tower(torch.cat(videos), feature_select_strategy=strategy)
        pooled = model.vision_resampler(frames)
        each = zip(pooled.split_with_sizes([len(video) for video in videos]), plans, strict=True)
        return [[video.reshape(plan.laid_out.parts[0].count, -1, video.shape[-1])] for video, plan in each]

    def project(self, model: Any, features: Sequence[Tensor]) -> Sequence[Tensor]:
        projected: Sequence[Tensor] = project_together(model.multi_modal_projector, features)
        return projected

    def pack(self, model: Any, grids: Sequence[KeptTokens], plan: ItemPlan) -> KeptTokens:
        return join_grids(grids, plan.grids[0].encoded)

    def box(self, size: tuple[int, int], info: Any) -> Box:
        return visible_box(info.get_hf_processor().video_processor, size)


class FoldLlavaNextVideoProcessingInfo(LlavaNextVideoProcessingInfo):
    """Modification: the number of tokens per pooled frame. vLLM also counts an incomplete last row and column."""

    def _get_num_frame_tokens(self, *, image_width: int, image_height: int) -> int:
        side = self.get_vision_encoder_info().get_patch_grid_length() // self.get_hf_config().spatial_pool_stride
        return int(side**2)


class FoldLlavaNextVideoMultiModalProcessor(ImageTokens, LlavaNextVideoMultiModalProcessor):
    """See `ImageTokens`."""


@MULTIMODAL_REGISTRY.register_processor(
    FoldLlavaNextVideoMultiModalProcessor,
    info=FoldLlavaNextVideoProcessingInfo,
    dummy_inputs=LlavaNextVideoDummyInputsBuilder,
)
class FoldLlavaNextVideoForConditionalGeneration(FoldModel, LlavaNextVideoForConditionalGeneration):
    """See `FoldModel`."""
