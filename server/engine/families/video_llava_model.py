"""Video-LLaVA, which vLLM lacks: LLaVA-1.5 with a second tower for videos, in Hugging Face's checkpoint format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, VideoLlavaConfig, VideoLlavaProcessor
from vllm.config import VllmConfig
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaMultiModalProjector,
    LlavaProcessingInfo,
    init_vision_tower_for_llava,
)
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdate

from foldserve.server.engine.family import PIXEL_FIELDS

IMAGE, VIDEO = PIXEL_FIELDS["image"], PIXEL_FIELDS["video"]


class VideoLlavaProcessingInfo(LlavaProcessingInfo):
    def get_hf_config(self) -> VideoLlavaConfig:
        config: VideoLlavaConfig = self.ctx.get_hf_config(VideoLlavaConfig)
        return config

    def get_hf_processor(self, **kwargs: object) -> VideoLlavaProcessor:
        processor: VideoLlavaProcessor = self.ctx.get_hf_processor(VideoLlavaProcessor, **kwargs)
        return processor

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None, "video": None}

    def get_num_frame_tokens(self) -> int:
        """A frame's patches and its class token, which also goes to the decoder."""
        return int(self.get_vision_encoder_info().get_patch_grid_length() ** 2 + 1)

    def get_num_frames(self) -> int:
        """Number of frames in training videos."""
        return max(1, int(self.get_hf_config().video_seq_length // self.get_num_frame_tokens()))


class VideoLlavaDummyInputsBuilder(LlavaDummyInputsBuilder[VideoLlavaProcessingInfo]):
    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        video_token = self.info.get_hf_processor().video_token
        return super().get_dummy_text(mm_counts) + video_token * mm_counts.get("video", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        width, height = self.info.get_image_size_with_most_features()
        videos = self._get_dummy_videos(
            width=width,
            height=height,
            num_frames=self.info.get_num_frames(),
            num_videos=mm_counts.get("video", 0),
            overrides=mm_options.get("video"),
        )
        return {**super().get_dummy_mm_data(seq_len, mm_counts, mm_options), "video": videos}


class VideoLlavaMultiModalProcessor(LlavaMultiModalProcessor):
    """Modification to LLaVA's: videos, also of several lengths in one prompt."""

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        found, process = BatchFeature(), super()._call_hf_processor
        if images := hf_data.get("images"):
            found[IMAGE] = process({"images": images}, hf_kwargs)["pixel_values_images"]
        if videos := hf_data.get("videos"):
            assert isinstance(videos, Sequence)
            found[VIDEO] = [process({"videos": [video]}, hf_kwargs)[VIDEO][0] for video in videos]
        return found

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return {**fields, VIDEO: MultiModalFieldConfig.batched("video")}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        token, tokens = self.info.get_hf_config().video_token_index, self.info.get_num_frame_tokens()

        def placeholders(index: int) -> list[int]:
            frames = len(out_mm_kwargs["video"][index][VIDEO].data)  # as the HF processor left them
            return [token] * (tokens * frames)

        images = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        return [*images, PromptReplacement(modality="video", target=[token], replacement=placeholders)]


class VideoLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """Modification to LLaVA: a second tower for videos; both towers share the projector.

    A frame has 257 tokens, a class token and then its patches; an image has only patches.
    """

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_prefix={
            "model.image_tower.": "vision_tower.",
            "image_tower.": "vision_tower.",
            "model.video_tower.": "video_tower.",
        }
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return "<video>" if modality.startswith("video") else super().get_placeholder_str(modality, i)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        tokens = [config.image_token_index, config.video_token_index]
        self.configure_mm_token_handling(vocab_size=config.text_config.vocab_size, mm_token_ids=tokens)
        with self._mark_tower_model(vllm_config, "video"):
            self.video_tower = init_vision_tower_for_llava(
                config, quant_config, require_post_norm=False, prefix=maybe_prefix(prefix, "video_tower")
            )
        with self._mark_tower_model(vllm_config, {"image", "video"}):  # LLaVA's own projector is for images only
            self.multi_modal_projector = LlavaMultiModalProjector(
                vision_hidden_size=config.vision_config.hidden_size,
                text_hidden_size=config.text_config.hidden_size,
                projector_hidden_act=config.projector_hidden_act,
                multimodal_projector_bias=config.multimodal_projector_bias,
                quant_config=quant_config,
                prefix=maybe_prefix(prefix, "multi_modal_projector"),
            )

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        videos = kwargs.pop(VIDEO, None)
        if videos is None:
            return super().embed_multimodal(**kwargs)
        embeds = self.multi_modal_projector(self.frame_features(videos))
        return [video.flatten(0, 1) for video in embeds.split_with_sizes([len(video) for video in videos])]

    def frame_features(self, videos: Sequence[Tensor]) -> Tensor:
        """Videos (frames, 3, H, W) -> (frames of all, 1 + patches, C)."""
        features: Tensor = self.video_tower(torch.cat(list(videos)), feature_select_strategy="full")
        return features

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model",
            connector="multi_modal_projector",
            tower_model=["vision_tower", "video_tower"],
        )
