"""`foldserve loadtest`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from foldserve.server.commands.arguments import Commands, argument

_T = TypeVar("_T")

_DESCRIPTION = """\
Measures throughput and latency against the reduction ratio, with `vllm bench serve` as the client: methods x ratios x
withdrawal x loads, in rounds that run forwards and backwards, against ratio 0 and against plain `vllm serve` of the
same checkpoint. What the output folder holds already is not measured again. docs/loadtest.md says how to read it.

MODEL is a Hugging Face name or a local directory and comes first (default: the small demo model); servers are started
for it with any further option of `vllm serve`. With --url a running server is measured instead.
"""

_WITHDRAW = {"off": (False,), "on": (True,), "both": (False, True)}
_SMOKE: dict[str, Any] = {
    "ratios": (0.5,), "concurrency": (2,), "requests": (4,), "rounds": 1, "warm_up": 1, "output_tokens": 4, "words": 8,
    "control": False,
}  # fmt: skip


def add(commands: Commands) -> None:
    """Declares the command."""
    loadtest = commands.add_parser(
        "loadtest",
        help="measure throughput against the reduction ratio",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given is left to `Options`
        allow_abbrev=False,
    )
    loadtest.add_argument("model", metavar="MODEL", nargs="?")
    _add_servers(loadtest.add_argument_group("servers").add_argument)
    _add_grid(loadtest.add_argument_group("grid").add_argument)
    _add_requests(loadtest.add_argument_group("requests").add_argument)
    add = loadtest.add_argument_group("report").add_argument
    add("--output", type=Path, metavar="DIR", default=Path("loadtest-results"), help="(default: %(default)s)")
    add("--quality", type=Path, metavar="FILE", help="quality.json of `foldserve evaluate`: accuracy beside throughput")
    add("--shape-from", metavar="MODEL", help="checkpoint that predictions are made for (default: MODEL)")
    add("--smoke", action="store_true", default=False, help="a few requests, to see that all of it works")
    loadtest.set_defaults(run=_run, takes_engine_options=True, fail=loadtest.error)


def _add_servers(add: Callable[..., Any]) -> None:
    add("--url", metavar="URL", help="a running server, such as http://localhost:8000")
    add("--control-url", metavar="URL", help="a running plain vLLM, as the control")
    add("--no-control", dest="control", action="store_false", help="start no plain vLLM")
    add("--beside", action="store_true", help="both servers up at once (default: one after the other, in every round)")
    add("--no-restart", dest="restart", action="store_false", help="start servers once, not anew for every round")
    add("--withdraw-layer", type=int, metavar="K", help="of the server that is started")


def _add_grid(add: Callable[..., Any]) -> None:
    add("--methods", type=argument(_each(str)), metavar="M,M,...", help="(default: folder)")
    add("--ratios", type=argument(_each(float)), metavar="R,R,...", help="beside 0 (default: 0.25,0.5,0.66,0.75,0.9)")
    add("--withdraw", choices=_WITHDRAW, help="whether vision tokens leave the decoder at layer K (default: off)")
    add("--concurrency", type=argument(_each(int)), metavar="N,N,...", help="requests at once (default: 1,8,64)")
    add(
        "--rate",
        type=argument(_each(float)),
        metavar="R,R,...",
        help="requests/s that arrive at random (default: none)",
    )
    add("--rounds", type=int, metavar="N", help="through all of the grid (default: 4)")
    add(
        "--blocks",
        type=argument(_each(int)),
        metavar="N[,N,...]",
        help="of each point in each round, for all loads or one number a load (default: 1)",
    )


def _add_requests(add: Callable[..., Any]) -> None:
    add("--workload", metavar="NAME", help="chat, turns, images, mix, long or bursts (default: chat)")
    add("--trace", type=Path, metavar="JSONL", help="replay these requests at their times instead")
    add("--speed", type=argument(_each(float)), metavar="S,S,...", help="of the trace, as factors (default: 1)")
    add(
        "--requests",
        type=argument(_each(int)),
        metavar="N[,N,...]",
        help="of a block, for all loads or one number a load (default: 128)",
    )
    add("--warm-up", type=int, metavar="N", help="of each variant after a server's start (default: 2)")
    add("--output-tokens", type=int, metavar="N", help="of an answer (default: 16; long: 256)")
    add("--words", type=int, metavar="N", help="of a question (default: 48)")
    add("--images", type=Path, metavar="DIR", help="take images from there (default: they are made up)")
    add("--image-size", type=int, metavar="PX", help="of images that are made up (default: 336)")
    add(
        "--repeat-images",
        type=int,
        metavar="N",
        help="only so many different ones, to see caches (default: all differ)",
    )
    add("--seed", type=int, metavar="N", help="of arrival times (default: 0)")


def _each(kind: Callable[[str], _T]) -> Callable[[str], tuple[_T, ...]]:
    def parse(text: str) -> tuple[_T, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError as error:
            raise ValueError(f"values with commas between them are needed, not {text!r}") from error

    return parse


def _run(args: argparse.Namespace, rest: list[str]) -> None:
    import torch

    from foldserve.loadtest.command import run
    from foldserve.loadtest.options import Options
    from foldserve.server.settings import cpu_variables

    given = {k: v for k, v in vars(args).items() if k not in ("run", "takes_engine_options", "fail", "smoke")}
    if "withdraw" in given:
        given["withdraw"] = _WITHDRAW[given["withdraw"]]
    if "url" not in given and "model" not in given:
        from foldserve.server.quality.demo.checkpoint import CHECKPOINT

        given["model"] = str(CHECKPOINT)
    if not torch.cuda.is_available():
        os.environ.update(cpu_variables())  # plain vLLM's server, too, computes as ours does
    try:
        report = run(Options(**(_SMOKE if args.smoke else {}) | given), rest)
    except ValueError as error:
        args.fail(str(error))
    failed = sum(row.failures for row in report.rows)
    print(f"Written to {args.output}: index.html, report.md, report.csv, report.json and pictures.")
    if failed:
        raise SystemExit(f"{failed} requests failed")
