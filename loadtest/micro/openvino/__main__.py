"""Compares foldserve with OpenVINO GenAI on a Qwen2.5-VL checkpoint: `python -m foldserve.loadtest.micro.openvino`.

Both engines run in their own process on one CPU, with the same threads, images, prompts and precision, and take turns.
The benchmark needs `openvino-genai`; `docs/explanation/benchmarks/openvino-cpu.md` has the commands that export a
checkpoint.
"""

from __future__ import annotations

import json
import os
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from math import isqrt
from pathlib import Path

from tqdm import tqdm

from foldserve.loadtest.micro.openvino.engines import Contender, Engine, Foldserve, OpenVino, Setup
from foldserve.loadtest.micro.openvino.report import Cell, draw, results, tables
from foldserve.loadtest.micro.openvino.runs import Load, RemoteEngine
from foldserve.loadtest.micro.withdrawal import machine

_UNIT_PX = 28  # one token of Qwen2.5-VL: 2 x 2 patches of 14


def contenders(ratio: float, px: int) -> list[Contender]:
    """The contenders at a ratio, for images of `px` pixels; the second is OpenVINO's own method."""
    if not ratio:
        return [Contender("foldserve", "none", 0, px), Contender("openvino", "none", 0, px)]
    smaller = _UNIT_PX * isqrt(round((1 - ratio) * (px // _UNIT_PX) ** 2))  # a square of at most as many tokens
    folder = (("method", "folder"), ("ratio", ratio))
    return [
        Contender("foldserve", "folder", ratio, px, folder),
        Contender("openvino", "pruning_ratio", ratio, px),
        Contender("foldserve", "folder + withdraw", ratio, px, (*folder, ("withdraw", True))),
        Contender("foldserve", "downsample", ratio, px, (("method", "downsample"), ("ratio", ratio))),
        Contender("openvino", "smaller image", ratio, smaller),
    ]


def arguments() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a Qwen2.5-VL checkpoint")
    parser.add_argument("exported", type=Path, metavar="EXPORTED", help="the same, exported for OpenVINO")
    parser.add_argument("--ratios", type=float, nargs="+", default=(0, 0.5, 0.75, 0.9), metavar="R")
    parser.add_argument("--concurrency", type=int, nargs="+", default=(1, 8), metavar="N", help="requests at once")
    parser.add_argument("--requests", type=int, default=16, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each")
    parser.add_argument("--tokens", type=int, default=8, help="of an answer")
    parser.add_argument("--px", type=int, default=784, help="width and height of the images, a multiple of 28")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of either engine")
    parser.add_argument("--withdraw-layer", type=int, default=8, metavar="K")
    parser.add_argument("--kv-precision", default="bf16", help="OpenVINO's; ours is bf16")
    parser.add_argument("--eager", action="store_true", help="ours without torch.compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there")
    return parser


def measure(args: Namespace) -> list[Cell]:
    """Every contender at every load, once per round, in an order that reverses every round."""
    setup = Setup(args.threads)
    start: dict[str, Callable[[], Engine]] = {
        "foldserve": partial(Foldserve, args.model, setup, withdraw_layer=args.withdraw_layer, eager=args.eager),
        "openvino": partial(OpenVino, args.exported, setup, kv_precision=args.kv_precision),
    }
    engines = {name: RemoteEngine(each) for name, each in start.items()}
    cells = [
        Cell(contender, concurrency)
        for concurrency in args.concurrency
        for ratio in args.ratios
        for contender in contenders(ratio, args.px)
    ]
    for cell in tqdm(cells, desc="warm-up"):
        engines[cell.contender.engine].measure(cell.contender, Load(cell.concurrency, cell.concurrency, 2, 0))
    for round_ in range(args.rounds):
        order = cells if round_ % 2 else cells[::-1]
        for cell in tqdm(order, desc=f"round {round_ + 1} of {args.rounds}"):
            load = Load(args.requests, cell.concurrency, args.tokens, 1 + round_)
            cell.runs.append(engines[cell.contender.engine].measure(cell.contender, load))
    for engine in engines.values():
        engine.stop()
    return cells


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    load = [os.getloadavg()[0]]
    cells = measure(args)
    figures = results(cells)
    load.append(os.getloadavg()[0])
    for table in tables(figures):
        print(f"\n{table.title}\n\n{table.markdown()}")
    settings = {name: str(value) for name, value in vars(args).items()}
    print(f"\n{machine()}, load average before and after {load}")
    if args.json:
        measured = {"results": [asdict(each) for each in figures], "cells": [asdict(cell) for cell in cells]}
        about = {"settings": settings, "machine": machine(), "load": load}
        args.json.write_text(json.dumps(about | measured, indent=1) + "\n")
    if args.plot:
        draw(figures, args.plot)


if __name__ == "__main__":
    main()
