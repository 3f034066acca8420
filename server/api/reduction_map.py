"""`POST /v1/reductions/map`: where each token of an image or video went, computed by the served tower and reducers.

The body is a chat's and passes what a chat passes: key, queue, limits, media, plan. The map itself takes one run of
the vision tower between two steps of the engine, which wait for it as for an image of a chat. An API process has one
such run at a time. If the client hangs up, the run still ends before the next map begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.v1.engine.async_llm import AsyncLLM

from foldserve.server.api.errors import EngineStopped, InvalidRequest
from foldserve.server.api.lifecycle.state import Lifecycle, Phase
from foldserve.server.api.schema import FoldChatRequest
from foldserve.server.engine.grid_map import CANNOT_MAP, Groups, can_map, pack

_LOOK_S = 1.0


def check(request: FoldChatRequest) -> None:
    """Raises InvalidRequest for fields of a chat that a map can't follow."""
    if request.stream:
        raise InvalidRequest("a map comes whole: leave `stream` out", "stream")
    if (request.n or 1) > 1:
        raise InvalidRequest("a map has one answer: leave `n` out", "n")
    if not request.has_media:
        raise InvalidRequest("a map needs an image or a video: send one as part of a message's content", "messages")


class TokenGroupReader:
    """Asks the engine where tokens went, one image at a time.

    `lifecycle` tells when the engine has ended, and takes it for hung if it does not answer.
    """

    def __init__(self, engine: AsyncLLM, lifecycle: Lifecycle) -> None:
        self._engine, self._lifecycle = engine, lifecycle
        self._turn = asyncio.Lock()

    async def of(self, item: MultiModalKwargsItem) -> Sequence[Groups | None]:
        """Where the tokens of the item's grids went, see `MappingWorker.token_groups`.

        Raises InvalidRequest if this engine can't tell, and EngineStopped once it has ended.
        """
        if not can_map(self._engine.vllm_config):
            raise InvalidRequest(CANNOT_MAP)
        await self._turn.acquire()
        call = asyncio.create_task(self._ask(pack(item)))  # goes on when this task is cancelled, as the engine does
        call.add_done_callback(self._done)
        while not call.done():
            await asyncio.wait({call}, timeout=_LOOK_S)
            if self._lifecycle.phase is Phase.STOPPED and not call.done():  # vLLM never answers such a call
                raise EngineStopped("the model stopped before the map was complete: try again in a while", 10)
        return call.result()

    async def _ask(self, packed: list[bytes]) -> Sequence[Groups | None]:
        with self._lifecycle.engine_call():
            ranks: list[Any] = await self._engine.collective_rpc("token_groups", args=(packed,))
        found: Sequence[Groups | None] = next(answer for answer in ranks if answer is not None)
        return found

    def _done(self, call: asyncio.Task[Sequence[Groups | None]]) -> None:
        self._turn.release()
        if not call.cancelled():
            call.exception()  # retrieves it, since nobody may be waiting for it any more
