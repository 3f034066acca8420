"""What keeping positions costs: `python -m foldserve.loadtest.micro.positions`.

One engine in this process serves requests that keep positions and requests that renumber them, in pairs in the order
ABBA, with equal sizes and counts; every image is new to the caches. The control renumbers on both sides: its distance
from 1 is the machine's noise. Since that can exceed the effect, the part "clocked" measures the functions that keeping
needs within requests that keep positions. Run it with OMP_NUM_THREADS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0.
"""

from __future__ import annotations

import json
import os
import tempfile
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from itertools import chain, count, cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from foldserve.loadtest.micro.engine import Clock, ProbedEngine, ProbeRequest
from foldserve.loadtest.micro.pairs import alternate, ratio
from foldserve.loadtest.micro.shape import ITEM_BYTES, Shape
from foldserve.loadtest.micro.variants import CostRatio
from foldserve.loadtest.micro.withdrawal import TIMED, engine_options, machine, render, table
from foldserve.reducers.plan import Reduction
from foldserve.server.engine import positions, runner_v1
from foldserve.server.engine.worker import WORKERS

Positions = Literal["keep", "renumber"]
RATIO = 0.66
AT_ONCE = 8  # requests
ANSWER = 16  # tokens
GOAL = 1.01
WARM_UP = 1
DECODE_PAIRS = 4  # for each other pair, which takes far longer
PARTS = ("pairs", "clocked")
KEEPING = ((positions, "attach"), (runner_v1, "position_changes"), (positions.PositionChanges, "apply"))
"""Functions that run only for requests that keep positions."""


class Bench:
    def __init__(self, shape: Shape, checkpoint: Path, **options: Any) -> None:
        self._engine = ProbedEngine(checkpoint, None, worker_cls=WORKERS["cpu"], **options)
        image = self._engine.tokenizer.convert_tokens_to_ids("<image>")
        words = self._engine.tokenizer.encode("What is in this picture?")
        self._prompt = [image, *islice(cycle(words), shape.text)]
        self._side = shape.image_px
        self._seeds = count()

    def pairs(self, pairs: int) -> Iterator[CostRatio]:
        """Whole requests, alone and several at once, and decode steps of several."""
        for variant in ("keep", "renumber"):
            for requests in (1, AT_ONCE):
                costs = _timed(partial(self.serve, variant, requests), partial(self.serve, "renumber", requests), pairs)
                yield _row(variant, f"{requests} at once, whole", costs)
            yield _row(variant, f"{AT_ONCE} at once, decode step", self._decode(variant, pairs))

    def clocked(self, runs: int) -> Iterator[CostRatio]:
        """Requests that keep positions, against their own time minus that of `KEEPING`."""
        for requests in (1, AT_ONCE):
            costs: list[tuple[Clock, Clock]] = []
            for _ in range(WARM_UP + runs):
                keeping = Clock()
                with _time_keeping(keeping):
                    whole = self.serve("keep", requests)
                without = Clock(whole.cpu_ms - keeping.cpu_ms, whole.wall_ms - keeping.wall_ms)
                costs.append((whole, without))
            yield _row("keep", f"{requests} at once, clocked", costs[WARM_UP:], base="keep less clocked")

    def serve(self, kind: Positions, requests: int) -> Clock:
        """Time of `requests` requests at once, from their images to their last tokens."""
        batch = [self._request(kind, ANSWER) for _ in range(requests)]
        clock = Clock()
        with clock.running():
            for request in batch:
                self._engine.add(request)
            self._engine.step()
            while self._engine.resident():
                self._engine.step()
        return clock

    def _decode(self, variant: Positions, pairs: int) -> Sequence[tuple[Clock, Clock]]:
        """Pairs of decode steps at equal context lengths."""
        costs: list[tuple[Clock, Clock]] = []
        for _ in range(-(-DECODE_PAIRS * pairs // ANSWER)):
            sides = alternate(partial(self._steps, variant), partial(self._steps, "renumber"), 2)
            costs += [pair for one, other in sides for pair in zip(one, other, strict=True)]
        return costs

    def _steps(self, kind: Positions) -> list[Clock]:
        """Costs of `ANSWER` decode steps with `AT_ONCE` requests, without the prefill."""
        for _ in range(AT_ONCE):
            self._engine.add(self._request(kind, ANSWER + WARM_UP + 1))
        for _ in range(1 + WARM_UP):
            self._engine.step()
        steps = [self._engine.step().step for _ in range(ANSWER)]
        self._engine.clear()
        return steps

    def _request(self, kind: Positions, tokens: int) -> ProbeRequest:
        pixels = np.random.default_rng(next(self._seeds)).integers(0, 256, (self._side, self._side, 3), dtype=np.uint8)
        return ProbeRequest(self._prompt, Image.fromarray(pixels), Reduction(ratio=RATIO, positions=kind), tokens)


@contextmanager
def _time_keeping(clock: Clock) -> Iterator[None]:
    """Adds the time of `KEEPING` to `clock`."""

    def clocked(function: Callable[..., Any], *args: Any) -> Any:
        with clock.running():
            return function(*args)

    with ExitStack() as patches:
        for owner, name in KEEPING:
            function = getattr(owner, name)
            patches.enter_context(patch.object(owner, name, lambda *args, f=function: clocked(f, *args)))
        yield


def _timed(variant: Callable[[], Clock], base: Callable[[], Clock], pairs: int) -> Sequence[tuple[Clock, Clock]]:
    return alternate(variant, base, WARM_UP + pairs)[WARM_UP:]


def _row(variant: Positions, part: str, costs: Sequence[tuple[Clock, Clock]], base: str = "renumber") -> CostRatio:
    cpu = ratio([(one.cpu_ms, other.cpu_ms) for one, other in costs])
    wall = ratio([(one.wall_ms, other.wall_ms) for one, other in costs])
    goal = GOAL if variant == "keep" else None
    name = variant if variant == "keep" else "control"
    return CostRatio(name, base, part, cpu, wall, median(other.cpu_ms for _, other in costs), None, goal)


def arguments() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--pairs", type=int, default=20, help="pairs per comparison, more for decode steps")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers")
    parser.add_argument("--hidden", type=int, default=512, help="width of the decoder, a multiple of 64")
    parser.add_argument("--pool-mib", type=int, default=256, help="KV cache, in MiB")
    parser.add_argument("--dtype", choices=ITEM_BYTES, default="float32", help="of weights and KV cache")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    return parser


def main() -> None:
    args = arguments().parse_args()
    if torch.get_num_threads() != 1:
        raise SystemExit("idle threads would count as CPU time: set OMP_NUM_THREADS=1")
    shape = Shape(args.layers, args.hidden, dtype=args.dtype)
    load = [os.getloadavg()[0]]
    rows: list[CostRatio] = []
    with tempfile.TemporaryDirectory(prefix="foldserve-bench-") as folder:
        options = engine_options(dtype=args.dtype, pool_mib=args.pool_mib, eager=not args.compile)
        bench = Bench(shape, shape.write(Path(folder) / "model"), **options)
        print(table(TIMED))
        parts = {"pairs": bench.pairs, "clocked": bench.clocked}
        for row in chain.from_iterable(parts[part](args.pairs) for part in args.parts):
            rows.append(row)
            print(render(row), flush=True)
    load.append(os.getloadavg()[0])
    print(f"\n{machine()}, load average before and after {load}")
    if args.json:
        settings = {"shape": asdict(shape), "eager": not args.compile, "machine": machine(), "load_average": load}
        args.json.write_text(json.dumps(settings | {"ratios": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
