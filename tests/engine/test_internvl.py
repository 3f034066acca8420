"""InternVL in both layouts: tiles, marks around them, and all its decoders, against vLLM's own and plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import ModelRegistry

from foldserve.server.engine import withdrawal
from tests import intern_checkpoint
from tests.engine.conftest import MAX_TOKENS, Case, greedy, start_engine
from tests.engine.intern_reference import Film, InternReference
from tests.engine.keeping_reference import Answer
from tests.engine.watch import watch
from tests.images import photo

SIZES = ((300, 200), (120, 500), (168, 168), (700, 690), (640, 130))
"""(width, height): 7, 5, 1, 5 and 6 tiles, the whole image among them."""

K = 3  # of 8 layers


@dataclass(frozen=True)
class Served:
    """A checkpoint: in OpenGVLab's layout (`chat`) or Hugging Face's."""

    path: Path
    chat: bool
    reference: InternReference

    @property
    def options(self) -> dict[str, Any]:
        return {"trust_remote_code": self.chat, "limit_mm_per_prompt": {"image": 4, "video": 2}}

    def asking(self, case: Case) -> Case:
        """With the marks of this layout."""
        return case if self.chat else replace(case, prompt=case.prompt.replace("<image>", "<IMG_CONTEXT>"))


def serve(folder: Path, layout: str, decoder: str) -> Served:
    plain, chat = intern_checkpoint.write(folder / "plain", decoder), layout == "chat"
    path = intern_checkpoint.write_chat(folder / "chat", plain, decoder) if chat else plain
    return Served(path, chat, InternReference(plain, K, chat=chat, most_tiles=intern_checkpoint.MOST_TILES))


@pytest.fixture(scope="module", params=["chat-qwen2", "hf-qwen3"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return serve(tmp_path_factory.mktemp(request.param), *request.param.split("-"))


@pytest.fixture(scope="module")
def llm(served: Served) -> Any:
    """Chunks cut every image; prefix caching is on, as by default."""
    options = {"max_model_len": 2048, "max_num_batched_tokens": 600, "long_prefill_token_threshold": 300}
    return start_engine(served.path, **served.options, **options, **withdrawal.configure(K, device="cpu"))


def ask(*parts: str) -> str:
    return f"<|im_start|>user\n{''.join(parts)}<|im_end|>\n<|im_start|>assistant\n"


def one_image(width: int, height: int, **reduction: object) -> Case:
    return Case(ask("<image>\n", "what is it?"), [photo(width * height, width, height)], [reduction])


def two_images(first: dict[str, Any], second: dict[str, Any]) -> Case:
    images = [photo(1, *SIZES[0]), photo(2, *SIZES[1])]
    return Case(ask("first <image> then <image>?"), images, [first, second])


def assert_same(llm: Any, served: Served, cases: Sequence[Case]) -> None:
    answers = greedy(llm, [served.asking(case) for case in cases])
    for case, (tokens, logprobs) in zip(cases, answers, strict=True):
        films = [(case.film, case.asked)] if isinstance(case, FilmCase) else []
        want, expected = served.reference.generate(case.prompt, case.images, case.reductions, MAX_TOKENS, films)
        assert tokens == want, ([image.size for image in case.images], case.reductions)
        assert logprobs == pytest.approx(expected, abs=2e-5)


@dataclass(frozen=True)
class FilmCase(Case):
    """A case with one video, and what is asked of it."""

    film: Film = field(default_factory=lambda: film(0))
    asked: dict[str, Any] = field(default_factory=dict)

    def to_vllm(self) -> dict[str, Any]:
        data = {"video": [self.film]} | ({"image": list(self.images)} if self.images else {})
        asked = {"video": [self.asked]} | ({"image": list(self.reductions)} if self.images else {})
        return {"prompt": self.prompt, "multi_modal_data": data, "mm_processor_kwargs": {"foldserve": asked}}


def film(seed: int, frames: int = 3) -> Film:
    return np.stack([np.asarray(photo(seed + i, 140, 112)) for i in range(frames)])


MIXED = [
    *(one_image(*size) for size in SIZES),
    *(one_image(*size, ratio=ratio) for size, ratio in zip(SIZES, (0.5, 0.77, 0.25, 0.9, 0.66), strict=True)),
    one_image(*SIZES[0], ratio=0.77),
    one_image(*SIZES[0], ratio=0.25),
    one_image(*SIZES[1], keep_tokens=61),
    one_image(*SIZES[2], method="random", ratio=0.6),
    one_image(*SIZES[4], method="pool", ratio=0.75),
    one_image(*SIZES[1], ratio=0.6, positions="keep"),
    one_image(*SIZES[4], method="random", ratio=0.6, positions="keep"),
    two_images({"ratio": 0.5, "positions": "keep"}, {"ratio": 0.75}),
    two_images({"ratio": 0.5}, {}),
    Case(ask("hello there")),
]
"""Sizes, ratios, methods and unreduced images in one batch."""


IN_THE_DECODER = [
    one_image(*SIZES[0], withdraw=True),
    one_image(*SIZES[1], ratio=0.5, withdraw=True),
    one_image(*SIZES[4], ratio=0.5, withdraw=True, positions="keep"),
    two_images({"ratio": 0.75}, {"withdraw": True}),
    two_images({"ratio": 0.5, "withdraw": True}, {}),
]
CHOSEN = [
    one_image(*SIZES[0], method="fastv", ratio=0.5),
    one_image(*SIZES[1], method="folder+fastv", ratio=0.5, decoder_ratio=0.5),
    one_image(*SIZES[4], method="folder+fastv", ratio=0.5, decoder_ratio=0.5, positions="keep"),
    one_image(*SIZES[2], method="illava_decoder", ratio=0.5),
    two_images({"ratio": 0.75}, {"method": "fastv", "ratio": 0.5}),
]
"""FastV and iLLaVA's half: the image lies in one piece, between its marks."""


def one_film(seed: int, frames: int = 3, **asked: object) -> FilmCase:
    return FilmCase(ask("see <video>\nwhat happens?"), film=film(seed, frames), asked=asked)


FILMS = [
    one_film(1),
    one_film(2, ratio=0.5),
    one_film(3, frames=4, ratio=0.77, positions="keep"),
    one_film(4, frames=1, method="pool", ratio=0.75),
    one_film(5, method="random", ratio=0.5, positions="keep", withdraw=True),
    one_film(6, frames=2, withdraw=True),
    FilmCase(
        ask("<image> and <video>?"), [photo(1, *SIZES[0])], [{"ratio": 0.5}], film=film(8), asked={"ratio": 0.75}
    ),
    FilmCase(ask("<image> and <video>?"), [photo(1, *SIZES[0])], [{}], film=film(9), asked={"ratio": 0.5}),
]
"""A plan holds for each frame; text between frames stays."""


def test_all_in_one_batch_and_again_from_the_cache(llm: Any, served: Served) -> None:
    for _ in range(2):
        assert_same(llm, served, MIXED + IN_THE_DECODER + FILMS)
