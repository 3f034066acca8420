"""Model runner V1: passes the deep part of each step to the attention metadata builders."""

from __future__ import annotations

from typing import Any

import numpy as np

from foldserve.server.engine.per_request import PerRequest
from foldserve.server.engine.withdrawal.batch import BatchMaps, DeepBatch
from foldserve.server.engine.withdrawal.core import TokenMap
from foldserve.server.engine.withdrawal.metadata import deep_step


class WithdrawingRunner:
    """Mixin before a V1 runner class. Modification: metadata of the deep layers is built for their part of the step.

    Token maps are made once per request, and their arrays once per composition of the batch.
    """

    _batch_maps: BatchMaps | None = None

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._token_maps = PerRequest(_token_map)

    def _build_attention_metadata(self: Any, *, num_reqs: int, **kwargs: Any) -> Any:
        real = kwargs.get("num_scheduled_tokens") is not None  # dummy runs and graph capture have no requests
        batch = self._deep_batch(num_reqs) if real else None
        with deep_step(self.attn_groups, batch):
            return super()._build_attention_metadata(num_reqs=num_reqs, **kwargs)  # type: ignore[misc]

    def _deep_batch(self: Any, num_reqs: int) -> DeepBatch | None:
        maps = [self._token_maps.of(self.requests, request_id) for request_id in self.input_batch.req_ids[:num_reqs]]
        if self._batch_maps is None or self._batch_maps.maps != maps:
            self._batch_maps = BatchMaps(maps)
        if not self._batch_maps.withdraws:
            return None
        computed = self.input_batch.num_computed_tokens_cpu[:num_reqs].astype(np.int64)
        scheduled = np.diff(self.query_start_loc.np[: num_reqs + 1]).astype(np.int64)
        step: DeepBatch | None = self._batch_maps.step(computed, scheduled)
        return step


def _token_map(state: Any) -> TokenMap:
    return TokenMap.of(state.mm_features, state.num_prompt_tokens)
