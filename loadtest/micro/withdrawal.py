"""What withdrawal saves and costs: `python -m foldserve.loadtest.micro.withdrawal`.

Two engines in this process, one with a withdrawal layer and one without, have the same random weights. Variants are
timed in pairs in the order ABBA. Run it with OMP_NUM_THREADS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0.
"""

from __future__ import annotations

import json
import os
import tempfile
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from foldserve.loadtest.micro.resident import MIB, Resident
from foldserve.loadtest.micro.shape import ITEM_BYTES, DType, Shape
from foldserve.loadtest.micro.variants import Bench, CostRatio

TIMED = "| variant / base | part | CPU time ratio [95 %] | wall time ratio [95 %] | base, CPU ms | FLOPs | goal |"
PARTS = ("prefill", "idle", "resident")
COUNTED = "| engine, request | resident | formula | MiB held | MiB by formula | excess in blocks | as predicted |"


def render(row: CostRatio) -> str:
    """A line of the table."""
    flops, goal = ("" if value is None else f"{value:.3f}" for value in (row.flops, row.goal))
    names = f"{row.variant} / {row.base} | {row.part}"
    return f"| {names} | {row.cpu} | {row.wall} | {row.base_cpu_ms:.1f} | {flops} | {goal} |"


def render_resident(row: Resident) -> str:
    """A line of the table."""
    fewest, most = row.expected
    return (
        f"| {row.name} | {row.requests} | {fewest}-{most} | {row.held_mib:.3f} | {row.formula_mib:.3f} | "
        f"{(row.held_mib - row.formula_mib) / row.block_mib:.2f} | {'yes' if row.as_predicted else 'NO'} |"
    )


def engine_options(*, dtype: DType, pool_mib: int, eager: bool) -> dict[str, Any]:
    """vLLM's settings, with room for all prompts of `Bench.resident` in one step."""
    return {
        "dtype": dtype,
        "max_model_len": 1024,
        "max_num_batched_tokens": 8192,
        "max_num_seqs": 64,
        "block_size": 32,
        "kv_cache_memory_bytes": pool_mib * MIB,
        "enforce_eager": eager,
        "limit_mm_per_prompt": {"image": 1},
        "mm_processor_cache_gb": 0.1,
    }


def arguments() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--pairs", type=int, default=12, help="pairs per comparison, more for decode steps")
    parser.add_argument("--layers", type=int, default=16, help="decoder layers")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the decoder, a multiple of 64")
    parser.add_argument("--withdraw-layer", type=int, default=8, metavar="K", help="first layer without vision tokens")
    parser.add_argument("--pool-mib", type=int, default=256, help="KV cache of each engine, in MiB")
    parser.add_argument("--dtype", choices=ITEM_BYTES, default="bfloat16", help="of weights and KV cache")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    return parser


def machine() -> dict[str, object]:
    """Properties of the machine that the figures depend on."""
    return {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "torch": torch.__version__,
    }


def table(head: str) -> str:
    return f"{head}\n|{'---|' * (head.count('|') - 1)}"


def measure(bench: Bench, parts: Sequence[str], pairs: int) -> tuple[list[CostRatio], list[Resident]]:
    """Prints each figure as it is measured, and returns all."""
    rows: list[CostRatio] = []
    counts: list[Resident] = []
    print(table(TIMED))
    for row in chain.from_iterable(part(pairs) for part in (bench.prefill, bench.idle) if part.__name__ in parts):
        rows.append(row)
        print(render(row), flush=True)
    if "resident" in parts:
        print(f"\n{table(COUNTED)}")
        for count in bench.resident():
            counts.append(count)
            print(render_resident(count), flush=True)
    return rows, counts


def main() -> None:
    args = arguments().parse_args()
    if torch.get_num_threads() != 1:
        raise SystemExit("idle threads would count as CPU time: set OMP_NUM_THREADS=1")
    shape = Shape(args.layers, args.hidden, withdraw_layer=args.withdraw_layer, dtype=args.dtype)
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(prefix="foldserve-bench-") as folder:
        options = engine_options(dtype=args.dtype, pool_mib=args.pool_mib, eager=args.eager)
        bench = Bench(shape, shape.write(Path(folder) / "model"), **options)
        rows, counts = measure(bench, args.parts, args.pairs)
    load.append(os.getloadavg()[0])
    print(f"\n{machine()}, load average before and after {load}")
    if args.json:
        figures = {"ratios": [asdict(row) for row in rows], "resident": [asdict(count) for count in counts]}
        settings = {"shape": asdict(shape), "eager": args.eager, "machine": machine(), "load_average": load}
        args.json.write_text(json.dumps(settings | figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
