"""What the model classes of all families share: per-image token reduction around vLLM's own tower and projector."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal
from vllm.transformers_utils.processor import cached_image_processor_from_config

from foldserve.kernels import ops
from foldserve.reducers.plan import InvalidReduction, Plan, make_plan
from foldserve.server.engine import positions, withdrawal
from foldserve.server.engine.encoder_budget import batches, profiled_images
from foldserve.server.engine.families.registry import family_of
from foldserve.server.engine.family import Family
from foldserve.server.engine.pixels import Normalize
from foldserve.server.engine.processor import DUMMY_FIELD, PLAN_FIELD
from foldserve.server.engine.refused_options import check_options
from foldserve.server.engine.vision import rows
from foldserve.server.settings import Environment, Settings


class FoldModel(SupportsMultiModal):
    """Mixin before a family's model class of vLLM. Modifications:

    - images may come as bytes;
    - `embed_multimodal` reduces each image by the plan that the processor sent with it, and refuses what the rest of
      the engine would not do: keep positions, or remove tokens in the decoder;
    - the tower and the projector run on as many images at a time as the profile run did, which tries the server's
      default reduction too;
    - with a withdrawal layer configured, the decoder is the withdrawing twin of the checkpoint's own;
    - on a GPU, where the environment asks for it, this process reduces with Triton kernels.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_options(vllm_config)
        withdrawal.select_decoder(vllm_config)
        ops.choose(torch.device(vllm_config.device_config.device_type), triton=Environment.read().wants_triton)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._vllm_config = vllm_config
        self._family = family_of(self.config)
        self.can_keep_positions = positions.limit(vllm_config) is not None
        self._withdraws = withdrawal.withdraw_layer(vllm_config) is not None
        if self._withdraws:
            self.get_model_state_cls = withdrawal.model_state_cls  # asked for by model runner V2 only

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """One (plan.kept, hidden) tensor per image, from as many images at a time as start-up has measured.

        vLLM's own path, bit for bit, when nothing is reduced.
        """
        rows_of_plans, is_dummy = kwargs.pop(PLAN_FIELD, None), kwargs.pop(DUMMY_FIELD, None) is not None
        pixels, family = kwargs.get("pixel_values"), self._family
        if not isinstance(rows_of_plans, torch.Tensor) or not isinstance(pixels, torch.Tensor) or family is None:
            return super().embed_multimodal(**kwargs)
        plans = [Plan.from_ints(row, family.geometry) for row in rows_of_plans.tolist()]  # on the CPU
        if not self.can_keep_positions and any(plan.keeps_positions for plan in plans):
            raise ValueError(positions.CANNOT_KEEP)
        if not self._withdraws and any(plan.decoder != "none" for plan in plans):
            raise ValueError("this engine has no layer K for methods in the decoder: see `withdrawal.configure`")
        if is_dummy and (default := self._default_plan) is not None:
            self._embed(family, pixels, [default] * len(plans))
        if len(plans) <= self._images_at_once:
            return self._embed(family, pixels, plans)
        embeds: dict[int, torch.Tensor] = {}
        for places in batches(plans, self._images_at_once):
            batch = self._embed(family, rows(pixels, places), [plans[i] for i in places])
            embeds |= zip(places, batch, strict=True)
        return [embeds[i] for i in range(len(plans))]

    def _embed(self, family: Family, pixels: torch.Tensor, plans: Sequence[Plan]) -> MultiModalEmbeddings:
        """Embeddings of images (B, 3, H, W) that share a batch."""
        pixels = self.normalized(pixels)
        if all(plan.is_identity for plan in plans):
            return super().embed_multimodal(pixel_values=pixels)
        image_input = self._parse_and_validate_image_input(pixel_values=pixels)
        assert image_input is not None and image_input["type"] == "pixel_values"
        images = family.encode(self, image_input["pixel_values"], plans)
        return [
            positions.attach(image.features, image.source) if plan.keeps_positions else image.features
            for image, plan in zip(images, plans, strict=True)
        ]

    def normalized(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) as the tower wants them, from bytes or as they are."""
        return self._normalize(pixel_values) if pixel_values.dtype == torch.uint8 else pixel_values

    @cached_property  # processing an image is not for the time when the weights are laid out
    def _images_at_once(self) -> int:
        return profiled_images(self._vllm_config)

    @cached_property
    def _default_plan(self) -> Plan | None:
        """Of the server's default reduction; None where that removes nothing, or can't be done: requests are told."""
        if self._family is None:
            return None
        reduction = Settings.from_config(self._vllm_config.additional_config).default_reduction
        try:
            plan = make_plan(reduction, self._family.geometry)
        except InvalidReduction:
            return None
        return None if plan.is_identity else plan

    @cached_property
    def _normalize(self) -> Normalize:
        image_processor = cached_image_processor_from_config(self._vllm_config.model_config)
        return Normalize(
            image_processor, self._vllm_config.model_config.dtype, next(self.vision_tower.parameters()).device
        )
