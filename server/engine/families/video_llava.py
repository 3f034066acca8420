"""Video-LLaVA: images as in LLaVA-1.5; each frame of a video is a grid after a class token, which stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY

from foldserve.reducers.geometry import Stage, VisionGeometry
from foldserve.reducers.item import ItemPlan, Layout, Part
from foldserve.reducers.method import AfterTower
from foldserve.reducers.plan import Plan
from foldserve.reducers.reduction import Reduction
from foldserve.server.engine.families.llava import ImageTokens, LlavaFamily, geometry_of
from foldserve.server.engine.families.video_llava_model import (
    VIDEO,
    VideoLlavaDummyInputsBuilder,
    VideoLlavaForConditionalGeneration,
    VideoLlavaMultiModalProcessor,
    VideoLlavaProcessingInfo,
)
from foldserve.server.engine.family import asks_for_frames, of_each_grid
from foldserve.server.engine.model import FoldModel
from foldserve.server.engine.vision import KeptTokens, all_kept, join_grids, project_together, reduce_features


class VideoLlavaFamily(LlavaFamily):
    """`Layout.shape` is (frames,), 0 for an image. `trained_frames` is the number of frames in training videos."""

    modalities = ("image", "video")
    shape_ints = 1
    sends_bytes = False  # its image processor computes with floats from the start
    is_capturable = False  # images and videos have towers of their own

    def __init__(self, geometry: VisionGeometry, trained_frames: int) -> None:
        super().__init__(geometry, "default")
        self._frame = VisionGeometry(
            geometry.tokens,
            geometry.grid,
            stages=frozenset({Stage.AFTER_TOWER, Stage.DECODER}),
            shows_tower=True,
            behind_class_token=True,
        )
        self._trained_frames = trained_frames
        self.largest = replace(self.largest, shape=(0,))

    @classmethod
    def of(cls, model_config: ModelConfig) -> VideoLlavaFamily:
        hf_config = model_config.hf_config
        geometry = geometry_of(hf_config)
        if geometry is None or not geometry.class_token or Stage.IN_TOWER not in geometry.stages:
            raise ValueError(
                "Video-LLaVA needs CLIP towers, vision_feature_select_strategy 'default' and one vision_feature_layer, "
                f"not {hf_config.vision_config.model_type!r}, {hf_config.vision_feature_select_strategy!r} and "
                f"{hf_config.vision_feature_layer}"
            )
        return cls(geometry, max(1, hf_config.video_seq_length // (geometry.tokens + 1)))

    def shape(self, images: Any, index: int, info: Any, kwargs: Mapping[str, object]) -> tuple[int, ...]:
        return (0,)

    def video_shape(self, videos: Any, index: int, info: Any, kwargs: Mapping[str, object]) -> tuple[int, ...] | None:
        chosen_later = info.get_hf_processor().video_processor.do_sample_frames or asks_for_frames(info, kwargs)
        return None if chosen_later else (videos.get_num_frames(index),)

    def layout(self, shape: tuple[int, ...]) -> Layout:
        (frames,) = shape
        return Layout((Part(self._frame, frames, separators=frames, can_join=True),), shape) if frames else self.largest

    def most_frames(self, reduction: Reduction) -> int:
        return self._trained_frames

    def encode(
        self, model: Any, inputs: Mapping[str, Any], plans: Sequence[ItemPlan], queries: Sequence[torch.Tensor] = ()
    ) -> Sequence[KeptTokens]:
        if VIDEO not in inputs:
            return super().encode(model, inputs, plans, queries)
        features = model.frame_features(inputs[VIDEO])  # (frames, 1 + patches, C)
        left = iter(_reduced(model, features, plans, queries))
        class_tokens = _each(model.multi_modal_projector(features[:, :1]), plans)
        return [
            _packed(own, [*islice(left, plan.laid_out.parts[0].count)], plan)
            for own, plan in zip(class_tokens, plans, strict=True)
        ]

    def kept_grids(
        self, model: Any, inputs: Mapping[str, Any], plan: ItemPlan, queries: Sequence[torch.Tensor] = ()
    ) -> Sequence[KeptTokens]:
        if VIDEO not in inputs:
            return super().kept_grids(model, inputs, plan, queries)
        return _reduced(model, model.frame_features(inputs[VIDEO]), [plan], queries)


def _each(features: torch.Tensor, plans: Sequence[ItemPlan]) -> Sequence[torch.Tensor]:
    """(frames of all videos, tokens, C) -> one tensor per video."""
    videos: Sequence[torch.Tensor] = features.split_with_sizes([plan.layout.shape[0] for plan in plans])
    return videos


def _reduced(
    model: Any, features: torch.Tensor, plans: Sequence[ItemPlan], queries: Sequence[torch.Tensor]
) -> list[KeptTokens]:
    """(frames of all videos, 1 + patches, C) -> what is left of each grid: a frame, or a whole video."""
    whole: list[KeptTokens] = []
    of_grids: list[Plan] = []
    for video, plan in zip(_each(features, plans), plans, strict=True):
        count = plan.laid_out.parts[0].count
        seen = video if _takes_class_token(plan.grids[0]) else video[:, 1:]
        whole += all_kept(seen.reshape(count, -1, video.shape[-1]))
        of_grids += [plan.grids[0]] * count
    own_queries = of_each_grid(queries, [plan.laid_out.parts[0].count for plan in plans])
    project = partial(project_together, model.multi_modal_projector)
    left = reduce_features(whole, of_grids, project, queries=own_queries)
    return [_patches(grid) if _takes_class_token(plan) else grid for grid, plan in zip(left, of_grids, strict=True)]


def _takes_class_token(plan: Plan) -> bool:
    return isinstance(plan.reducer, AfterTower) and plan.reducer.takes_class_token


def _patches(frame: KeptTokens) -> KeptTokens:
    """Remove the class token in front of a frame."""
    history = None if frame.history is None else frame.history._replace(leading=(1, 1))
    return KeptTokens(frame.features[1:], frame.source[1:] - 1, history)


def _packed(class_tokens: torch.Tensor, grids: Sequence[KeptTokens], plan: ItemPlan) -> KeptTokens:
    """A video from its class tokens (frames, 1, C) and what is left of its patches."""
    length = plan.layout.parts[0].geometry.tokens + 1  # of a frame
    if len(grids) == len(class_tokens):
        frames = zip(class_tokens, grids, strict=True)
        return join_grids([_prepend_class_token(first, grid) for first, grid in frames], length)
    (video,) = grids  # only the device knows how many tokens of a frame are left, so it sorts
    starts = torch.arange(0, plan.encoded, length, device=video.source.device)
    source, order = torch.cat([starts, video.source + video.source // (length - 1) + 1]).sort()
    return KeptTokens(torch.cat([class_tokens.flatten(0, 1), video.features])[order], source)


def _prepend_class_token(class_token: torch.Tensor, frame: KeptTokens) -> KeptTokens:
    """Put the class token (1, hidden) in front of a frame."""
    source = torch.cat([torch.zeros_like(frame.source[:1]), frame.source + 1])
    return KeptTokens(torch.cat([class_token, frame.features]), source)


class FoldVideoLlavaMultiModalProcessor(ImageTokens, VideoLlavaMultiModalProcessor):
    """See `ImageTokens`."""


@MULTIMODAL_REGISTRY.register_processor(
    FoldVideoLlavaMultiModalProcessor, info=VideoLlavaProcessingInfo, dummy_inputs=VideoLlavaDummyInputsBuilder
)
class FoldVideoLlavaForConditionalGeneration(FoldModel, VideoLlavaForConditionalGeneration):
    """See `FoldModel`."""
