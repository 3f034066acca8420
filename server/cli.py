"""The `foldserve` command: arguments -> `Settings` -> one call."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from foldserve.server import commands, guardian, output

_DESCRIPTION = """\
Serve vision-language models with fewer vision tokens: every request chooses how many.

  foldserve serve                               the small demo model on port 8000
  foldserve serve llava-hf/llava-1.5-7b-hf      a real model
  foldserve batch -i IN -o OUT MODEL            answer a file of requests, without a server
  foldserve doctor MODEL                        whether and how it would run here, in seconds
  foldserve gpu-check                           whether a GPU computes what it should, in minutes
  foldserve calibrate MODEL --data DIR          find the layer where vision tokens may be withdrawn
  foldserve evaluate MODEL                      accuracy against vision tokens, for every method
  foldserve analyze MODEL                       where the model can do with fewer vision tokens
  foldserve map IMAGE [MODEL]                   a picture of where an image's vision tokens go
  foldserve loadtest MODEL                      throughput against vision tokens, beside plain vLLM
  foldserve report DIR [DIR]                    the page of finished measurements again, or two compared
  foldserve convert stf|mmvp SRC ...            a LLaVA-STF or MMVP checkpoint into the layout that is served
  foldserve hash-key NAME                       an API key, for serve --api-keys
  foldserve demo-model DIR                      copy the demo model into a directory
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command in `argv` (default: the process's arguments); runs a server or a batch under a guardian."""
    if argv is None and guardian.is_wanted(sys.argv[1:]):
        sys.exit(guardian.guard([sys.executable, *sys.orig_argv[1:]], sys.argv[1]))
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(next((word for word in argv if word in commands.ALL), None))
    args, rest = parser.parse_known_args(argv)
    if rest and not args.takes_engine_options:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.run(args, rest)


def build_parser(asked: str | None) -> argparse.ArgumentParser:
    """Declares the options of the command `asked` only, since those of `serve` import torch, which takes seconds."""
    parser = argparse.ArgumentParser(
        "foldserve", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.set_defaults(takes_engine_options=False)
    parser.add_argument("--version", action="version", version=_versions())
    names = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, help in commands.ALL.items():
        command = names.add_parser(name, help=help, conflict_handler="resolve")  # `serve` has a --help of its own
        if name == asked:
            import_module(f"{commands.__name__}.{name.replace('-', '_')}").add(command)
    return parser


def _versions() -> str:
    try:
        vllm = f"vLLM {version('vllm')}"
    except PackageNotFoundError:
        vllm = "vLLM is not installed"
    return f"foldserve {version('foldserve')} ({vllm})"


guardian.die_with_parent()  # child processes of multiprocessing import this module first, long before vLLM
if guardian.is_guarded():
    output.install()
    gc.disable()  # until the plugin is registered: collecting takes 2 of the 10 s of imports and finds nothing
if __name__ == "__main__":
    main()
