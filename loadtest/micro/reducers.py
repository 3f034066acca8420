"""What reduction costs against the vision encoder: `python -m foldserve.loadtest.micro.reducers`.

Encoders have the shape of published towers up to the layer that LLaVA reads, and random weights. All calls take turns
in one process. Medians are reported, on a CPU those of the process's CPU time: a busy machine stretches wall time.

Cost of a method in the tower: all its steps and the attention scores that they need, without what later layers save. Of
`downsample`: resizing the image and its position embeddings. Methods after the projector also need the projection of
the tokens they remove, which has its own row. An encoder of several tiles is timed on one tile and counted for all.

`least` is the time of the matrix products that a method can't do without (`least_flops`), at the speed of a product of
1024 x 1024 matrices in fp32.
"""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from foldserve.loadtest.report.estimates import Estimate, estimate
from foldserve.reducers import METHODS
from foldserve.reducers.attention import LayerAttention
from foldserve.reducers.downsample import interpolate_positions, resize
from foldserve.reducers.fold import Reduced
from foldserve.reducers.method import AfterProjector, AfterTower, BeforeTower, InTower, SideInputs
from foldserve.reducers.plan import InvalidReduction, Plan, Reduction, VisionGeometry, make_plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REDUCTIONS_PER_ENCODING = 3  # they take little time
QUERY = 8  # tokens
PROJECTION = "projection of what goes"
HEAD = "| method | ratio | kept | ms | share of the encoder | least ms (times that) |\n|---|---|---|---|---|---|"
PRODUCT = 1024
"""Rows and columns of the matrices whose product gives the machine's speed."""


@dataclass(frozen=True, slots=True)
class TowerShape:
    """Shape of a vision tower.

    Attributes:
        side: patches along a side of a tile.
        tiles: tiles per image. Methods after the tower see all tokens at once, others a batch of tiles.
        layers: number of layers that run.
        embedding: width of the decoder and the projector's output.
    """

    name: str
    side: int
    tiles: int
    layers: int
    width: int
    mlp: int
    heads: int
    patch: int
    class_token: bool
    embedding: int = 4096

    @property
    def geometry(self) -> VisionGeometry:
        """Geometry of one tile."""
        return VisionGeometry(self.side**2, (self.side, self.side), self.layers, self.class_token, shows_tower=True)

    @property
    def whole(self) -> VisionGeometry:
        """Geometry of all tiles, one below the other."""
        grid = (self.tiles * self.side, self.side)
        return VisionGeometry(grid[0] * grid[1], grid, self.layers, shows_tower=True)

    def build(self) -> nn.Module:
        """The encoder with random weights: (any, 3, H, W) -> `last_hidden_state`."""
        shape = {
            "hidden_size": self.width,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "image_size": self.side * self.patch,
            "patch_size": self.patch,
        }
        clip, siglip = CLIPVisionConfig(**shape), SiglipVisionConfig(**shape, vision_use_head=False)
        encoder: nn.Module = CLIPVisionModel(clip) if self.class_token else SiglipVisionModel(siglip)
        return encoder.eval()


TOWERS = {
    tower.whole.tokens: tower
    for tower in (
        TowerShape("CLIP-L/14-336", 24, 1, 23, 1024, 4096, 16, 14, class_token=True),
        TowerShape("SigLIP-so400m/14-384", 27, 1, 26, 1152, 4304, 16, 14, class_token=False, embedding=3584),
        TowerShape("CLIP-L/14-336, 5 tiles", 24, 5, 23, 1024, 4096, 16, 14, class_token=True),
        TowerShape("SigLIP-so400m/14-384, 12 tiles", 27, 12, 26, 1152, 4304, 16, 14, class_token=False, embedding=3584),
    )
}


@dataclass(frozen=True, slots=True)
class ReducerTiming:
    """Medians.

    Attributes:
        share: reduction time / encoder time.
        least_ms: see `least_flops`; 0 if unknown.
    """

    tower: str
    tokens: int
    dtype: str
    method: str
    kept: int
    encoder_ms: float
    reduction_ms: Estimate
    share: float
    least_ms: float


@dataclass(frozen=True, slots=True)
class Inputs:
    """Random stand-ins for a tower's tensors.

    Attributes:
        hidden: (tiles, n, width) hidden states.
        qkv: (tiles, n, 3 width) projections for attention.
        embedded: (1, tiles * patches, embedding) output of the projector.
    """

    tower: TowerShape
    pixels: Tensor
    hidden: Tensor
    qkv: Tensor
    embedded: Tensor
    projector: nn.Module

    @classmethod
    def draw(cls, tower: TowerShape, dtype: torch.dtype, device: str) -> Inputs:
        n = tower.side**2 + tower.class_token
        shapes = [(3, tower.side * tower.patch, tower.side * tower.patch), (n, tower.width), (n, 3 * tower.width)]
        pixels, hidden, qkv = (torch.randn(tower.tiles, *shape, device=device).to(dtype) for shape in shapes)
        embedded = torch.randn(1, tower.whole.tokens, tower.embedding, device=device).to(dtype)
        inner, last = nn.Linear(tower.width, tower.embedding), nn.Linear(tower.embedding, tower.embedding)
        projector = nn.Sequential(inner, nn.GELU(), last).to(device, dtype)
        return cls(tower, pixels, hidden, qkv, embedded, projector)

    def attention(self, n: int) -> LayerAttention:
        """Attention of a layer with n tokens; like vLLM's, a view of the fused projections."""
        query, key, _ = self.qkv[:, :n].unflatten(-1, (3, self.tower.heads, -1)).unbind(2)  # type: ignore[no-untyped-call]
        return LayerAttention(query, key, key.shape[-1] ** -0.5, class_token=self.tower.class_token)


def calls(
    inputs: Inputs, ratios: tuple[float, ...], methods: Collection[str] = METHODS
) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(method, tokens kept, call) for all methods that work before the decoder on this tower."""
    tower = inputs.tower
    if any(isinstance(METHODS[name], AfterProjector) for name in methods):
        for plan in plans("divprune", tower.whole, ratios):
            yield PROJECTION, plan.kept, partial(project, inputs, plan.removed)
    for method in (METHODS[name] for name in methods):
        geometry = tower.whole if isinstance(method, AfterTower) else tower.geometry
        for plan in plans(method.name, geometry, ratios):
            if isinstance(method, AfterProjector):
                yield method.name, plan.kept, partial(after_projector, inputs, plan)
            elif isinstance(method, AfterTower):
                yield method.name, plan.kept, partial(after_tower, _features(inputs), plan)
            elif isinstance(method, InTower):
                yield method.name, tower.tiles * plan.kept, partial(in_tower, method, inputs, plan)
            elif isinstance(method, BeforeTower):
                yield method.name, tower.tiles * plan.kept, partial(before_tower, inputs, plan)


def plans(method: str, geometry: VisionGeometry, ratios: tuple[float, ...]) -> Iterator[Plan]:
    """One plan per ratio; `pool`, which has few ratios, gets its two smallest windows."""
    sides = [geometry.tokens // k**2 for k in (2, 3) if geometry.grid and not any(side % k for side in geometry.grid)]
    amounts = [{"keep_tokens": kept} for kept in sides] if method == "pool" else [{"ratio": ratio} for ratio in ratios]
    for amount in amounts:
        try:
            yield make_plan(Reduction.parse({"method": method, **amount}), geometry)
        except InvalidReduction:  # the method does not work on this tower
            return


def after_tower(tokens: Tensor, plan: Plan) -> Reduced:
    method = plan.reducer
    assert isinstance(method, AfterTower)
    return method.reduce(tokens, plan)


def in_tower(method: InTower, inputs: Inputs, plan: Plan) -> Tensor:
    """Runs all steps of a plan, layer by layer."""
    x, sizes = inputs.hidden, torch.ones(inputs.hidden.shape[:2], dtype=torch.int64, device=inputs.hidden.device)
    for layer in sorted({step.layer for step in plan.steps if step.layer is not None}):
        attention = inputs.attention(x.shape[1])
        x, sizes, _, _ = method.reduce(x, sizes, attention, plan.removed_in(layer), plan)
    return x


def project(inputs: Inputs, tokens: int) -> Tensor:
    features: Tensor = inputs.projector(_features(inputs)[0, :tokens])
    return features


def after_projector(inputs: Inputs, plan: Plan) -> Reduced:
    method = plan.reducer
    assert isinstance(method, AfterProjector)
    seen = SideInputs(_features(inputs), [inputs.embedded[0, :QUERY]])
    return method.reduce(inputs.embedded, plan, None, seen)


def _features(inputs: Inputs) -> Tensor:
    """(1, tokens of all tiles, width)"""
    return inputs.hidden[:, int(inputs.tower.class_token) :].reshape(1, inputs.tower.whole.tokens, -1)


def before_tower(inputs: Inputs, plan: Plan) -> tuple[Tensor, Tensor]:
    """The smaller image and its position embeddings."""
    assert plan.grid is not None
    side = inputs.tower.side
    positions = interpolate_positions(inputs.hidden[0], (side, side), *plan.grid)
    return resize(inputs.pixels, *plan.grid, patch=inputs.tower.patch), positions


def least_flops(method: str, tower: TowerShape, kept: int) -> int:
    """FLOPs of the products that a method can't do without, each cosine once since it is symmetric; 0 if unknown."""
    n, width, embedding = tower.whole.tokens, tower.width, tower.embedding
    if method == "divprune":  # the first pick needs all
        return n**2 * embedding
    if method == "cdpruner":  # those of the picks, and the rows of a Cholesky factor
        return (2 * n - kept) * kept * embedding + kept**2 * n
    if method == "mmtok":
        return n**2 * width + 2 * n * QUERY * embedding
    if method == "folder":  # of the first fold, even tokens to odd ones
        return n**2 * width // 2
    return 2 * (n - kept) * (width + embedding) * embedding if method == PROJECTION else 0


def time_ms(call: Callable[[], object], device: str) -> float:
    """Time of one call until all its work is done: CPU time of the process on a CPU, wall time on a GPU."""
    if device == "cpu":
        start = time.process_time()
        call()
        return (time.process_time() - start) * 1e3
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return (time.perf_counter() - start) * 1e3


@torch.inference_mode()
def measure(
    tower: TowerShape,
    dtype: str,
    *,
    ratios: tuple[float, ...],
    rounds: int,
    device: str,
    methods: Collection[str] = METHODS,
) -> list[ReducerTiming]:
    """Measures methods and ratios on one tower in one dtype; the first run of each is not counted."""
    encoder = tower.build().to(device, DTYPES[dtype])
    inputs = Inputs.draw(tower, DTYPES[dtype], device)
    cases = list(calls(inputs, ratios, methods))
    square = torch.randn(PRODUCT, PRODUCT, device=device)
    encode, multiply = partial(encoder, inputs.pixels[:1]), partial(torch.mm, square, square)
    encode()
    multiply()
    for *_, call in cases:
        call()
    tile_ms: list[float] = []
    product_ms: list[float] = []
    reduction_ms: list[list[float]] = [[] for _ in cases]
    for _ in range(rounds):
        tile_ms.append(time_ms(encode, device))
        for _ in range(REDUCTIONS_PER_ENCODING):
            product_ms.append(time_ms(multiply, device))
            for times, (*_, call) in zip(reduction_ms, cases, strict=True):
                times.append(time_ms(call, device))
    encoder_ms, ms_per_flop = tower.tiles * float(np.median(tile_ms)), float(np.median(product_ms)) / (2 * PRODUCT**3)
    found = []
    for times, (method, kept, _) in zip(reduction_ms, cases, strict=True):
        taken = estimate(times, lambda values: np.median(values, axis=-1))
        least = least_flops(method, tower, kept) * ms_per_flop
        share = taken.value / encoder_ms
        found.append(
            ReducerTiming(tower.name, tower.whole.tokens, dtype, method, kept, encoder_ms, taken, share, least)
        )
    return found


def render(row: ReducerTiming) -> str:
    """One line of a Markdown table."""
    ratio, least = 1 - row.kept / row.tokens, "-"
    if row.least_ms:
        least = f"{row.least_ms:.1f} ({row.reduction_ms.value / row.least_ms:.1f})"
    return f"| `{row.method}` | {ratio:.2f} | {row.kept} | {row.reduction_ms.show(1)} | {row.share:.2%} | {least} |"


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp32"])
    parser.add_argument("--tokens", type=int, choices=TOWERS, nargs="+", default=list(TOWERS))
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS), metavar="METHOD")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    parser.add_argument("--rounds", type=int, default=3, help="runs of the encoder per table (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    rows: list[ReducerTiming] = []
    print(f"{args.device}, {torch.get_num_threads()} threads, medians of {args.rounds} rounds")
    for tokens in args.tokens:
        for dtype in args.dtype:
            found = measure(
                TOWERS[tokens],
                dtype,
                ratios=tuple(args.ratios),
                rounds=args.rounds,
                device=args.device,
                methods=args.methods,
            )
            print(f"\n{tokens} tokens, {TOWERS[tokens].name}, {dtype}: encoder {found[0].encoder_ms:.0f} ms\n")
            print(HEAD)
            print(*map(render, found), sep="\n", flush=True)
            rows += found
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
