"""`python -m tests.quality.gpu_check.references`: writes the references of `foldserve gpu-check`, in half a minute.

They are plain PyTorch and transformers in fp32 on the demo model, every token recomputed, no cache and no vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from foldserve.server.quality.demo.checkpoint import CHECKPOINT
from foldserve.server.quality.demo.examples import questions
from foldserve.server.quality.gpu_check.jobs import Answer, Case
from foldserve.server.quality.gpu_check.references import REFERENCES, References
from tests.engine.keeping_reference import KeepingWithdrawingReference

TOKENS = 12
SEED = 25
IMAGES = 6
ONE = "<s>USER: <image>\n{} ASSISTANT:"
TWO = "<s>USER: <image>\n<image>\n{} ASSISTANT:"

# Name -> the reductions of its images, as in a request; methods take parameters that fit this model.
CASES: dict[str, list[dict[str, object]]] = {
    "no image": [],
    "ratio 0": [{}],
    "folder 0.5": [{"ratio": 0.5}],
    "folder 0.9": [{"ratio": 0.9}],
    "folder to 10": [{"keep_tokens": 10}],
    "folder_cls 0.66": [{"method": "folder_cls", "ratio": 0.66}],
    "tome 0.5": [{"method": "tome", "ratio": 0.5}],
    "turbo 0.75": [{"method": "turbo", "ratio": 0.75}],
    "illava 0.5": [{"method": "illava", "ratio": 0.5, "layers": [1, 2, 3, 4]}],
    "prumerge 0.75": [{"method": "prumerge", "ratio": 0.75}],
    "pool 0.75": [{"method": "pool", "ratio": 0.75}],
    "random 0.5": [{"method": "random", "ratio": 0.5}],
    "downsample 0.75": [{"method": "downsample", "ratio": 0.75}],
    "withdraw": [{"withdraw": True}],
    "folder 0.5, withdraw": [{"ratio": 0.5, "withdraw": True}],
    "fastv 0.5": [{"method": "fastv", "ratio": 0.5}],
    "folder 0.5, fastv 0.9": [{"method": "folder+fastv", "ratio": 0.5, "decoder_ratio": 0.9}],
    "illava_decoder 0.5": [{"method": "illava_decoder", "ratio": 0.5}],
    "folder 0.75, keep": [{"ratio": 0.75, "positions": "keep"}],
    "tome 0.5, keep": [{"method": "tome", "ratio": 0.5, "positions": "keep"}],
    "folder 0.5, fastv 0.5, keep": [{"method": "folder+fastv", "ratio": 0.5, "positions": "keep"}],
    "two images, folder 0.5 and none": [{"ratio": 0.5}, {}],
    "two images, withdraw and folder 0.9": [{"withdraw": True}, {"ratio": 0.9}],
    "two images, random 0.5 keep and tome 0.66": [
        {"method": "random", "ratio": 0.5, "positions": "keep"},
        {"method": "tome", "ratio": 0.66},
    ],
    "visionzip 0.75": [{"method": "visionzip", "ratio": 0.75}],
    "divprune 0.66": [{"method": "divprune", "ratio": 0.66}],
    "cdpruner 0.8": [{"method": "cdpruner", "ratio": 0.8}],
}


class Recording(KeepingWithdrawingReference):
    """Modification: by how much each token leads is noted, in `margins`."""

    margins: list[float]

    def pick(self, distribution: Tensor) -> tuple[int, float]:
        first, second = distribution.topk(2).values.tolist()
        self.margins.append(first - second)
        return super().pick(distribution)

    def answer(self, case: Case, images: Sequence[Image.Image]) -> Answer:
        self.margins = []
        shown = [images[i] for i in case.images]
        ids, logprobs = self.generate(case.prompt, shown, list(case.reductions), case.tokens)
        prompt = self.prompt_ids(case.prompt, self.plans(shown, list(case.reductions)))
        return Answer(prompt_tokens=len(prompt), ids=tuple(ids), logprobs=tuple(logprobs), margins=tuple(self.margins))


def withdraw_layer() -> int:
    layer: int = json.loads((CHECKPOINT / "withdrawal.json").read_text())["withdraw_layer"]
    return layer


def cases() -> tuple[list[Image.Image], list[Case]]:
    """Images of the demo model's world, and a question about the first of each case."""
    examples = [example for example in questions(SEED, 4 * IMAGES) if not example.history][:IMAGES]
    found = []
    for number, (name, reductions) in enumerate(CASES.items()):
        images = tuple((number + i) % IMAGES for i in range(len(reductions)))
        question = examples[number % IMAGES].question
        prompt = [f"<s>USER: {question} ASSISTANT:", ONE.format(question), TWO.format(question)][len(reductions)]
        found.append(Case(name=name, prompt=prompt, images=images, reductions=tuple(reductions), tokens=TOKENS))
    return [example.image for example in examples], found


def make(chosen: Sequence[str] = tuple(CASES)) -> References:
    """The references, or some of them by their names."""
    torch.set_num_threads(1)  # sums in one order
    images, all_cases = cases()
    wanted = tuple(case for case in all_cases if case.name in chosen)
    reference = Recording(CHECKPOINT, withdraw_layer())
    return References(reference.layer, images, wanted, tuple(reference.answer(case, images) for case in wanted))


def main(file: Path = REFERENCES) -> None:
    references = make()
    references.save(file)
    margins = [margin for answer in references.answers for margin in answer.margins]
    print(
        f"{len(references.cases)} cases, {file.stat().st_size:,} bytes; {sum(m < 0.01 for m in margins)} close tokens"
    )


if __name__ == "__main__":
    main()
