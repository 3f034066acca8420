"""The two engines behind one interface, which adds requests and takes steps by hand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""(height, width, 3)"""

PROMPT = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is to be seen here, and where?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
_STEP_TOKENS = 8192  # of both engines: a batch of eight whole prompts
_REQUESTS = 64


@dataclass(frozen=True, slots=True)
class Setup:
    """Settings of both engines; OpenVINO's KV blocks on a CPU always have 32 tokens."""

    threads: int
    kv_gib: int = 2
    max_tokens: int = 4096
    block_size: int = 32


@dataclass(frozen=True, slots=True)
class Contender:
    """An engine and its way to serve an image with fewer tokens.

    Attributes:
        engine: "foldserve" or "openvino".
        name: method, as in tables and charts.
        ratio: share of the image's tokens that is removed.
        px: width and height of the image sent.
        reduction: fields of foldserve's `reduction`.
    """

    engine: str
    name: str
    ratio: float
    px: int
    reduction: tuple[tuple[str, Any], ...] = ()


class Engine(Protocol):
    """Greedy answers of a fixed length to `PROMPT` with an image."""

    def prepare(self, contender: Contender) -> None:
        """Prepares for the contender's requests; not timed."""

    def add(self, number: int, image: Pixels, tokens: int) -> None:
        """Adds a request for an answer of `tokens` tokens."""

    def step(self) -> Sequence[tuple[int, int]]:
        """Takes a step; returns (number, tokens so far) of the requests that got a token."""

    def kv_bytes(self) -> int:
        """Bytes of the KV blocks in use."""


class Foldserve:
    """vLLM's engine with our plugin, in this process."""

    def __init__(self, checkpoint: Path, setup: Setup, *, withdraw_layer: int, eager: bool) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from foldserve.loadtest.micro.engine import ProbedEngine

        self._engine = ProbedEngine(
            checkpoint,
            withdraw_layer,
            dtype="bfloat16",
            max_model_len=setup.max_tokens,
            max_num_batched_tokens=_STEP_TOKENS,
            max_num_seqs=_REQUESTS,
            kv_cache_memory_bytes=setup.kv_gib << 30,
            block_size=setup.block_size,
            enforce_eager=eager,
            limit_mm_per_prompt={"image": 1, "video": 0},
        )
        self._prompt = self._engine.tokenizer.encode(PROMPT)
        self._reduction: Any = None
        self._numbers: dict[str, int] = {}

    def prepare(self, contender: Contender) -> None:
        from foldserve.reducers.plan import Reduction

        self._reduction = Reduction.parse(dict(contender.reduction)) if contender.reduction else None

    def add(self, number: int, image: Pixels, tokens: int) -> None:
        from PIL import Image

        from foldserve.loadtest.micro.engine import ProbeRequest

        name = self._engine.add(ProbeRequest(self._prompt, Image.fromarray(image), self._reduction, tokens))
        self._numbers[name] = number

    def step(self) -> Sequence[tuple[int, int]]:
        outputs = self._engine.step().outputs
        return [(self._numbers[each.request_id], len(each.outputs[0].token_ids)) for each in outputs]

    def kv_bytes(self) -> int:
        return self._engine.used_blocks * self._engine.block_bytes


class OpenVino:
    """GenAI's continuous batching.

    `add_request` ignores the `pruning_ratio` of its own request and prunes by that of the last `generate` (2026.4.1).
    So `prepare` sends one request through `generate`, whose ratio the following requests get.

    Args:
        model: output of `optimum-cli export openvino`.
        kv_precision: "bf16" like ours, or "u8", its default.
    """

    def __init__(self, model: Path, setup: Setup, *, kv_precision: str) -> None:
        from openvino_genai import ContinuousBatchingPipeline, SchedulerConfig

        scheduler = SchedulerConfig()
        scheduler.cache_size = setup.kv_gib
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = _STEP_TOKENS
        scheduler.max_num_seqs = _REQUESTS
        precision = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": setup.threads}
        self._pipeline = ContinuousBatchingPipeline(
            str(model),
            scheduler,
            "CPU",
            precision | {"KV_CACHE_PRECISION": kv_precision},
            vision_encoder_properties=precision,
        )
        self._running: dict[int, tuple[Any, int]] = {}
        self._ratio = 0

    def prepare(self, contender: Contender) -> None:
        self._ratio = round(100 * contender.ratio) if contender.name == "pruning_ratio" else 0
        black = np.zeros((contender.px, contender.px, 3), np.uint8)
        self._pipeline.generate([PROMPT], [[self._tensor(black)]], [self._config(1)])

    def add(self, number: int, image: Pixels, tokens: int) -> None:
        handle = self._pipeline.add_request(
            number, PROMPT, images=[self._tensor(image)], generation_config=self._config(tokens)
        )
        self._running[number] = handle, 0

    def step(self) -> Sequence[tuple[int, int]]:
        self._pipeline.step()
        got = []
        for number, (handle, before) in self._running.items():
            if handle.can_read():
                new = sum(len(each.generated_ids) for each in handle.read().values())
                self._running[number] = handle, before + new
                got.append((number, before + new))
        return got

    def kv_bytes(self) -> int:
        metrics = self._pipeline.get_metrics()
        share: float = metrics.cache_usage / 100
        return round(share * int(metrics.kv_cache_size_in_bytes))

    def _config(self, tokens: int) -> Any:
        from openvino_genai import GenerationConfig

        config = GenerationConfig()
        config.max_new_tokens = tokens
        config.ignore_eos = True
        config.apply_chat_template = False
        config.pruning_ratio = self._ratio
        return config

    @staticmethod
    def _tensor(image: Pixels) -> Any:
        from openvino import Tensor

        return Tensor(image[None])
