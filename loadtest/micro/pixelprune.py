"""What PixelPrune saves and costs: `python -m foldserve.loadtest.micro.pixelprune MODEL`.

Measures, in pairs with and without the method, requests for one token from the decoded image on and the vision tower
in them, and the choice of tokens alone. Images are pages (text on white) and photos (all neighbours differ), each new
to every cache. Process CPU time is compared: run it with OMP_NUM_THREADS=1 and VLLM_ENABLE_V1_MULTIPROCESSING=0.
"""

from __future__ import annotations

import json
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from foldserve.loadtest.micro.engine import Clock, ProbedEngine, ProbeRequest
from foldserve.loadtest.micro.pairs import alternate, ratio
from foldserve.reducers.plan import Reduction
from foldserve.server.engine.worker import WORKERS, device

ASKED = {
    "tau 0": Reduction.parse({"method": "pixelprune", "tau": 0}),
    "tau 4": Reduction.parse({"method": "pixelprune", "tau": 4}),
    "tau 4, sliding": Reduction.parse({"method": "pixelprune", "tau": 4, "predictor": "sliding"}),
}


def page(number: int, side: int) -> Image.Image:
    """A page of random words with margins; half of the lines are full."""
    rng = np.random.default_rng(number)
    image = Image.new("RGB", (side, side), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=side // 48)
    for y in range(side // 10, side * 9 // 10, side // 30):
        words = ["".join(rng.choice(list("etaoinshr"), rng.integers(2, 9))) for _ in range(rng.integers(0, 14))]
        draw.text((side // 10, y), " ".join(words)[:60], fill=(20, 20, 30), font=font)
    return image


def photo(number: int, side: int) -> Image.Image:
    """Smooth colours with a camera's noise."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
    return Image.fromarray((smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8))


KINDS: Mapping[str, Callable[[int, int], Image.Image]] = {"page": page, "photo": photo}


@dataclass(frozen=True, slots=True)
class Cost:
    """A request's CPU time to the first token, the vision tower's part of it, and prompt tokens."""

    first_token_ms: float
    tower_ms: float
    tokens: int


class Bench:
    """An engine whose tower has a clock."""

    def __init__(self, model: Path, side: int, **options: Any) -> None:
        self._engine = ProbedEngine(model, None, worker_cls=WORKERS[device()], **options)
        self._side, self._numbers = side, count()
        self._model = self._engine.model
        self._prompt = self._engine.tokenizer.encode(f"{self._model.get_placeholder_str('image', 1)} What does it say?")
        self._vision = self._model.config.vision_config
        self.text = len(self._prompt) - 1
        self._tower, self._plain = Clock(), self._model.embed_multimodal
        self._model.embed_multimodal = self._clocked

    def cost(self, kind: str, reduction: Reduction | None) -> Cost:
        """Cost of one request with a new image."""
        image, self._tower, whole = KINDS[kind](next(self._numbers), self._side), Clock(), Clock()
        with whole.running():
            step = self._engine.prefill(ProbeRequest(self._prompt, image, reduction))
        return Cost(whole.cpu_ms, self._tower.cpu_ms, len(step.outputs[0].prompt_token_ids))

    @property
    def cell(self) -> int:
        """Pixels along a side of the square that becomes one token."""
        return int(self._vision.patch_size * getattr(self._vision, "spatial_merge_size", 1))

    def tower_flop(self, tokens: int) -> float:
        """FLOPs of the tower's layers for `tokens` tokens, with full attention between patches."""
        layers = [module for name, module in self._model.named_modules() if name.endswith((".blocks", ".layers"))]
        tower = next(module for module in layers if not hasattr(module[0], "input_layernorm"))  # not the decoder's
        weights = sum(weight.numel() for weight in tower.parameters() if weight.ndim == 2)
        patches = tokens * getattr(self._vision, "spatial_merge_size", 1) ** 2
        attention = 4 * len(tower) * self._vision.hidden_size * patches**2
        return float(2 * patches * weights + attention)

    def _clocked(self, **inputs: Any) -> Any:
        with self._tower.running():
            return self._plain(**inputs)


def rule_ms(kind: str, side: int, cell: int, reduction: Reduction, rounds: int) -> float:
    """CPU time of the choice of tokens alone; a cell is the square of pixels that becomes one token."""
    pruning = reduction.pruning
    assert pruning is not None
    times = []
    for number in range(rounds):
        pixels = torch.from_numpy(np.asarray(KINDS[kind](number, side - side % cell)).copy())
        cells = pixels.unfold(0, cell, cell).unfold(1, cell, cell).flatten(2).contiguous()
        start = time.process_time()
        pruning.choose(cells, 2)
        times.append((time.process_time() - start) * 1e3)
    return median(times)


def measure(bench: Bench, side: int, pairs: int) -> dict[str, dict[str, object]]:
    """Costs with / without the method for each kind of image; the first pair is not counted."""
    found: dict[str, dict[str, object]] = {}
    for kind in KINDS:
        for name, reduction in ASKED.items():
            costs = alternate(lambda: bench.cost(kind, reduction), lambda: bench.cost(kind, None), pairs + 1)[1:]  # noqa: B023
            first_token = ratio([(a.first_token_ms, b.first_token_ms) for a, b in costs])
            tower = ratio([(a.tower_ms, b.tower_ms) for a, b in costs])
            tokens = [int(median(cost.tokens for cost in each)) - bench.text for each in zip(*costs, strict=True)]
            flop = bench.tower_flop(tokens[0]) / bench.tower_flop(tokens[1])
            rule = rule_ms(kind, side, bench.cell, reduction, 5)
            found[f"{kind}, {name}"] = {
                "vision_tokens": tokens,
                "tower_flop": flop,
                "first_token": asdict(first_token),
                "tower": asdict(tower),
                "rule_ms": rule,
                "first_token_ms": median(base.first_token_ms for _, base in costs),
            }
            print(
                f"{kind}, {name}: {tokens[0]} of {tokens[1]} tokens, {flop:.2f} of the tower's FLOPs; CPU time to the "
                f"first token {first_token}, tower {tower} of what it takes without; the rule {rule:.1f} ms",
                flush=True,
            )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint of Qwen-VL or LLaVA-1.5")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--side", type=int, default=1024, help="pixels along a side of an image")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args(argv)
    options = {"max_model_len": 8192, "max_num_batched_tokens": 8192, "limit_mm_per_prompt": {"image": 1, "video": 0}}
    bench = Bench(args.model, args.side, enforce_eager=True, kv_cache_memory_bytes=1 << 30, **options)
    found = measure(bench, args.side, args.pairs)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
