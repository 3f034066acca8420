"""Runs a batch: requests in flight, output, progress."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path

import uvloop
from tqdm import tqdm
from vllm.logger import configure_logging_from_args

from foldserve.server.api import launch, preflight
from foldserve.server.api.batch import results
from foldserve.server.api.batch.files import LocalFiles
from foldserve.server.api.batch.front import Front, Reply, open_front
from foldserve.server.api.batch.lines import BatchLine, longest_line, read_lines, read_request
from foldserve.server.api.batch.options import BatchOptions
from foldserve.server.api.batch.results import LineResult, OutputFile
from foldserve.server.api.batch.survey import Survey
from foldserve.server.api.errors import FoldserveError, render_error
from foldserve.server.limits import Limits
from foldserve.server.settings import Environment, Settings

_QUEUED = 4
"""One request waits, prepared, for this many that the engine works on, so that the engine never runs dry."""
_TRIES = 10  # for a line, while the server has no room
_SYNC_S = 5.0
_BAR_S, _LOG_S = 0.5, 10.0  # between two updates of the bar, on a terminal and in a log
_COUNTS = re.compile(r"encoded=(\d+), kept=(\d+)")
_HEADER = "x-foldserve-vision-tokens"
NOT_FOR_A_BATCH = (
    "api_server_count", "data_parallel_external_lb", "data_parallel_hybrid_lb", "data_parallel_multi_port_external_lb",
    "data_parallel_rank", "data_parallel_start_rank", "grpc", "headless", "host", "middleware", "port", "root_path",
    "ssl_certfile", "ssl_keyfile", "uds",
)  # fmt: skip
"""vLLM's options for servers that listen, or share their engines with others."""


class EngineEnded(RuntimeError):
    """The engine is gone, and with it the run; what is written stays."""

    def __init__(self, cause: str) -> None:
        super().__init__(f"{cause}: what is written stays, and --resume answers the rest")


def batch(
    argv: list[str],
    options: BatchOptions,
    settings: Settings | launch.SettingsFor,
    environment: Environment,
    small_model: Path,
) -> None:
    """Answers a file of requests; the other arguments are those of `launch.serve`.

    Raises:
        SystemExit: arguments that vLLM's parser or we refuse.
        CannotStart: what `preflight` refuses.
        ValueError, OSError: an input or output that can't be used.
    """
    launch.prepare_process(environment)
    args = launch.serve_args(argv, settings, environment, small_model, command="batch", refused=NOT_FOR_A_BATCH)
    args.model = args.model_tag or args.model
    configure_logging_from_args(args)
    limits = Settings.from_config(args.additional_config).limits
    files = None
    if args.allowed_local_media_path:
        files, args.allowed_local_media_path = LocalFiles(Path(args.allowed_local_media_path), limits), ""
    preflight.check(args)
    survey = Survey(options.input, longest_line(limits))
    with OutputFile(options.output, survey, options.existing) as found, preflight.exit_with_reason():
        if found.totals.lines < len(survey):
            launch.say(f"loading {args.model}")
            uvloop.run(_answer_all(args, options, limits, files, survey, found))
    totals = found.totals
    saved = f", {totals.encoded - totals.kept:,} of {totals.encoded:,} vision tokens saved" if totals.encoded else ""
    launch.say(f"{totals.lines:,} lines answered, {totals.refused:,} of them with an error{saved}: {options.output}")


async def _answer_all(
    args: Namespace, options: BatchOptions, limits: Limits, files: LocalFiles | None, survey: Survey, found: OutputFile
) -> None:
    async with open_front(args) as front:
        with options.input.open("rb") as file, ProgressBar(len(survey), found) as progress:
            lines = (
                line
                for line in read_lines(file, longest_line(limits))
                if line.number <= survey.last and line.number not in found
            )
            run = BatchRun(LineAnswerer(front, limits, files), lines, limits.max_unread_bytes, found, progress)
            await run.answer(options.concurrency or front.runs_at_once + -(-front.runs_at_once // _QUEUED))


class LineAnswerer:
    """Answers single lines; None for `files` allows no `file:` URLs."""

    def __init__(self, front: Front, limits: Limits, files: LocalFiles | None = None) -> None:
        self._front, self._limits, self._files = front, limits, files
        self._urls = front.urls

    async def answer(self, line: BatchLine) -> LineResult:
        """The result of a line, even an invalid one; raises EngineEnded if the engine is gone."""
        number, custom_id = line.number, line.custom_id
        try:
            url, body = read_request(line, self._urls, self._limits)
        except FoldserveError as error:
            shown = {"code": error.code, "message": str(error), "param": error.param}
            return LineResult(results.failure(number, custom_id, shown))
        del line
        try:
            if self._files is not None:
                await asyncio.to_thread(self._files.put_into, body)
        except FoldserveError as error:
            refusal = render_error(error)
            reply = Reply(refusal.status_code, {}, bytearray(refusal.body))
        else:
            reply = await self._post(url, body)
        request_id = reply.headers.get("x-request-id", "")
        content = results.answer(number, custom_id, reply.status, request_id, bytes(reply.body))
        return LineResult(content, reply.status == 200, **_counts(reply))

    async def _post(self, url: str, body: dict[str, object]) -> Reply:
        """The reply; retries while the server has no room."""
        content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        body.clear()
        for wait_s in range(1, _TRIES + 1):
            reply = await self._front.post(url, content)
            if reply.status >= 500 and self._front.has_failed:
                raise EngineEnded(self._front.failure)
            if reply.status != 503:
                break
            await asyncio.sleep(wait_s)
        return reply


class BatchRun:
    """Answers several lines at a time, and writes each answer to the output as soon as it is complete.

    The lines in flight have at most `most_bytes`.
    """

    def __init__(
        self,
        answers: LineAnswerer,
        lines: Iterator[BatchLine],
        most_bytes: int,
        found: OutputFile,
        progress: ProgressBar,
    ) -> None:
        self._answers, self._lines = answers, lines
        self._found, self._progress = found, progress
        self._room = _ByteLimit(most_bytes)

    async def answer(self, at_once: int) -> None:
        """Returns once all lines have a result; raises EngineEnded if the engine ended before."""
        try:
            async with asyncio.TaskGroup() as all_tasks:
                syncs = all_tasks.create_task(self._sync())
                async with asyncio.TaskGroup() as workers:
                    for _ in range(at_once):
                        workers.create_task(self._work())
                syncs.cancel()
        except BaseExceptionGroup as error:
            raise _first_exception(error) from None

    async def _work(self) -> None:
        while (line := await self._room.next(self._lines)) is not None:
            size = len(line.content)
            try:
                self._found.add(await self._answers.answer(line))
                self._progress.step()
            finally:
                self._room.give(size)

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(_SYNC_S)
            await asyncio.to_thread(self._found.sync)


class ProgressBar:
    """The progress bar: lines with a result, vision tokens saved, time left."""

    def __init__(self, lines: int, found: OutputFile) -> None:
        self._found = found
        every_s = _BAR_S if sys.stderr.isatty() else _LOG_S
        self._bar = tqdm(
            total=lines, initial=found.totals.lines, desc="foldserve batch", unit="line", mininterval=every_s
        )

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def step(self) -> None:
        totals = self._found.totals
        self._bar.set_postfix_str(
            f"{totals.encoded - totals.kept:,} vision tokens saved, {totals.refused:,} errors", refresh=False
        )
        self._bar.update()


class _ByteLimit:
    """Bounds the bytes of the lines in flight, but lets a single longer line pass."""

    def __init__(self, most: int) -> None:
        self._held, self._most = 0, most
        self._turn = asyncio.Lock()
        self._given = asyncio.Event()

    async def next(self, lines: Iterator[BatchLine]) -> BatchLine | None:
        """The next line, once there is room for it; callers wait one at a time."""
        async with self._turn:
            line = next(lines, None)
            if line is None:
                return None
            size = len(line.content)
            while self._held and self._held + size > self._most:
                self._given.clear()
                await self._given.wait()
            self._held += size
            return line

    def give(self, size: int) -> None:
        self._held -= size
        self._given.set()


def _counts(reply: Reply) -> Mapping[str, int]:
    found = _COUNTS.match(reply.headers.get(_HEADER, ""))
    return {"encoded": int(found[1]), "kept": int(found[2])} if found and reply.status == 200 else {}


def _first_exception(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
