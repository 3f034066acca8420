"""What planning adds to the preprocessing of an image: `python -m foldserve.loadtest.micro.processor`.

Compares our multimodal processor with vLLM's, in pairs on different images: from decoded pixels to inputs, placeholders
and identity. Ours leaves scaling and normalizing to the model, which is not counted. Process CPU time is compared: run
it with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import json
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from foldserve.loadtest.micro.pairs import Ratio, alternate, ratio
from foldserve.loadtest.micro.processors import Processors
from foldserve.reducers.plan import Reduction

# None: a request without a reduction. `random` also reads the pixels, which seed it.
ASKED: dict[str, Reduction | None] = {
    "nothing asked": None,
    "folder 0.66": Reduction.parse({"method": "folder", "ratio": 0.66}),
    "random 0.66": Reduction.parse({"method": "random", "ratio": 0.66}),
}


def cpu_ms(call: Callable[[], int]) -> float:
    """Process CPU time of a call."""
    start = time.process_time()
    call()
    return (time.process_time() - start) * 1e3


def measure(processors: Processors, side: int, pairs: int) -> dict[str, dict[str, object]]:
    """Ours / stock for each of `ASKED`, and the stock processor's milliseconds; the first pair is not counted."""
    rng = np.random.default_rng(0)

    def image() -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))

    found: dict[str, dict[str, object]] = {}
    for name, reduction in ASKED.items():
        costs = alternate(
            lambda reduction=reduction: cpu_ms(processors.call("ours", image(), reduction)),  # type: ignore[misc]
            lambda: cpu_ms(processors.call("stock", image())),
            pairs + 1,
        )[1:]
        each: Ratio = ratio(costs)
        found[name] = {"ratio": asdict(each), "stock_ms": round(median(base for _, base in costs), 3)}
        print(f"{name}: ours / vLLM's {each}, of {found[name]['stock_ms']} ms", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--side", type=int, default=672, help="pixels along a side of an image")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args(argv)
    with TemporaryDirectory(prefix="foldserve-processor-") as folder:
        from foldserve.server.quality.demo_model import create

        processors = Processors(create(Path(folder) / "model"))
        found = measure(processors, args.side, args.pairs)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
