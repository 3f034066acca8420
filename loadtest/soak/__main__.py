"""Sends many mixed requests to a server, aborts many of them, and checks that nothing is left over."""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import sys
import time
from itertools import islice, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from foldserve.loadtest.soak.death import kill_engine
from foldserve.loadtest.soak.load import send_all, stream_at_once
from foldserve.loadtest.soak.mix import plan
from foldserve.loadtest.soak.report import READY_WITHIN_S, SoakReport
from foldserve.loadtest.soak.server import HeldResources, SoakServer
from foldserve.loadtest.soak.siege import PROBED_WITHIN_S, Siege, besiege, make_keys

_STREAM_TOKENS = 16
_FILES_A_STREAM = 2
_OTHER_FILES = 1024
_USERS_REQUESTS = 400


def main(argv: list[str] | None = None) -> None:
    """Runs a soak test; exit status 1 if something was left over or went wrong."""
    args = _parser().parse_args(argv)
    _allow_files(args.streams * _FILES_A_STREAM + _OTHER_FILES)
    report: SoakReport | Siege
    report = asyncio.run(_run_hostile(args)) if args.hostile else asyncio.run(_run(args))
    text = json.dumps(report.to_json(), indent=1)
    if args.output:
        args.output.write_text(text)
    print(text)
    if failures := list(report.failures()):
        raise SystemExit("\n".join(failures))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m foldserve.loadtest.soak", description=__doc__)
    add = parser.add_argument
    default = "(default: %(default)s)"
    add("--requests", type=int, default=10_000, metavar="N", help=default)
    add("--abort-share", type=float, default=0.3, metavar="SHARE", help=f"of requests to abort {default}")
    add("--warm-share", type=float, default=0.2, metavar="SHARE", help=f"of requests sent to warm up {default}")
    add("--looks", type=int, default=8, metavar="N", help=f"measurements of memory and files after that {default}")
    add("--at-once", type=int, default=64, metavar="N", help=f"requests in flight {default}")
    add("--streams", type=int, default=1000, metavar="N", help=f"opened at once after warm-up; 0: none {default}")
    add(
        "--ready-within",
        type=float,
        metavar="S",
        help="longest time that /health/ready may take (default: "
        f"{READY_WITHIN_S:g}, and beside hostile clients {PROBED_WITHIN_S:g})",
    )
    add(
        "--hostile",
        type=int,
        nargs="?",
        const=_USERS_REQUESTS,
        metavar="N",
        help="instead: N requests of a user, first alone, then beside hostile clients (default: %(const)s)",
    )
    add("--seed", type=int, default=0)
    add("--output", type=Path, metavar="FILE", help="the report as JSON")
    add("--log", type=Path, metavar="FILE", help="file for the server's output (default: not kept)")
    add("options", nargs="*", metavar="OPTION", help="after --: of `foldserve serve`, the model first")
    return parser


def _allow_files(count: int) -> None:
    """Raises the limit on open files, which child processes inherit, to at least `count`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


async def _run(args: argparse.Namespace) -> SoakReport:
    started = time.monotonic()
    requests = plan(args.requests, args.abort_share, args.seed)
    warming = int(args.requests * args.warm_share)
    parts = [(args.requests - warming) * i // args.looks for i in range(args.looks + 1)]
    with TemporaryDirectory() as folder:
        server = SoakServer(args.options, args.log or Path(folder) / "log")
        try:
            with tqdm(total=args.requests + args.streams, unit="req", smoothing=0.05) as bar:
                soak = await send_all(server.address, islice(requests, warming), args.at_once, bar)
                streams = await stream_at_once(server.address, args.streams, _STREAM_TOKENS, bar)
                looks = [await _look(server, bar)]
                for begin, end in pairwise(parts):
                    soak += await send_all(server.address, islice(requests, end - begin), args.at_once, bar)
                    looks.append(await _look(server, bar))
            death = await kill_engine(server, args.at_once)
            seconds = round(time.monotonic() - started, 1)
            return SoakReport(looks, soak, streams, death, seconds, args.ready_within or READY_WITHIN_S)
        finally:
            server.stop()


async def _run_hostile(args: argparse.Namespace) -> Siege:
    with TemporaryDirectory() as folder:
        keys = Path(folder) / "keys.toml"
        user, stranger = make_keys(keys)
        server = SoakServer([*args.options, "--api-keys", str(keys)], args.log or Path(folder) / "log", user)
        try:
            return await besiege(server, user, stranger, args.hostile, args.seed, args.ready_within or PROBED_WITHIN_S)
        finally:
            server.stop()


async def _look(server: SoakServer, bar: tqdm[Any]) -> HeldResources:
    held = await server.held_when_idle()
    bar.write(f"after {bar.n} requests: {held.memory_bytes / 1e6:.0f} MB, {held.files} file descriptors", sys.stderr)
    return held


if __name__ == "__main__":
    main()
