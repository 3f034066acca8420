"""The tower and the projector never see more images at once than start-up measured, whatever is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import EngineArgs

from foldserve.reducers import METHODS
from foldserve.reducers.plan import VisionGeometry
from foldserve.server.engine.default_plan import default_plan
from foldserve.server.engine.encoder_budget import EncoderBudget, batches, encoder_budget
from foldserve.server.engine.facts.model import model_facts
from foldserve.server.engine.families.llava import LlavaFamily
from tests import qwen_checkpoint
from tests.engine.conftest import Case, greedy, start_engine
from tests.engine.test_methods import ANY_TOWER, WITH_CLASS_TOKEN
from tests.engine.test_stf import make
from tests.engine.watch import forget
from tests.images import photo

Answer = tuple[list[int], list[float]]
PROFILED = 3
"""Images that the engines here profile: their steps have room for so many, unreduced, and for dozens at ratio 0.9."""

COUNTING = {"scheduler_cls": "foldserve.server.engine.scheduler.make_scheduler"}
"""What `foldserve serve` adds; with `vllm.LLM` and `vllm serve` the model alone keeps the bound."""

SCHEDULERS = {"foldserve serve": COUNTING, "vllm.LLM": {}}


class Seen:
    """What an engine did meanwhile.

    Attributes:
        encoded: images in each run of the tower.
        projected: most tokens in one run of the projector.
        scheduled: images of each step.
    """

    def __init__(self) -> None:
        self.encoded: list[int] = []
        self.projected = 0
        self.scheduled: list[int] = []


@contextmanager
def watched(llm: Any) -> Iterator[Seen]:
    core = llm.llm_engine.engine_core.engine_core
    model = core.model_executor.driver_worker.worker.model_runner.model
    seen, schedule = Seen(), core.scheduler.schedule

    def encode(module: Any, args: tuple[Any, ...]) -> None:
        seen.encoded.append(len(args[0]))

    def project(module: Any, args: tuple[Any, ...]) -> None:
        seen.projected = max(seen.projected, args[0].shape[:-1].numel())

    def scheduled(*args: Any, **kwargs: Any) -> Any:
        step = schedule(*args, **kwargs)
        seen.scheduled.append(sum(len(images) for images in step.scheduled_encoder_inputs.values()))
        return step

    with ExitStack() as stack:
        tower = model.vision_tower.vision_model.embeddings.patch_embedding  # every path goes through it, and once
        stack.callback(tower.register_forward_pre_hook(encode).remove)
        stack.callback(model.multi_modal_projector.register_forward_pre_hook(project).remove)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(core.scheduler, "schedule", scheduled)
        yield seen


def profiled(llm: Any) -> int:
    """As the profile run decides it."""
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    return int(runner.mm_budget.mm_max_items_per_batch["image"])


@pytest.fixture(scope="module", params=SCHEDULERS)
def engine(tiny_llava: Path, request: pytest.FixtureRequest) -> Any:
    """By name the one of `SCHEDULERS`."""
    return request.param, start_engine(tiny_llava, max_num_batched_tokens=3 * 144 + 100, **SCHEDULERS[request.param])


def one_image(seed: int, reduction: dict[str, object]) -> Case:
    return Case("USER: <image>\nWhat is in the picture? ASSISTANT:", [photo(seed)], [reduction])


def check(llm: Any, cases: Sequence[Case], *, counting: bool, tokens: int = 144) -> None:
    forget(llm)
    with watched(llm) as seen:
        greedy(llm, cases, 1)
    assert profiled(llm) == PROFILED
    assert sum(seen.encoded) == sum(seen.scheduled) > 0
    assert max(seen.encoded) <= PROFILED and seen.projected <= PROFILED * tokens
    if counting:
        assert max(seen.scheduled) <= PROFILED
    elif len(cases) > 12 and any(case.reductions[0].get("ratio") == 0.9 for case in cases):
        assert max(seen.scheduled) > PROFILED  # else nothing was shown


@pytest.mark.parametrize(
    "reduction",
    [{}, {"ratio": 0.9}, {"keep_tokens": 2}, *ANY_TOWER, *WITH_CLASS_TOKEN, {"positions": "keep", "ratio": 0.9}],
    ids=str,
)
def test_a_burst_of_requests(engine: tuple[str, Any], reduction: dict[str, object]) -> None:
    name, llm = engine
    check(llm, [one_image(seed, reduction) for seed in range(16)], counting=name == "foldserve serve")


_REDUCTIONS = st.sampled_from([{}, *ANY_TOWER, *WITH_CLASS_TOKEN]) | st.builds(
    lambda method, kept: {"method": method, "keep_tokens": kept},
    st.sampled_from(["folder", "folder_cls", "random", "prumerge"]),
    st.integers(2, 144),
)


@given(st.lists(st.lists(_REDUCTIONS, min_size=1, max_size=4), min_size=1, max_size=8), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_any_mix_of_plans(engine: tuple[str, Any], prompts: list[list[dict[str, object]]], seed: int) -> None:
    cases = [
        Case(f"USER: {'<image> ' * len(asked)}?", [photo(seed + 10 * n + i, 64, 64) for i in range(len(asked))], asked)
        for n, asked in enumerate(prompts)
    ]
    name, llm = engine
    check(llm, cases, counting=name == "foldserve serve")


MIXED = [
    Case(
        "USER: <image> <image> <image> <image>\nWhich? ASSISTANT:",
        [photo(100 + 4 * n + i) for i in range(4)],
        [{"ratio": 0.9}, {"method": "tome", "ratio": 0.5}, {"method": "random", "ratio": 0.9}, {"keep_tokens": 2 + n}],
    )
    for n in range(3)
]


def test_answers_are_the_references(engine: tuple[str, Any], expect: Callable[[Case], Answer]) -> None:
    """Twelve images of four plans and seeds in one step, whose batches mix their order."""
    _, llm = engine
    forget(llm)
    for case, (tokens, logprobs) in zip(MIXED, greedy(llm, MIXED), strict=True):
        want_tokens, want_logprobs = expect(case)
        assert tokens == want_tokens
        assert logprobs == pytest.approx(want_logprobs, abs=2e-4)


def test_images_within_the_bound_share_one_batch(engine: tuple[str, Any]) -> None:
    _, llm = engine
    forget(llm)
    with watched(llm) as seen:
        greedy(llm, [one_image(seed, {"ratio": 0.9}) for seed in range(PROFILED)], 1)
    assert seen.encoded == [PROFILED]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_llava_stf(tmp_path: Path, scheduler: str) -> None:
    _, converted = make(tmp_path, image_size=168)
    llm = start_engine(converted, max_num_batched_tokens=3 * 36 + 30, **SCHEDULERS[scheduler])
    cases = [Case("<image>", [photo(seed)], [{"ratio": 0.9} if seed < 12 else {}]) for seed in range(16)]
    check(llm, cases, counting=bool(SCHEDULERS[scheduler]), tokens=144)


SIZES = ((512, 512), (280, 196), (168, 336), (96, 480))
"""(width, height): the first is of the largest, 256 tokens of 32 x 32 pixels."""

QWEN_REDUCTIONS: list[dict[str, object]] = [
    {"ratio": 0.9},
    {"ratio": 0.9, "positions": "renumber"},
    {"method": "illava", "layers": [1], "ratio": 0.5},
    {"method": "downsample", "ratio": 0.5},
    {},
]


QWEN_PROFILED = 2
MARK = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = qwen_checkpoint.write(tmp_path_factory.mktemp("checkpoints") / "qwen3_vl", "qwen3_vl")
    return start_engine(path, max_num_batched_tokens=QWEN_PROFILED * 256 + 100)


def runner_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def test_patches_of_images_of_any_size(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 x 2 of them are a token: the tower has at most those of two largest images, however many are small."""
    images = [photo(seed, *SIZES[seed % 4]) for seed in range(40)]
    asked = [QWEN_REDUCTIONS[seed % 5] for seed in range(40)]
    cases = [Case(4 * MARK, images[n : n + 4], asked[n : n + 4]) for n in range(0, 40, 4)]
    ours = runner_of(qwen).model
    embed, patches = ours.visual.patch_embed.forward, list[int]()

    def counted(pixels: torch.Tensor) -> Any:
        patches.append(len(pixels))
        return embed(pixels)

    monkeypatch.setattr(ours.visual.patch_embed, "forward", counted)
    greedy(qwen, cases, 1)
    assert max(patches) <= QWEN_PROFILED * 256 * 4
    monkeypatch.setattr(ours, "_tokens_at_once", 10**6)
    forget(qwen)
    greedy(qwen, cases, 1)
    assert max(patches) > QWEN_PROFILED * 256 * 4  # else nothing was shown


def test_rows_of_the_encoder_cache_are_as_wide_as_said(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three deepstack levels and, of tokens that keep theirs, a position. The profile run's have the levels too."""
    forget(qwen)
    runner, facts = runner_of(qwen), model_facts(qwen.llm_engine.vllm_config)
    greedy(qwen, [Case(2 * MARK, [photo(seed, 512, 512) for seed in range(2)], [{"ratio": 0.5}, {}])], 1)
    assert {tuple(rows.shape) for rows in runner.encoder_cache.values()} == {(128, 4 * 128 + 3), (256, 4 * 128)}
    assert facts.encoder_row_bytes == max(rows[0].nbytes for rows in runner.encoder_cache.values())
    assert facts.encoder_cache_rows == QWEN_PROFILED * 256 + 100
    forget(qwen)
    profiled: list[tuple[int, ...]] = []

    def dummy_run(*args: Any, **kwargs: Any) -> tuple[None, None]:
        profiled.extend(tuple(rows.shape) for rows in runner.encoder_cache.values())
        return None, None

    monkeypatch.setattr(runner, "_dummy_run", dummy_run)
    monkeypatch.setattr(runner, "_dummy_sampler_run", lambda *args: None)
    runner.profile_run()
    assert profiled == [(256, 4 * 128)] * QWEN_PROFILED


def test_a_video_is_profiled_where_there_may_be_one(tmp_path: Path) -> None:
    """Of Qwen2.5-VL as published a video of 14 pictures has seven times as many tokens as the largest image."""
    path = qwen_checkpoint.write(tmp_path / "qwen2_5_vl", "qwen2_5_vl")

    def budget(**limits: int) -> EncoderBudget:
        args = EngineArgs(str(path), max_model_len=4096, max_num_batched_tokens=1024, limit_mm_per_prompt=limits)
        return encoder_budget(args.create_engine_config())

    assert budget(image=4) == (7 * 256, 7, 7 * 256)
    assert budget(image=4, video=0) == (4 * 256, 4, 1024)


@pytest.mark.parametrize(
    ("default", "encoded"),
    [
        ({"method": "folder_cls", "ratio": 0.5}, [PROFILED, PROFILED]),
        ({"ratio": 0}, [PROFILED]),
        ({"method": "illava", "ratio": 0.5}, [PROFILED]),  # names layers that this tower has not
        (None, [PROFILED]),
    ],
    ids=str,
)
def test_the_profile_run_tries_the_default_reduction_too(
    tiny_llava: Path, default: dict[str, object] | None, encoded: list[int]
) -> None:
    """Reduced first, then as vLLM does it: the memory that counts is the larger of the two, the cache is unreduced."""
    ours = {} if default is None else {"additional_config": {"foldserve": {"default_reduction": default}}}
    llm = start_engine(tiny_llava, max_num_batched_tokens=3 * 144, **ours, **COUNTING)
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    cached: list[int] = []

    def dummy_run(*args: Any, **kwargs: Any) -> tuple[None, None]:
        cached.extend(len(embeds) for embeds in runner.encoder_cache.values())
        return None, None

    with watched(llm) as seen, pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_dummy_run", dummy_run)
        patch.setattr(runner, "_dummy_sampler_run", lambda *args: None)
        runner.profile_run()
    assert seen.encoded == encoded
    assert cached == [144] * PROFILED
    with watched(llm) as seen:
        greedy(llm, [one_image(1, {})], 1)
    assert seen.encoded == [1]  # a request is no dummy


def test_where_pixels_decide_the_profile_run_tries_an_image_of_which_nearly_all_stays() -> None:
    family = LlavaFamily(VisionGeometry(144, (12, 12), takes_cells=True), "default")
    asked = {"foldserve": {"default_reduction": {"method": "pixelprune"}}}
    config: Any = SimpleNamespace(additional_config=asked)
    plan = default_plan(config, family, family.largest)
    assert plan.kept == 143 and not plan.is_identity


def test_methods_are_all_tried() -> None:
    asked = [str(reduction["method"]) for reduction in [*ANY_TOWER, *WITH_CLASS_TOKEN]]
    tried = {name for methods in asked for name in methods.split("+")}
    on_one_grid = {name for name, method in METHODS.items() if method.stage.value not in ("decoder", "projector")}
    assert tried == on_one_grid - {"base_only", "vidcom2", "evs"}


@given(st.lists(st.sampled_from("abcd"), max_size=30), st.integers(1, 9), st.data())
def test_batches(plans: list[str], most: int, data: st.DataObject) -> None:
    """Of images of one size, and of any."""
    equal = [1] * len(plans)
    for sizes in (equal, data.draw(st.lists(st.integers(1, 12), min_size=len(plans), max_size=len(plans)))):
        found = batches(plans, sizes, most)
        assert sorted(i for batch in found for i in batch) == list(range(len(plans)))
        totals = [sum(sizes[i] for i in batch) for batch in found]
        assert all(0 < total <= most or len(batch) == 1 for batch, total in zip(found, totals, strict=True))
        assert all(a + sizes[batch[0]] > most for a, batch in zip(totals, found[1:], strict=False))  # none too many
        order = [plans[i] for batch in found for i in batch]
        runs = sum(a != b for a, b in pairwise(order)) + bool(order)
        if sum(sizes) <= most:
            assert found == [list(range(len(plans)))] * bool(plans)
        else:
            assert runs == len(set(plans))  # equal plans lie side by side
        if sizes == equal:
            assert len(found) == -(-len(plans) // most)
