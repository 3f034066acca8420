"""Model runner V2: positions "keep", and padding rows that are never sampled.

The model names this state (`get_model_state_cls`), so it works with any worker. Tested with interpreted Triton kernels
on a CPU, not on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState
from vllm.v1.worker.gpu.states import RequestState

from foldserve.server.engine.padding_rows import PaddingRowsV2, masked_rows
from foldserve.server.engine.positions import (
    Chunk,
    PositionChanges,
    PositionMap,
    checked_position_map,
    position_changes,
    trained_positions,
)
from foldserve.server.engine.tower_graphs import graphs_of


class GatheringState(ModelState):
    """Modification: gathers embeddings without their position columns.

    Placed after `DefaultModelState` in the MRO, which gathers with `super()`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._position_maps: dict[str, PositionMap] = {}
        self._changes: PositionChanges | None = None

    def gather_mm_embeddings(
        self, input_batch: InputBatch, draft_lookahead: int = 0
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        embeds, is_embed = super().gather_mm_embeddings(input_batch, draft_lookahead)
        if any(name in self._position_maps for name in input_batch.req_ids):
            self._changes, embeds = position_changes(self._chunks(input_batch), embeds)
        return embeds, is_embed

    def _chunks(self, input_batch: InputBatch) -> Iterator[Chunk]:
        features, maps = self.encoder_cache.mm_features, self._position_maps
        starts = input_batch.num_computed_tokens_np.tolist()
        counts = input_batch.num_scheduled_tokens.tolist()
        for name, start, count in zip(input_batch.req_ids, starts, counts, strict=True):
            yield Chunk(features[name], maps.get(name), start, start + count)


class FoldModelState(DefaultModelState, GatheringState):
    """Modifications:

    - a model that can keep positions gets them from a separate buffer, which CUDA graphs may read; slot mapping and the
      sampler's random numbers use the batch's own positions, which stay. With M-RoPE vLLM has such a buffer already;
    - padding rows are never sampled if the configuration says so;
    - the model's `TowerGraphs` are captured.
    """

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        if self.supports_mm_inputs and (graphs := graphs_of(model)) is not None:
            self.encoder_runner.cudagraph_manager = graphs
        self._keeps_positions: bool = getattr(model, "can_keep_positions", False)
        self._positions: torch.Tensor | None = None
        if self._keeps_positions and self.rope_state is None:
            self._positions = torch.zeros(self.max_num_tokens, dtype=torch.int64, device=device)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        if not self._keeps_positions or new_req_data.sampling_params is None:
            return
        asked, limit = new_req_data.sampling_params.max_tokens or 0, trained_positions(self.model_config)
        found = checked_position_map(self.model.family, new_req_data.mm_features, new_req_data.prompt_len, asked, limit)
        if found is not None:
            self._position_maps[new_req_data.req_id] = found

    def remove_request(self, req_id: str) -> None:
        self._position_maps.pop(req_id, None)
        super().remove_request(req_id)

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, torch.Tensor | None]:
        inputs = super().prepare_inputs(input_batch, req_states)
        if self._positions is not None:
            positions = self._positions[: input_batch.num_tokens_after_padding]
            inputs["positions"] = positions.copy_(input_batch.positions)
        if self._changes is not None:
            self._changes.apply(inputs["positions"])
            self._changes = None
        return inputs

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return inputs if self._positions is None else {**inputs, "positions": self._positions[:num_tokens]}

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any] | None:
        if rows := masked_rows(self.vllm_config):
            sampler.logits_processors.append(PaddingRowsV2(torch.tensor(rows, device=self.device)))
        return super().custom_sampler(sampler)


class FoldHybridState(FoldModelState, MambaHybridModelState):
    """`FoldModelState` for models with recurrent layers."""
