"""Start-up time, foldserve and plain vLLM in turns: `python -m foldserve.loadtest.micro.startup MODEL`.

Further options go to both servers. The first start of each is not counted: it fills the file caches.
"""

from __future__ import annotations

import json
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from foldserve.loadtest.grid import ServerName
from foldserve.loadtest.micro.pairs import Ratio, alternate, ratio
from foldserve.loadtest.servers import LocalServer

Cost = tuple[float, float]
"""Wall and CPU seconds."""


def start(name: ServerName, options: Sequence[str], log: Path) -> Cost:
    """Starts a server and stops it once it answers."""
    server = LocalServer(name, options, log)
    try:
        return server.start_s, sum(server.cpu_s().values())
    finally:
        server.stop()


def measure(ours: Callable[[], Cost], plain: Callable[[], Cost], pairs: int) -> dict[str, Ratio]:
    """Ours / plain vLLM, in wall and CPU time."""
    costs = alternate(ours, plain, pairs + 1)[1:]
    return {clock: ratio([(a[i], b[i]) for a, b in costs]) for i, clock in enumerate(("wall", "cpu"))}


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args, options = parser.parse_known_args(argv)
    with TemporaryDirectory(prefix="foldserve-startup-") as folder:
        log, command = Path(folder) / "log", [args.model, *options]
        found = measure(partial(start, "foldserve", command, log), partial(start, "vllm", command, log), args.pairs)
    for clock, each in found.items():
        print(f"start-up, ours / plain vLLM, {clock} time: {each}")
    if args.json:
        args.json.write_text(json.dumps({clock: asdict(each) for clock, each in found.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
