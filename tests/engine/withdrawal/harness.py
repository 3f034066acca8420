"""An in-process engine with withdrawal, watched: after every scheduling step each request's blocks are counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tests.images import photo

BLOCK = 32
PHOTOS = [photo(seed, 168, 168) for seed in range(6)]


@dataclass(frozen=True)
class Case:
    """A prompt with `<image>` marks, token ids that follow it, the numbers of its photos, and whether each leaves."""

    prompt: str
    photos: tuple[int, ...] = ()
    withdraw: bool | tuple[bool, ...] = True
    tail: tuple[int, ...] = ()

    @property
    def images(self) -> list[Image.Image]:
        return [PHOTOS[i] for i in self.photos]

    @property
    def reductions(self) -> list[dict[str, object]]:
        each = (self.withdraw,) * len(self.photos) if isinstance(self.withdraw, bool) else self.withdraw
        return [{"withdraw": withdraw} for withdraw in each]

    def to_vllm(self, tokenizer: Any) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt_token_ids": [*tokenizer.encode(self.prompt), *self.tail]}
        if not self.tail:
            prompt = {"prompt": self.prompt}
        if not self.photos:
            return prompt
        kwargs = {"foldserve": self.reductions}
        return prompt | {"multi_modal_data": {"image": self.images}, "mm_processor_kwargs": kwargs}


@dataclass(frozen=True)
class AskedCase(Case):
    """A case whose images have a reduction each, as JSON; one for all of them if it is a string."""

    asked: str | tuple[str, ...] = "{}"

    @property
    def reductions(self) -> list[dict[str, object]]:
        each = (self.asked,) * len(self.photos) if isinstance(self.asked, str) else self.asked
        return [json.loads(reduction) for reduction in each]


def words(seed: int, count: int) -> str:
    """`count` words of a token each, or about."""
    return " ".join(
        "the red car and a dog in front of two people"[3 * ((seed * 7 + i * 5) % 14) :][:3] for i in range(count)
    )


class Engine:
    """vLLM's offline LLM with K, plus the counts that the tests assert on.

    `steps` counts scheduling steps by what they held: "all", "no_deep_row" (every scheduled token was withdrawn),
    "preempted", "whole" (prompts that have to be scheduled whole, and were), "whole_again" (after a preemption),
    "waiting" (whole prompts that waited while something else ran).
    """

    def __init__(self, path: Path, layer: int | None, **options: Any) -> None:
        from vllm import LLM

        from foldserve.server.engine import withdrawal

        settings: dict[str, Any] = {
            "dtype": "float32",
            "max_model_len": 768,
            "enforce_eager": True,
            "block_size": BLOCK,
            "kv_cache_memory_bytes": 64 << 20,
            "limit_mm_per_prompt": {"image": 4},
            "max_num_seqs": 16,
            "mm_processor_cache_gb": 0.1,
            "seed": 0,
            "enable_prefix_caching": True,
            "disable_log_stats": False,
        }
        if layer is not None:
            settings |= withdrawal.configure(layer, device="cpu")
        self.llm = LLM(str(path), **(settings | options))
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self.managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.steps: Counter[str] = Counter()
        self._schedule = self.scheduler.schedule
        self.scheduler.schedule = self._watched_schedule

    def generate(self, cases: Sequence[Case], tokens: int, **params: Any) -> list[Any]:
        """vLLM's outputs of all cases in one call, greedy with log-probabilities."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            **({"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "logprobs": 0} | params)
        )
        prompts = [case.to_vllm(self.llm.get_tokenizer()) for case in cases]
        outputs: list[Any] = self.llm.generate(prompts, sampling, use_tqdm=False)
        return outputs

    def add(self, request_id: str, case: Case, tokens: int, **params: Any) -> None:
        from vllm import SamplingParams

        sampling = SamplingParams(
            **({"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "logprobs": 0} | params)
        )
        self.llm.llm_engine.add_request(request_id, case.to_vllm(self.llm.get_tokenizer()), sampling)

    def step(self) -> list[Any]:
        outputs: list[Any] = self.llm.llm_engine.step()
        return outputs

    def abort(self, request_ids: Iterable[str]) -> None:
        self.llm.llm_engine.abort_request(list(request_ids))

    def assert_all_blocks_free(self) -> None:
        assert not self.scheduler.requests
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1  # one is vLLM's null block

    def _watched_schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = self._schedule(*args, **kwargs)
        deep_rows = 0
        for request_id, request in self.scheduler.requests.items():
            n = request.num_computed_tokens
            scheduled = output.num_scheduled_tokens.get(request_id, 0)
            kept = n - len([x for x in withdrawn_tokens(request) if x < n])
            before = n - scheduled
            deep_rows += kept - (before - len([x for x in withdrawn_tokens(request) if x < before]))
            self._assert_blocks(request_id, n, kept)
            if needs_whole(request) and before < request.num_prompt_tokens:
                assert not scheduled or (before == 0 and scheduled >= request.num_prompt_tokens)
                kind = "waiting" if not scheduled else "whole_again" if request.num_preemptions else "whole"
                self.steps[kind] += bool(output.total_num_scheduled_tokens)
        self.steps["all"] += 1
        self.steps["no_deep_row"] += bool(output.total_num_scheduled_tokens) and not deep_rows
        self.steps["preempted"] += len(output.preempted_req_ids or ())
        return output

    def _assert_blocks(self, request_id: str, n: int, kept: int) -> None:
        from foldserve.server.engine.withdrawal.manager import DeepKVCacheManager

        held = [len(manager.req_to_blocks.get(request_id, ())) for manager in self.managers]
        if any(held):  # else it waits
            tokens = [kept if isinstance(manager, DeepKVCacheManager) else n for manager in self.managers]
            assert held == [-(-count // BLOCK) for count in tokens], (request_id, n, kept, held)


def withdrawn_tokens(request: Any) -> list[int]:
    """Token numbers of the request that the deep layers do not keep; where they are chosen, only the count is right."""
    tokens = []
    for feature in request.mm_features:
        method, kept = deep_mode(feature.identifier)
        if method:
            offset, length = feature.mm_position.offset, feature.mm_position.length - kept
            tokens += [x for x in range(offset, offset + length) if x != request.num_prompt_tokens - 1]
    return tokens


def needs_whole(request: Any) -> bool:
    """Some image of the request keeps tokens that are chosen by their scores."""
    return any(deep_mode(feature.identifier)[1] for feature in request.mm_features)


def deep_mode(identifier: str) -> tuple[str, int]:
    """Method and kept tokens that an image is marked with."""
    method, is_marked, kept = identifier.rpartition("~")[2].partition(":")
    return (method, int(kept)) if is_marked else ("", 0)


def answer_of(output: Any) -> tuple[list[int], list[float]]:
    """Token ids and log-probabilities of the first sequence of an output."""
    sequence = output.outputs[0]
    ids = list(sequence.token_ids)
    return ids, [step[token].logprob for token, step in zip(ids, sequence.logprobs, strict=True)]
