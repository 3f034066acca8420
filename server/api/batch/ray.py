"""Batches over several machines: Ray Data distributes lines to actors, each with an engine and the application.

Plain actors instead of `ray.data.llm`, whose stages render prompts and start vLLM themselves, without the planner, the
media guard and our checks.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from foldserve.server import guardian
from foldserve.server.access import UNBOUNDED_QUEUE, Access
from foldserve.server.api import launch
from foldserve.server.api.batch.front import open_front
from foldserve.server.api.batch.lines import BatchLine
from foldserve.server.api.batch.run import NOT_FOR_A_BATCH, LineAnswerer
from foldserve.server.api.batch.survey import id_digest
from foldserve.server.settings import CONFIG_KEY, Environment, Settings

if TYPE_CHECKING:
    import ray.data  # an extra

LINE, RESULT = "line", "result"
"""Columns: a request as in a batch file, and its line in a batch's output."""
_T = TypeVar("_T")


def answered(
    requests: ray.data.Dataset,
    model: str,
    *options: str,
    settings: Settings = Settings(),  # noqa: B008  # frozen
    actors: int | tuple[int, int] = 1,
    gpus: float = 1,
    rows: int = 256,
    **ray_options: Any,
) -> ray.data.Dataset:
    """The rows of `requests` with a column `result`, in the form of the output of `foldserve batch`.

    If an actor dies, Ray starts it again and it answers its rows anew. To keep written blocks when the whole job ends,
    set a `CheckpointConfig` with a column of ids in Ray's context.

    Args:
        requests: with a column `line`, which `ray.data.read_text` calls `text`; other columns are passed on.
        model: a name on the hub, or a directory that all machines have.
        options: engine options of `vllm serve`.
        settings: the server's, with the limits of a request.
        actors: number of engines, or the fewest and the most: Ray starts more while lines wait.
        gpus: of each actor.
        rows: most rows in flight per actor.
        ray_options: of `map_batches`, such as `num_cpus`.
    """
    # Small files come as one block: a single actor would answer it, and keep nothing of it before its end.
    return requests.repartition(target_num_rows_per_block=rows).map_batches(
        AnsweringActor,
        fn_constructor_args=(model, options, settings.to_config()),
        concurrency=actors,
        num_gpus=gpus,
        batch_size=rows,
        batch_format="numpy",
        **ray_options,
    )


class AnsweringActor:
    """An actor's engine, which ends with the actor, however that ends.

    `settings` come from `Settings.to_config`. Raises ValueError for options that vLLM's parser or we refuse.
    """

    def __init__(self, model: str, options: Sequence[str], settings: dict[str, Any]) -> None:
        guardian.bind_children()
        environment = Environment.read()
        launch.prepare_process(environment)
        own = Settings.from_config({CONFIG_KEY: settings})
        access = Access(max_queue=UNBOUNDED_QUEUE, engine_timeout_s=own.access.engine_timeout_s)
        own = replace(own, access=access)
        args = launch.serve_args(
            [model, *options], own, environment, Path(model), command="batch", refused=NOT_FOR_A_BATCH
        )
        args.model = args.model_tag
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="foldserve-batch", daemon=True).start()
        self._held = AsyncExitStack()
        front = self._wait(self._held.enter_async_context(open_front(args)))
        self._answers = LineAnswerer(front, own.limits)

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        contents = [str(line).encode("utf-8", "surrogatepass") for line in rows[LINE]]
        return rows | {RESULT: self._wait(self._answer(contents))}

    async def _answer(self, contents: Sequence[bytes]) -> list[str]:
        lines = [BatchLine(0, content) for content in contents]
        numbered = [BatchLine(id_digest(line.custom_id), line.content) for line in lines]  # by id: a row has no number
        found = await asyncio.gather(*map(self._answers.answer, numbered))
        return [result.line.decode().rstrip() for result in found]

    def _wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
