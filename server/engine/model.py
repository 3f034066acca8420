"""Common base of the model classes of all families: token reduction per image around vLLM's tower and projector."""

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
from foldserve.reducers.item import ItemPlan
from foldserve.server.engine import positions, withdrawal
from foldserve.server.engine.default_plan import default_plan
from foldserve.server.engine.encoder_budget import batches, encoder_budget
from foldserve.server.engine.families.registry import family_of
from foldserve.server.engine.family import PLAN_FIELDS, QUERY_FIELDS, Family, Modality
from foldserve.server.engine.pixels import Normalize
from foldserve.server.engine.processor import DUMMY_FIELD
from foldserve.server.engine.refused_options import check_options
from foldserve.server.engine.tower_graphs import SIZES, TowerGraphs, check_graphs, wants_graphs
from foldserve.server.engine.vision import KeptTokens
from foldserve.server.settings import Environment


class FoldModel(SupportsMultiModal):
    """Mixin before vLLM's model class of a family. Modifications:

    - images may come as bytes;
    - `embed_multimodal` reduces each image by the plan and query that the processor attached, and refuses plans that
      this engine cannot carry out: keeping positions, or removing tokens in the decoder;
    - tower and projector run on at most as many tokens as in the profile run, which also tries the server's default
      reduction;
    - images of the server's default reduction replay CUDA graphs if the configuration asks for these;
    - with a withdrawal layer configured, the decoder becomes a `WithdrawingDecoder`;
    - on a GPU, if the environment asks for it, reductions use Triton kernels, compiled before the server serves.
    """

    decoder_path = "language_model.model"  # the module that has the decoder's layers

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_options(vllm_config)
        check_graphs(vllm_config)
        _choose_kernels(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        withdrawal.withdraw(self, vllm_config, prefix)
        self._vllm_config = vllm_config
        self.family = family_of(vllm_config.model_config)
        self.can_keep_positions = positions.position_limit(vllm_config) is not None
        self._withdraws = withdrawal.withdraw_layer(vllm_config) is not None

    def get_model_state_cls(self) -> type[Any]:
        """For model runner V2 only."""
        if self._withdraws:
            from foldserve.server.engine.withdrawal.state_v2 import WithdrawingModelState

            return WithdrawingModelState
        from foldserve.server.engine import state_v2

        is_hybrid = self._vllm_config.model_config.is_hybrid
        return state_v2.FoldHybridState if is_hybrid else state_v2.FoldModelState

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """One (plan.kept, hidden) tensor per image or video, in batches no larger than start-up measured.

        Without reduction this is vLLM's own path, bit for bit.
        """
        is_dummy = kwargs.pop(DUMMY_FIELD, None) is not None
        rows_of_plans, ids = _pop_fields(kwargs, PLAN_FIELDS), _pop_fields(kwargs, QUERY_FIELDS)
        family = self.family
        if rows_of_plans is None or family is None:
            return super().embed_multimodal(**kwargs)
        plans = [family.read_plan(row.tolist()) for row in rows_of_plans]  # on the CPU
        if not self.can_keep_positions and any(plan.keeps_positions for plan in plans):
            raise ValueError(positions.CANNOT_KEEP)
        if not self._withdraws and any(plan.decoder != "none" for plan in plans):
            raise ValueError("this engine has no layer K for methods in the decoder: see `withdrawal.configure`")
        if is_dummy:
            defaults = [default_plan(self._vllm_config, family, plan.layout) for plan in plans]
            if defaults != plans:
                self._embed(family, kwargs, defaults)
        queries = self._query_embeds(ids)
        together = batches(plans, [plan.encoded for plan in plans], self._tokens_at_once)
        if (graphs := self.tower_graphs) is not None:
            together = [part for batch in together for part in graphs.parts(batch, plans)]
        if len(together) == 1:
            return self._embed(family, kwargs, plans, queries)
        embeds: dict[int, torch.Tensor] = {}
        for places in together:
            inputs = family.select(kwargs, places)
            own_queries = [queries[i] for i in places] if queries else []
            embeds |= zip(places, self._embed(family, inputs, [plans[i] for i in places], own_queries), strict=True)
        return [embeds[i] for i in range(len(plans))]

    def token_groups(self, **kwargs: Any) -> list[tuple[list[int], list[int]] | None]:
        """Where the tokens of one image or video go; takes what `embed_multimodal` takes.

        Returns:
            For each grid of `Family.kept_grids`: (group of each token, source of each group); None if all tokens stay.
        """
        kwargs.pop(DUMMY_FIELD, None)
        (row,), queries = _pop_fields(kwargs, PLAN_FIELDS), self._query_embeds(_pop_fields(kwargs, QUERY_FIELDS))
        family = self.family
        assert family is not None, "who asks has a plan"
        grids = family.kept_grids(self, self._pixels(family, kwargs), family.read_plan(row.tolist()), queries)
        return [
            None if grid.history is None else (grid.history.group().tolist(), grid.source.tolist()) for grid in grids
        ]

    def unreduced(self, **inputs: Any) -> MultiModalEmbeddings:
        """vLLM's own `embed_multimodal`."""
        return super().embed_multimodal(**inputs)

    def _query_embeds(self, ids: Sequence[Tensor] | None) -> Sequence[Tensor]:
        """Token ids of each image's query, on the device -> their decoder embeddings (m, hidden)."""
        if ids is None:
            return []
        embeds: Tensor = self._lookup(torch.cat([*ids]))
        return embeds.split_with_sizes([len(own) for own in ids])

    @cached_property
    def _lookup(self) -> Callable[[Tensor], Tensor]:
        """The decoder's embedding table without adapters: these depend on a step's tokens, but caches are shared."""
        decoder = self.get_language_model()
        wrapped = (module for module in decoder.modules() if isinstance(module, VocabParallelEmbeddingWithLoRA))
        return next((module.base_layer for module in wrapped), decoder.embed_input_ids)

    def _embed(
        self, family: Family, inputs: Mapping[str, Any], plans: Sequence[ItemPlan], queries: Sequence[Tensor] = ()
    ) -> MultiModalEmbeddings:
        """Embeddings of images that share a batch."""
        inputs = self._pixels(family, inputs)
        if (graphs := self.tower_graphs) is not None and graphs.take(plans):
            return graphs.replay(inputs["pixel_values"])
        return self._encode(family, inputs, plans, queries)

    def _encode(
        self, family: Family, inputs: Mapping[str, Any], plans: Sequence[ItemPlan], queries: Sequence[Tensor] = ()
    ) -> MultiModalEmbeddings:
        """`_embed` of normalized pixels, without CUDA graphs."""
        if all(plan.is_identity for plan in plans):
            return self.unreduced(**inputs)
        images = family.encode(self, inputs, plans, queries)
        _check_counts(images, plans)
        return [
            positions.attach(image.features, image.source) if plan.keeps_positions else image.features
            for image, plan in zip(images, plans, strict=True)
        ]

    def _pixels(self, family: Family, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The inputs with normalized pixels."""
        if not family.sends_bytes or "pixel_values" not in inputs:
            return inputs
        return {**inputs, "pixel_values": self.normalized(inputs["pixel_values"])}

    def normalized(self, pixel_values: Any) -> Any:
        """(B, ..., 3, H, W), or a list of (..., 3, H, W): uint8 becomes normalized floats, floats stay."""
        if isinstance(pixel_values, list):
            return [self.normalized(image) for image in pixel_values]
        return self._normalize(pixel_values) if pixel_values.dtype == torch.uint8 else pixel_values

    @cached_property  # processes a dummy image, which must not happen while the model is built
    def _tokens_at_once(self) -> int:
        return encoder_budget(self._vllm_config).tokens

    @cached_property  # see `_tokens_at_once`
    def tower_graphs(self) -> TowerGraphs | None:
        """Graphs of the server's default reduction, which the runner captures at start-up; None if not asked for."""
        family, model = self.family, self._vllm_config.model_config
        if family is None or not wants_graphs(self._vllm_config):
            return None
        plan, side = default_plan(self._vllm_config, family, family.largest), model.hf_config.vision_config.image_size
        count = max(1, min(max(SIZES), self._tokens_at_once // plan.encoded))
        pixels = torch.zeros(count, 3, side, side, dtype=model.dtype, device=self._tower_device)

        def embed(pixels: Tensor) -> MultiModalEmbeddings:
            return self._encode(family, {"pixel_values": pixels}, [plan] * len(pixels))

        return TowerGraphs(plan, embed, pixels)

    @cached_property
    def _normalize(self) -> Normalize:
        image_processor = cached_image_processor_from_config(self._vllm_config.model_config)
        return Normalize(image_processor, self._vllm_config.model_config.dtype, self._tower_device)

    @property
    def _tower_device(self) -> torch.device:
        return next(self.vision_tower.parameters()).device


def _pop_fields(kwargs: dict[str, Any], names: Mapping[Modality, str]) -> Any:
    """Remove the fields of these names; returns the one that the batch, which has one modality, contains."""
    fields = [kwargs.pop(name, None) for name in names.values()]
    return next((field for field in fields if field is not None), None)


def _check_counts(images: Sequence[KeptTokens], plans: Sequence[ItemPlan]) -> None:
    """Raises RuntimeError if the family packs other counts than it plans; vLLM would say the sum of a batch alone."""
    found, expected = [len(image.features) for image in images], [plan.kept for plan in plans]
    if found != expected:
        raise RuntimeError(f"{expected} embeddings were planned by the family's `layout`, but its `pack` made {found}")


def _choose_kernels(config: VllmConfig) -> None:
    device, model = torch.device(config.device_config.device_type), config.model_config
    family = family_of(model)
    if ops.select_kernels(device, triton=Environment.read().wants_triton) and family is not None:
        text = model.hf_config.get_text_config()
        decoder = None if withdrawal.withdraw_layer(config) is None else text.hidden_size
        warm_up(replace(family.widths(model), decoder=decoder), model.dtype, device)
