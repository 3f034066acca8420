"""What the Triton kernels save against torch on a GPU: `python -m foldserve.loadtest.micro.kernels`.

Each operation that has a kernel, and the methods made of them, run in pairs with the kernels and with the torch
references. Times are wall times of one call until the GPU has finished, so launches count, as in a server whose GPU
waits for them. Sizes are those of CLIP-L/14-336.
"""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from foldserve.kernels import ops
from foldserve.loadtest.micro.pairs import Ratio, alternate, ratio
from foldserve.reducers import cosines
from foldserve.reducers.divprune import divprune, farthest_first
from foldserve.reducers.fold import group_mean, group_sum, match, place, unit_rows
from foldserve.reducers.folder import folder
from foldserve.reducers.illava import illava, lowest_into_one
from foldserve.reducers.schedule import fold_schedule
from foldserve.reducers.tome import tome
from foldserve.reducers.withdraw import kv_slots

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS = (144, 576, 729, 2880)
BLOCK_SIZE = 16
KERNELS, REFERENCES = torch.device("cuda"), torch.device("cpu")
"""Arguments of `ops.select_kernels` for kernels and references, wherever the tensors are."""


@dataclass(frozen=True, slots=True)
class KernelShape:
    """Images of `tokens` tokens; `width` is that of the vision tower, `key_width` that of one of its heads."""

    tokens: int
    batch: int
    dtype: str
    width: int = 1024
    key_width: int = 64


@dataclass(frozen=True, slots=True)
class KernelTiming:
    """Medians over the pairs; `floor_bytes` is the least memory traffic."""

    name: str
    tokens: int
    batch: int
    dtype: str
    floor_bytes: int
    torch_us: float
    kernel_us: float
    kernel_to_torch: Ratio


Case = tuple[str, int, Callable[[], object]]
"""Name, least memory traffic in bytes, call."""


def cases(shape: KernelShape, device: str) -> Iterator[Case]:
    """All cases. Methods that reduce once remove two thirds of the tokens; a layer of others removes 1/24 or 1/6."""
    n, images = shape.tokens, shape.batch
    even, folded = (n + 1) // 2, n - n // 3
    x = torch.randn(images, n, shape.width, device=device).to(DTYPES[shape.dtype])
    keys = torch.randn(images, n, shape.key_width, device=device)
    attention = torch.rand(images, n, device=device)
    sizes = torch.ones(images, n, dtype=torch.int64, device=device)
    score, partner = match.reference(keys)
    fold = place.reference(score, partner, n, n // 3, "position")
    all_x, image = x.nbytes, images * shape.width * 4
    yield "match tokens", all_x + 12 * images * even, lambda: match(x)
    yield "match keys", keys.nbytes + 12 * images * even, lambda: match(keys)
    yield "place", images * (12 * even + 8 * (n + 2 * folded)), lambda: place(score, partner, n, n // 3, "position")
    yield "group_mean", all_x + image * folded, lambda: group_mean(x, fold.slot, folded)
    yield "group_sum", all_x + image * folded, lambda: group_sum(x, fold.slot, fold.sizes)
    yield "lowest_into_one", images * (16 * n + 16 * (n - n // 6)), lambda: lowest_into_one(attention, n // 6)
    if cosines.holds_matrix(n):
        matrix, first = cosines.matrix(unit_rows(x)), sizes[:, :1] - 1
        yield "farthest_first", images * 4 * n * (n // 3), lambda: farthest_first(matrix, first, n // 3)
    one_step = 2 * all_x - all_x // 24
    yield "folder", all_x + all_x // 3, lambda: folder(x, fold_schedule(n, 2 * n // 3))
    yield "divprune", all_x + all_x // 3, lambda: divprune(x, n // 3)
    yield "tome, a layer", one_step, lambda: tome(x, keys, sizes, n // 24, class_token=True)
    yield "illava, a layer", 2 * all_x - all_x // 6, lambda: illava(x, attention, n // 6)
    yield from _of_the_decoder(shape, device)


def _of_the_decoder(shape: KernelShape, device: str) -> Iterator[Case]:
    """Cases of the decoder: 64 text tokens per prompt enter the deep layers."""
    text = 64
    blocks = -(-text // BLOCK_SIZE)
    table = torch.arange(shape.batch * blocks, dtype=torch.int32, device=device).view(shape.batch, -1)
    request_of = torch.arange(shape.batch, device=device).repeat_interleave(text)
    place_in: Tensor = torch.arange(text, device=device).repeat(shape.batch)
    yield "kv_slots", len(place_in) * 28, lambda: kv_slots(table, request_of, place_in, BLOCK_SIZE, len(place_in))


def time_us(call: Callable[[], object], device: str) -> float:
    """Wall time of one call until the device has finished."""
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return (time.perf_counter() - start) * 1e6


@torch.inference_mode()
def measure(shape: KernelShape, *, pairs: int, device: str) -> list[KernelTiming]:
    """All cases; the first run of each, in which kernels are compiled, is not counted."""

    def timed(call: Callable[[], object], chosen: torch.device) -> float:
        ops.select_kernels(chosen, triton=True)
        return time_us(call, device)

    def compared(call: Callable[[], object], count: int) -> list[tuple[float, float]]:
        return alternate(lambda: timed(call, KERNELS), lambda: timed(call, REFERENCES), count)

    rows = []
    try:
        for name, floor_bytes, call in cases(shape, device):
            compared(call, 1)
            found = compared(call, pairs)
            kernel_us, torch_us = (median(times) for times in zip(*found, strict=True))
            sizes = (shape.tokens, shape.batch, shape.dtype)
            rows.append(KernelTiming(name, *sizes, floor_bytes, torch_us, kernel_us, ratio(found)))
    finally:
        ops.select_kernels(REFERENCES, triton=True)
    return rows


def render(row: KernelTiming) -> str:
    """One line of a Markdown table."""
    floor = f"{row.floor_bytes / 1e6:.2f}"
    return f"| {row.name} | {row.tokens} | {floor} | {row.torch_us:.0f} | {row.kernel_us:.0f} | {row.kernel_to_torch} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bf16"])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="images at once (%(default)s)")
    parser.add_argument("--pairs", type=int, default=50, help="timed runs of either (%(default)s)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error(
            "torch finds no GPU, and without one there are only the torch references: nothing to compare. Run this on "
            "a machine with an NVIDIA GPU; what the kernels compute is tested without one (tests/kernels)"
        )
    print(f"{torch.cuda.get_device_name()}, medians of {args.pairs} pairs")
    rows: list[KernelTiming] = []
    for dtype in args.dtype:
        for batch in args.batch:
            print(
                f"\n{dtype}, {batch} images\n\n| what | tokens | floor MB | torch us | kernels us | kernels / torch |"
            )
            print("|---|---|---|---|---|---|")
            for tokens in args.tokens:
                found = measure(KernelShape(tokens, batch, dtype), pairs=args.pairs, device="cuda")
                print(*map(render, found), sep="\n", flush=True)
                rows += found
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
