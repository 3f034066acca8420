"""Reference cases that come with foldserve, with the answers of plain PyTorch in fp32 on a CPU.

`python -m tests.quality.gpu_check.references` makes the file from the demo model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from foldserve.server.quality.gpu_check.jobs import Answer, Case

_METADATA_KEY = "asked"
"""The only metadata entry: the order of several would vary from file to file."""

REFERENCES = Path(__file__).parent / "references.safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class References:
    """Cases for an engine with `withdraw_layer`, and an answer to each."""

    withdraw_layer: int
    images: list[Image.Image]
    cases: tuple[Case, ...]
    answers: tuple[Answer, ...]

    @classmethod
    def load(cls, file: Path = REFERENCES) -> References:
        with safe_open(file, "np") as stored:
            metadata = json.loads(stored.metadata()[_METADATA_KEY])
            pixels, prompts, ids, logprobs, margins = (
                stored.get_tensor(name) for name in ("images", "prompt_tokens", "ids", "logprobs", "margins")
            )
        cases = tuple(Case(**case, tokens=ids.shape[1]) for case in metadata["cases"])
        answers = tuple(
            Answer(prompt_tokens=count, ids=tokens, logprobs=values, margins=leads)
            for count, tokens, values, leads in zip(
                prompts.tolist(), ids.tolist(), logprobs.tolist(), margins.tolist(), strict=True
            )
        )
        return cls(metadata["withdraw_layer"], [Image.fromarray(image) for image in pixels], cases, answers)

    def save(self, file: Path) -> None:
        """Equal references give equal files."""
        values: dict[str, NDArray[np.generic]] = {
            "images": np.stack([np.asarray(image) for image in self.images]),
            "prompt_tokens": np.array([answer.prompt_tokens for answer in self.answers], np.int32),
            "ids": np.array([answer.ids for answer in self.answers], np.int32),
            "logprobs": np.array([answer.logprobs for answer in self.answers], np.float32),
            "margins": np.array([answer.margins for answer in self.answers], np.float32),
        }
        cases = [case.model_dump(exclude={"tokens"}) for case in self.cases]
        metadata = json.dumps({"withdraw_layer": self.withdraw_layer, "cases": cases})
        save_file(values, file, metadata={_METADATA_KEY: metadata})
