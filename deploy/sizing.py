"""How many requests a GPU holds at once: prints the table of docs/guides/operations.md. Standard library only.

    python deploy/sizing.py                                  # the table
    python deploy/sizing.py --text 1024 --images 2           # for other requests

A sequence of t text and n kept vision tokens takes 4 d (L t + K n) bytes: a key and a value of d 16-bit numbers per
token and layer. Vision tokens leave at layer K of L (K = L without withdrawal). vLLM allocates blocks of 16 tokens.
The formula is for multi-head attention, as in Llama-2; grouped-query attention takes less.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

MIB = 2**20
BLOCK = 16
VISION_TOKENS = 576
MEMORY_SHARE = 0.92
"""vLLM's default --gpu-memory-utilization."""
WORKSPACE = 2 * 2**30
"""Assumed for activations, CUDA graphs and the CUDA context; vLLM measures it at start-up."""


@dataclass(frozen=True)
class Model:
    """A LLaVA-1.5 in 16 bits.

    Attributes:
        parameters: number of them in language model, CLIP ViT-L/14-336 and projector.
        layers, hidden: L and d of the decoder.
        paper_k: the withdrawal paper's K without calibration.
    """

    name: str
    parameters: float
    layers: int
    hidden: int
    paper_k: int

    def sequence_bytes(self, text: int, vision: int, withdraw_layer: int | None = None) -> int:
        """KV cache of one sequence, in whole blocks."""
        shallow = self.layers if withdraw_layer is None else withdraw_layer
        tokens = shallow * _in_blocks(text + vision) + (self.layers - shallow) * _in_blocks(text)
        return 4 * self.hidden * tokens


@dataclass(frozen=True)
class Gpu:
    """A GPU; `mib` is the memory that its driver reports."""

    name: str
    mib: int

    def kv_bytes(self, model: Model) -> int:
        """Memory left for the KV cache; 0 or less if the weights don't fit."""
        return int(self.mib * MIB * MEMORY_SHARE - 2 * model.parameters - WORKSPACE)


MODELS = (Model("7B", 7.06e9, 32, 4096, 16), Model("13B", 13.35e9, 40, 5120, 20))
GPUS = (
    Gpu("24 GB (RTX 4090)", 24564),
    Gpu("48 GB (L40S)", 46068),
    Gpu("80 GB (H100)", 81559),
    Gpu("141 GB (H200)", 143771),
)
CASES = ((0.0, False), (0.5, False), (0.66, False), (0.9, False), (0.0, True), (0.66, True))
"""Ratio, and whether withdrawn at the paper's K."""


def kept(ratio: float) -> int:
    """Vision tokens of an image after reduction."""
    return VISION_TOKENS - int(VISION_TOKENS * ratio)


def table(text: int, images: int) -> str:
    """Markdown table of the sequences held at once and the MiB of one, by model, GPU and reduction."""
    names = [f"{ratio:g}{', K' if withdrawn else ''}" for ratio, withdrawn in CASES]
    lines = [_row(["model", "GPU", "KV cache", *names]), _row(["---"] * (3 + len(CASES)))]
    for model in MODELS:
        sizes = [_size(model, text, images, *case) for case in CASES]
        name = f"{model.name} (K = {model.paper_k})"
        lines.append(_row([name, "one sequence", "", *(f"{size / MIB:.0f} MiB" for size in sizes)]))
        for gpu in GPUS:
            room = gpu.kv_bytes(model)
            if room <= 0:
                lines.append(_row([model.name, gpu.name, "weights don't fit", *(["-"] * len(CASES))]))
                continue
            counts = [f"{room // size}" for size in sizes]
            lines.append(_row([model.name, gpu.name, f"{room / 2**30:.1f} GiB", *counts]))
    return "\n".join(lines)


def _size(model: Model, text: int, images: int, ratio: float, withdrawn: bool) -> int:
    return model.sequence_bytes(text, images * kept(ratio), model.paper_k if withdrawn else None)


def _in_blocks(tokens: int) -> int:
    return -(-tokens // BLOCK) * BLOCK


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="How many requests a GPU holds at once, by ratio and withdrawal.")
    parser.add_argument("--text", type=int, default=256, help="text tokens of prompt and answer (default: %(default)s)")
    parser.add_argument("--images", type=int, default=1, help="images of a request (default: %(default)s)")
    options = parser.parse_args()
    if options.text < 1 or options.images < 1:
        parser.error("--text and --images must be at least 1")
    print(table(options.text, options.images))


if __name__ == "__main__":
    main()
