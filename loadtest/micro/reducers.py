"""What reduction costs against the vision encoder: `python -m foldserve.loadtest.micro.reducers`.

The encoder has the shape of CLIP-L/14-336 as LLaVA-1.5 runs it (23 of 24 layers, 576 patches) and random weights. Both
are timed in one process, in turns, so that a busy machine slows both; medians are reported. For `folder_cls` the time
includes what it needs from the layer: the mean of the keys over heads, and the class token's attention.
"""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from foldserve.reducers.folder import folder, folder_cls
from foldserve.reducers.plan import Reduction, VisionGeometry, make_plan

PATCHES, WIDTH, HEADS = 576, 1024, 16
RATIOS = (0.25, 0.5, 0.66, 0.75, 0.9)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REDUCTIONS_PER_ENCODING = 3  # they take a hundredth of the time


@dataclass(frozen=True, slots=True)
class Row:
    """Medians for one batch; share: reduction time / encoder time."""

    dtype: str
    method: str
    ratio: float
    kept: int
    encoder_ms: float
    reduction_ms: float
    share: float


GEOMETRY = VisionGeometry(PATCHES, layers=23, class_token=True)


def build_encoder(device: str) -> CLIPVisionModel:
    """CLIP-L/14-336 without its last layer, random weights."""
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=23,
        num_attention_heads=HEADS,
        image_size=336,
        patch_size=14,
    )
    return CLIPVisionModel(config).eval().to(device)


def reduce_cls(hidden: Tensor, query: Tensor, key: Tensor, folds: tuple[int, ...]) -> Tensor:
    """`folder_cls` and what it needs of its layer; query and key: (B, n + 1, heads, head_dim)."""
    logits = torch.einsum("bhd,bnhd->bhn", query[:, 0].float(), key.float()) * key.shape[-1] ** -0.5
    attention = logits.softmax(dim=-1).mean(dim=1)  # (B, n + 1)
    return folder_cls(hidden, key.float().mean(dim=2), attention, folds).tokens


def reductions(hidden: Tensor) -> Iterator[tuple[str, float, int, Callable[[], Tensor]]]:
    """(method, ratio, tokens kept, call) for every row of the table; hidden: (B, n + 1, d)."""
    patches = hidden[:, 1:].contiguous()
    query, key = torch.randn(2, *hidden.shape[:2], HEADS, WIDTH // HEADS, device=hidden.device).to(hidden.dtype)
    for ratio in RATIOS:
        plan = make_plan(Reduction("folder", ratio=ratio), GEOMETRY)
        yield "folder", ratio, plan.kept, partial(_tokens, patches, plan.folds)
        plan = make_plan(Reduction("folder_cls", ratio=ratio), GEOMETRY)
        yield "folder_cls", ratio, plan.kept, partial(reduce_cls, hidden, query, key, plan.folds)


def _tokens(patches: Tensor, folds: tuple[int, ...]) -> Tensor:
    return folder(patches, folds).tokens


def time_ms(call: Callable[[], object], device: str) -> float:
    """Wall time of one call, with everything that it started on the device."""
    synchronize = torch.get_device_module(device).synchronize  # returns at once on a CPU
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return (time.perf_counter() - start) * 1e3


@torch.inference_mode()
def measure(encoder: CLIPVisionModel, dtype: str, *, batch: int, rounds: int, device: str) -> list[Row]:
    """All methods and ratios in one dtype."""
    encoder = encoder.to(DTYPES[dtype])
    pixels = torch.randn(batch, 3, 336, 336, device=device).to(DTYPES[dtype])
    cases = list(reductions(encoder(pixels).last_hidden_state))  # the first run of each is not counted
    for *_, call in cases:
        call()
    encoder_ms: list[float] = []
    reduction_ms: list[list[float]] = [[] for _ in cases]
    for _ in range(rounds):
        encoder_ms.append(time_ms(lambda: encoder(pixels), device))
        for _ in range(REDUCTIONS_PER_ENCODING):
            for times, (*_, call) in zip(reduction_ms, cases, strict=True):
                times.append(time_ms(call, device))
    whole = median(encoder_ms)
    return [
        Row(dtype, method, ratio, kept, whole, median(times), median(times) / whole)
        for times, (method, ratio, kept, _) in zip(reduction_ms, cases, strict=True)
    ]


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--batch", type=int, default=1, help="images at once (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of the encoder per dtype (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    encoder = build_encoder(args.device)
    rows: list[Row] = []
    print(f"{args.device}, {torch.get_num_threads()} threads, batch {args.batch}, medians of {args.rounds} rounds")
    print("dtype  method      ratio  kept  encoder ms  reduction ms   share")
    for dtype in args.dtype:
        for row in measure(encoder, dtype, batch=args.batch, rounds=args.rounds, device=args.device):
            rows.append(row)
            print(
                f"{row.dtype:5}  {row.method:10}  {row.ratio:5}  {row.kept:4}  {row.encoder_ms:10.1f}  "
                f"{row.reduction_ms:12.2f}  {row.share:6.2%}"
            )
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
