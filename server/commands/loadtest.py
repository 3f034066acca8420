"""`foldserve loadtest`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from foldserve.loadtest.options import LoadTestOptions
from foldserve.server.commands.parser import declare

_DESCRIPTION = """\
Measures throughput and latency against the reduction ratio, with `vllm bench serve` as the client: methods x ratios x
withdrawal x loads, in rounds that run forwards and backwards, against ratio 0 and against plain `vllm serve` of the
same checkpoint. What the output folder holds already is not measured again. How to read it: docs/guides/loadtest.md.

MODEL is a Hugging Face name or a local directory and comes first (default: the small demo model); servers are started
for it with any further option of `vllm serve`. With --url a running server is measured instead.
"""

_SMOKE: dict[str, Any] = {
    "ratios": (0.5,), "concurrency": (2,), "requests": (4,), "rounds": 1, "warm_up": 1, "output_tokens": 4, "words": 8,
    "control": False,
}  # fmt: skip


def add(parser: ArgumentParser) -> None:
    declare(parser, LoadTestOptions, _run, _DESCRIPTION, takes_engine_options=True, defaults=_defaults)
    parser.add_argument("--smoke", action="store_true", help="a few requests, to see that all of it works")


def _defaults(args: Namespace) -> dict[str, Any]:
    from foldserve.server.quality.demo.checkpoint import CHECKPOINT

    model = {} if args.url else {"model": str(CHECKPOINT)}
    return model | (_SMOKE if args.smoke else {})


def _run(options: LoadTestOptions, rest: list[str]) -> None:
    import torch

    from foldserve.loadtest.command import run
    from foldserve.server.settings import cpu_variables

    # plain vLLM's server is to compute as ours does
    report = run(options, rest, {} if torch.cuda.is_available() else cpu_variables())
    failed = sum(row.failures for row in report.rows)
    print(f"Written to {options.output}: index.html, report.md, report.csv, report.json and pictures.")
    if failed:
        raise SystemExit(f"{failed} requests failed")
