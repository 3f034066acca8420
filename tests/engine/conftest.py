"""One in-process engine for the folder: small chunks that cut images, prefix caching on, several images per prompt.

With VLLM_USE_V2_MODEL_RUNNER=1 and TRITON_INTERPRET=1 the engines have model runner V2, its Triton kernels interpreted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import siglip_checkpoint
from tests.engine.reference import Reference

MAX_TOKENS = 8
LAYERS = 8  # of the decoder of `eight_layers`
V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
if V2:
    from triton.backends import backends

    class NamedDriver:
        """Triton brings none for CPUs: the name of one is enough for vLLM, and interpreted kernels never ask for it."""

        is_active = staticmethod(lambda: True)

    backends["cpu"] = SimpleNamespace(driver=NamedDriver)


@dataclass(frozen=True)
class Case:
    """A prompt with `<image>` marks, its images, and one reduction (JSON form) per image."""

    prompt: str
    images: Sequence[Image.Image] = ()
    reductions: Sequence[dict[str, object]] = ()

    def to_vllm(self) -> dict[str, Any]:
        if not self.images:
            return {"prompt": self.prompt}
        prompt = {"prompt": self.prompt, "multi_modal_data": {"image": list(self.images)}}
        return prompt | ({"mm_processor_kwargs": {"foldserve": list(self.reductions)}} if self.reductions else {})


class MediaCase(Case):
    """A case whose images may be videos too, as frames in an array, in the order of the prompt."""

    def to_vllm(self) -> dict[str, Any]:
        data: dict[str, list[Any]] = {}
        asked: dict[str, list[Any]] = {}
        for i, item in enumerate(self.images):
            modality = "video" if isinstance(item, np.ndarray) else "image"
            data.setdefault(modality, []).append(item)
            if self.reductions:
                asked.setdefault(modality, []).append(self.reductions[i])
        prompt = {"prompt": self.prompt, "multi_modal_data": data}
        return prompt | ({"mm_processor_kwargs": {"foldserve": asked}} if asked else {})


@dataclass(frozen=True)
class FilmCase(Case):
    """A case with one video, in the form that the model's processor takes, and what is asked of it."""

    film: Any = field(kw_only=True)
    asked: dict[str, object] = field(default_factory=dict)

    def to_vllm(self) -> dict[str, Any]:
        data = {"video": [self.film]} | ({"image": list(self.images)} if self.images else {})
        asked = {"video": [self.asked]} | ({"image": list(self.reductions)} if self.images else {})
        return {"prompt": self.prompt, "multi_modal_data": data, "mm_processor_kwargs": {"foldserve": asked}}


def start_engine(path: Path, **options: Any) -> Any:
    from vllm import LLM

    defaults: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 1024,
        "enforce_eager": True,
        "block_size": 32,
        "kv_cache_memory_bytes": 64 << 20,
        "limit_mm_per_prompt": {"image": 4},
        "max_num_seqs": 16,
        "mm_processor_cache_gb": 0.1,
        "seed": 0,
        "worker_cls": "foldserve.server.engine.worker_cpu.FoldWorker",
    }
    llm = LLM(str(path), **(defaults | options))
    assert llm.llm_engine.vllm_config.use_v2_model_runner == V2
    return llm


def greedy(llm: Any, cases: Sequence[Case], tokens: int = MAX_TOKENS) -> list[tuple[list[int], list[float]]]:
    """Token ids and log-probabilities of every case, all in one call."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0)
    outputs = llm.generate([case.to_vllm() for case in cases], params, use_tqdm=False)
    return [_ids_and_logprobs(output.outputs[0]) for output in outputs]


def _ids_and_logprobs(completion: Any) -> tuple[list[int], list[float]]:
    ids = list(completion.token_ids)
    return ids, [step[token].logprob for token, step in zip(ids, completion.logprobs, strict=True)]


def remembered(reference: Any) -> Callable[[Case], tuple[list[int], list[float]]]:
    """Answers of a reference, computed once for each case, which is told apart by its identity."""
    known: dict[int, tuple[Case, Any]] = {}  # with the case, so that no other one gets its id

    def answer(case: Case) -> Any:
        if id(case) not in known:
            known[id(case)] = case, reference.generate(case.prompt, case.images, case.reductions, MAX_TOKENS)
        return known[id(case)][1]

    return answer


def by_uuid_alone(llm: Any, case: Case) -> tuple[Any, Any]:
    """Answers to a case whose first image has a uuid, as it is sent, and then as its uuid alone."""
    from vllm import SamplingParams

    sent = case.to_vllm() | {"multi_modal_uuids": {"image": ["a-name", *[None] * (len(case.images) - 1)]}}
    alone = sent | {"multi_modal_data": {"image": [None, *case.images[1:]]}}
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    first, second = (llm.generate([prompt], params, use_tqdm=False)[0] for prompt in (sent, alone))
    return first, second


@pytest.fixture(scope="session")
def reference(tiny_llava: Path) -> Reference:
    return Reference(tiny_llava)


@pytest.fixture(scope="package")
def llm(tiny_llava: Path) -> Iterator[Any]:
    """Chunks of 50 tokens cut every image; prefix caching is on, as by default."""
    yield start_engine(tiny_llava, max_num_batched_tokens=50, enable_prefix_caching=True)


@pytest.fixture(scope="session")
def siglip(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llava` with a SigLIP tower."""
    return siglip_checkpoint.write(tmp_path_factory.mktemp("checkpoints") / "tiny-siglip", tiny_llava)


@pytest.fixture(scope="module")
def engines(llm: Any, siglip: Path) -> dict[str, Any]:
    """`llm` and its like with a SigLIP tower."""
    return {"clip": llm, "siglip": start_engine(siglip, max_num_batched_tokens=50, enable_prefix_caching=True)}


@pytest.fixture(scope="session")
def expect(reference: Reference) -> Callable[[Case], tuple[list[int], list[float]]]:
    """The reference's answer, remembered: the same case serves several tests."""
    known: dict[str, tuple[list[int], list[float]]] = {}

    def answer(case: Case) -> tuple[list[int], list[float]]:
        key = repr((case.prompt, [image.tobytes()[:4096] for image in case.images], case.reductions))
        if key not in known:
            known[key] = reference.generate(case.prompt, case.images, case.reductions, MAX_TOKENS)
        return known[key]

    return answer


@pytest.fixture(scope="session")
def eight_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-1.5 checkpoint in fp32 with eight decoder layers and 144 vision tokens per image."""
    from foldserve.server.quality.demo_model import create

    return create(tmp_path_factory.mktemp("checkpoints") / "eight-layers", image_size=168, num_layers=LAYERS)
