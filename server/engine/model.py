"""What the model classes of all families share: per-image token reduction around vLLM's own tower and projector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.lora.layers import VocabParallelEmbeddingWithLoRA
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal
from vllm.transformers_utils.processor import cached_image_processor_from_config

from foldserve.kernels import ops
from foldserve.kernels.warm_up import warm_up
from foldserve.reducers.item import ItemPlan, Layout, plan_item
from foldserve.reducers.pixelprune import Cells
from foldserve.reducers.plan import InvalidReduction, Reduction
from foldserve.server.engine import positions, withdrawal
from foldserve.server.engine.encoder_budget import batches, encoder_budget
from foldserve.server.engine.families.registry import family_of
from foldserve.server.engine.family import PLAN_FIELDS, QUERY_FIELDS, Family, Modality
from foldserve.server.engine.pixels import Normalize
from foldserve.server.engine.processor import DUMMY_FIELD
from foldserve.server.engine.refused_options import check_options
from foldserve.server.settings import Environment, Settings


class FoldModel(SupportsMultiModal):
    """Mixin before a family's model class of vLLM. Modifications:

    - images may come as bytes;
    - `embed_multimodal` reduces each image by the plan and query that the processor sent with it, and refuses what the
      rest of the engine would not do: keep positions, or remove tokens in the decoder;
    - the tower and the projector run on no more than the profile run did, which tries the server's default reduction
      too;
    - with a withdrawal layer configured, the decoder is the withdrawing one, made of the checkpoint's own;
    - on a GPU, where the environment asks for it, this process reduces with Triton kernels, compiled before it serves.

    Attributes:
        decoder_path: where the model has its decoder: the module with the layers.
    """

    decoder_path = "language_model.model"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_options(vllm_config)
        _choose_kernels(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        withdrawal.withdraw(self, vllm_config, prefix)
        self._vllm_config = vllm_config
        self.family = family_of(vllm_config.model_config)
        self.can_keep_positions = positions.limit(vllm_config) is not None
        self._withdraws = withdrawal.withdraw_layer(vllm_config) is not None

    def get_model_state_cls(self) -> type[Any]:
        """Asked for by model runner V2 only."""
        if self._withdraws:
            from foldserve.server.engine.withdrawal.state_v2 import WithdrawingModelState

            return WithdrawingModelState
        from foldserve.server.engine import state_v2

        is_hybrid = self._vllm_config.model_config.is_hybrid
        return state_v2.FoldHybridState if is_hybrid else state_v2.FoldModelState

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """One (plan.kept, hidden) tensor per image or video, from no more at a time than start-up has measured.

        vLLM's own path, bit for bit, when nothing is reduced.
        """
        is_dummy = kwargs.pop(DUMMY_FIELD, None) is not None
        rows_of_plans, ids = _popped(kwargs, PLAN_FIELDS), _popped(kwargs, QUERY_FIELDS)
        family = self.family
        if rows_of_plans is None or family is None:
            return super().embed_multimodal(**kwargs)
        plans = [family.read_plan(row.tolist()) for row in rows_of_plans]  # on the CPU
        if not self.can_keep_positions and any(plan.keeps_positions for plan in plans):
            raise ValueError(positions.CANNOT_KEEP)
        if not self._withdraws and any(plan.decoder != "none" for plan in plans):
            raise ValueError("this engine has no layer K for methods in the decoder: see `withdrawal.configure`")
        if is_dummy:
            defaults = [self._default_plan(plan.layout) for plan in plans]
            if defaults != plans:
                self._embed(family, kwargs, defaults)
        queries = self._query_embeds(ids)
        together = batches(plans, [plan.encoded for plan in plans], self._tokens_at_once)
        if len(together) == 1:
            return self._embed(family, kwargs, plans, queries)
        embeds: dict[int, torch.Tensor] = {}
        for places in together:
            inputs = family.select(kwargs, places)
            own_queries = [queries[i] for i in places] if queries else []
            embeds |= zip(places, self._embed(family, inputs, [plans[i] for i in places], own_queries), strict=True)
        return [embeds[i] for i in range(len(plans))]

    def token_groups(self, **kwargs: Any) -> list[tuple[list[int], list[int]] | None]:
        """Where the tokens of one image or video go, which its plan removes some of before the decoder.

        Args:
            kwargs: as of `embed_multimodal`.

        Returns:
            Of each grid, see `Family.left`: (group of each token, source of each group); None where all stay.
        """
        kwargs.pop(DUMMY_FIELD, None)
        (row,), queries = _popped(kwargs, PLAN_FIELDS), self._query_embeds(_popped(kwargs, QUERY_FIELDS))
        family = self.family
        assert family is not None, "who asks has a plan"
        grids = family.left(self, self._pixels(family, kwargs), family.read_plan(row.tolist()), queries)
        return [None if grid.trail is None else (grid.trail.group().tolist(), grid.source.tolist()) for grid in grids]

    def unreduced(self, **inputs: Any) -> MultiModalEmbeddings:
        """What vLLM's own model gives."""
        return super().embed_multimodal(**inputs)

    def _query_embeds(self, ids: Sequence[Tensor] | None) -> Sequence[Tensor]:
        """Token ids of each image's query, on the device -> their embeddings (m, hidden) in the decoder."""
        if ids is None:
            return []
        embeds: Tensor = self._lookup(torch.cat([*ids]))
        return embeds.split_with_sizes([len(own) for own in ids])

    @cached_property
    def _lookup(self) -> Callable[[Tensor], Tensor]:
        """The decoder's own embedding table: an adapter's rows go by the tokens of a step, and caches are for all."""
        decoder = self.get_language_model()
        wrapped = (module for module in decoder.modules() if isinstance(module, VocabParallelEmbeddingWithLoRA))
        return next((module.base_layer for module in wrapped), decoder.embed_input_ids)

    def _embed(
        self, family: Family, inputs: Mapping[str, Any], plans: Sequence[ItemPlan], queries: Sequence[Tensor] = ()
    ) -> MultiModalEmbeddings:
        """Embeddings of images that share a batch."""
        inputs = self._pixels(family, inputs)
        if all(plan.is_identity for plan in plans):
            return self.unreduced(**inputs)
        images = family.encode(self, inputs, plans, queries)
        return [
            positions.attach(image.features, image.source) if plan.keeps_positions else image.features
            for image, plan in zip(images, plans, strict=True)
        ]

    def _pixels(self, family: Family, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The inputs, with pixels as the tower takes them."""
        if not family.sends_bytes or "pixel_values" not in inputs:
            return inputs
        return {**inputs, "pixel_values": self.normalized(inputs["pixel_values"])}

    def normalized(self, pixel_values: Any) -> Any:
        """Images (B, ..., 3, H, W) or a list of (..., 3, H, W), as the tower wants them; bytes become floats."""
        if isinstance(pixel_values, list):
            return [self.normalized(image) for image in pixel_values]
        return self._normalize(pixel_values) if pixel_values.dtype == torch.uint8 else pixel_values

    @cached_property  # processing an image is not for the time when the weights are laid out
    def _tokens_at_once(self) -> int:
        return encoder_budget(self._vllm_config).tokens

    def _default_plan(self, layout: Layout) -> ItemPlan:
        """Of the server's default reduction; of none where that can't be done: requests are told.

        Where pixels decide, it is of an image of which nearly all stays.
        """
        reduction = Settings.from_config(self._vllm_config.additional_config).default_reduction
        cells = None if reduction.pruning is None else Cells.of(torch.arange(layout.tokens) < layout.tokens - 1)
        try:
            return plan_item(reduction, layout, cells)
        except InvalidReduction:
            return plan_item(Reduction(), layout)

    @cached_property
    def _normalize(self) -> Normalize:
        image_processor = cached_image_processor_from_config(self._vllm_config.model_config)
        return Normalize(
            image_processor, self._vllm_config.model_config.dtype, next(self.vision_tower.parameters()).device
        )


def _popped(kwargs: dict[str, Any], names: Mapping[Modality, str]) -> Any:
    """What a batch, which has one modality, has under these names."""
    fields = [kwargs.pop(name, None) for name in names.values()]
    return next((field for field in fields if field is not None), None)


def _choose_kernels(config: VllmConfig) -> None:
    device, model = torch.device(config.device_config.device_type), config.model_config
    family = family_of(model)
    if ops.choose(device, triton=Environment.read().wants_triton) and family is not None:
        text = model.hf_config.get_text_config()
        decoder = None if withdrawal.withdraw_layer(config) is None else text.hidden_size
        warm_up(replace(family.widths(model), decoder=decoder), model.dtype, device)
