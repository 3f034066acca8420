"""Model runner V2: passes the deep part of each step to the attention metadata builders."""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.utils import AttentionGroup

from foldserve.server.engine.state_v2 import FoldModelState
from foldserve.server.engine.withdrawal.batch import BatchMaps, DeepBatch
from foldserve.server.engine.withdrawal.core import TokenMap
from foldserve.server.engine.withdrawal.metadata import deep_step


class WithdrawingModelState(FoldModelState):
    """Modification: metadata of the deep layers is built for their part of the step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._token_maps: dict[str, TokenMap] = {}
        self._batch_maps = BatchMaps([])

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        self._token_maps[new_req_data.req_id] = TokenMap.of(new_req_data.mm_features, new_req_data.prompt_len)

    def remove_request(self, req_id: str) -> None:
        self._token_maps.pop(req_id, None)
        super().remove_request(req_id)

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: Any,
        block_tables: Any,
        slot_mappings: Any,
        attn_groups: list[list[AttentionGroup]],
        *args: Any,
        for_capture: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        batch = None if for_capture else self._deep_batch(input_batch)
        with deep_step(attn_groups, batch):
            metadata: dict[str, Any] = super().prepare_attn(
                input_batch,
                cudagraph_mode,
                block_tables,
                slot_mappings,
                attn_groups,
                *args,
                for_capture=for_capture,
                **kwargs,
            )
            return metadata

    def _deep_batch(self, input_batch: InputBatch) -> DeepBatch | None:
        found = [self._token_maps.get(request_id) for request_id in input_batch.req_ids]
        maps = [token_map for token_map in found if token_map is not None]
        if len(maps) < len(found):
            return None  # a dummy run: its requests were never added
        if maps != self._batch_maps.maps:
            self._batch_maps = BatchMaps(maps)
        count = len(maps)
        computed = input_batch.num_computed_tokens_np[:count].astype(np.int64)
        return self._batch_maps.step(computed, input_batch.num_scheduled_tokens[:count].astype(np.int64))
