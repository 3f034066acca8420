"""Kept positions without an engine: identities, limits, and a step of the runner against a loop over tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from vllm.multimodal.inputs import PlaceholderRange

from foldserve.reducers.item import Layout, plan_item
from foldserve.reducers.plan import InvalidReduction, Reduction, VisionGeometry, make_plan
from foldserve.server.engine import positions
from foldserve.server.engine.identity import ItemIdentity
from foldserve.server.engine.positions import SequencePositions, attach, detach
from foldserve.server.engine.runner_v1 import PositionsRunner
from foldserve.server.engine.state_v2 import FoldModelState
from foldserve.server.engine.vision import KeptTokens, reduce_features
from foldserve.server.engine.worker import WORKERS

WIDTH = 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_positions_travel_exactly(dtype: torch.dtype) -> None:
    source = torch.tensor([0, 1, 255, 256, 2879, 65_535])
    embeds, travelled = detach(attach(torch.ones(6, 3, dtype=dtype), source))
    assert torch.equal(travelled, source)
    assert torch.equal(embeds, torch.ones(6, 3, dtype=dtype))


def test_renumbering_is_the_plan_of_who_says_nothing() -> None:
    """The same plan is the same identity, hence the same cache entries."""
    clip = Layout.single(VisionGeometry(576, (24, 24), layers=23, class_token=True))
    plans = [plan_item(Reduction.parse({"ratio": 0.5, **more}), clip) for more in ({}, {"positions": "renumber"})]
    assert plans[0] == plans[1] != plan_item(Reduction.parse({"ratio": 0.5, "positions": "keep"}), clip)
    whole = [plan_item(Reduction.parse({"ratio": 0, "positions": p}), clip) for p in ("keep", "renumber")]
    assert whole[0] == whole[1] and whole[0].is_identity and not whole[0].keeps_positions


def engine_config(**changes: Any) -> Any:
    """vLLM's configuration as far as `limit` reads it: ours, of an engine that keeps positions."""
    parallel = {"worker_cls": WORKERS["cpu"], "pipeline_parallel_size": 1, "use_ubatching": False}
    others = {"use_v2_model_runner": False, "speculative_config": None}
    model = SimpleNamespace(hf_text_config=SimpleNamespace(max_position_embeddings=4096), max_model_len=1024)
    parallel, others = (
        {name: changes.get(name, value) for name, value in known.items()} for known in (parallel, others)
    )
    return SimpleNamespace(parallel_config=SimpleNamespace(**parallel), model_config=model, **others)


def test_positions_end_with_what_the_model_was_trained_for() -> None:
    assert positions.position_limit(engine_config()) == 4096
    assert positions.position_limit(engine_config(worker_cls="auto", use_v2_model_runner=True)) == 4096


@pytest.mark.parametrize(
    "other",
    [
        {"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"},
        {"use_ubatching": True},
        {"pipeline_parallel_size": 2},
        {"speculative_config": object()},
    ],
    ids=lambda other: next(iter(other)),
)
def test_engines_that_cannot_keep_positions(other: dict[str, Any]) -> None:
    assert positions.position_limit(engine_config(**other)) is None


@dataclass
class Image:
    """An image in a prompt; `source` are the positions in it that its tokens keep, None if they are renumbered."""

    offset: int
    length: int
    full: int
    source: list[int] | None

    @property
    def identifier(self) -> str:
        return str(ItemIdentity("image", None if self.source is None else self.full))

    @property
    def mm_position(self) -> PlaceholderRange:
        return PlaceholderRange(offset=self.offset, length=self.length)

    def embeds(self, device: str) -> Tensor:
        plain = torch.zeros(self.length, WIDTH, device=device)
        return plain if self.source is None else attach(plain, torch.tensor(self.source, device=device))


@dataclass
class Request:
    """A request in a step: `computed` tokens of it are done, `scheduled` are to be."""

    mm_features: list[Image]
    num_computed_tokens: int
    scheduled: int
    expected: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 1
    sampling_params: Any = field(default_factory=lambda: SimpleNamespace(max_tokens=1))


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Text and images in turn, cut anywhere; `expected` by a loop over all tokens of the request."""
    images: list[Image] = []
    places: list[int] = list(range(draw(st.integers(0, 3))))
    following = len(places)
    for _ in range(draw(st.integers(0, 3))):
        full = draw(st.integers(1, 9))
        kept = draw(st.integers(1, full))
        source = draw(
            st.none() | st.lists(st.integers(0, full - 1), min_size=kept, max_size=kept, unique=True).map(sorted)
        )
        images.append(Image(len(places), kept, full, source))
        places += [following + place for place in (range(kept) if source is None else source)]
        following += kept if source is None else full
        text = draw(st.integers(0, 4))
        places += range(following, following + text)
        following += text
    places += range(following, following + 6)  # generated ones
    computed = draw(st.integers(0, len(places) - 1))
    scheduled = draw(st.integers(1, len(places) - computed))
    return Request(images, computed, scheduled, places[computed : computed + scheduled])


class Plain:
    """A step of vLLM's V1 runner as far as it matters here."""

    def __init__(self, batch: list[Request], device: str) -> None:
        self.requests = {str(i): request for i, request in enumerate(batch)}
        self.input_batch = SimpleNamespace(req_ids=list(self.requests))
        self.positions = numbers(batch, device)
        self.step = SimpleNamespace(
            num_scheduled_tokens={i: request.scheduled for i, request in self.requests.items()},
            total_num_scheduled_tokens=len(self.positions) - 2,
        )
        self.device = device
        self.model = SimpleNamespace(can_keep_positions=True, family=ONE_NUMBER)
        self.model_config = CONFIG
        self.uses_mrope = False

    def get_model(self) -> Any:
        return self.model

    def _gather_mm_embeddings(self, step: Any, shift_computed_tokens: int = 0) -> tuple[list[Tensor], Tensor]:
        return list(gathered(self.requests.values(), self.device)), torch.zeros(step.total_num_scheduled_tokens) > 0

    def run(self) -> tuple[list[Tensor], Tensor]:
        """The embeddings and the positions that the model gets."""
        embeds, _ = self._gather_mm_embeddings(self.step)
        return embeds, self.positions


ONE_NUMBER = SimpleNamespace(position_map=SequencePositions.of)  # a family's, as far as it matters here
CONFIG = SimpleNamespace(hf_text_config=SimpleNamespace(max_position_embeddings=100), max_model_len=50)


def numbers(batch: list[Request], device: str) -> Tensor:
    """Each token's number in its request, and two rows of an earlier step."""
    plain = [x for r in batch for x in range(r.num_computed_tokens, r.num_computed_tokens + r.scheduled)]
    return torch.tensor([*plain, 7, 7], device=device)


def gathered(batch: Iterable[Request], device: str) -> Iterator[Tensor]:
    """What vLLM gathers from the encoder cache for a step."""
    for request in batch:
        end = request.num_computed_tokens + request.scheduled
        for image in request.mm_features:
            first, last = max(request.num_computed_tokens, image.offset), min(end, image.offset + image.length)
            if first < last:
                yield image.embeds(device)[first - image.offset : last - image.offset]


class Runner(PositionsRunner, Plain):
    """Ours."""


class State(FoldModelState):
    """Ours, of model runner V2, without an engine around it."""

    def __init__(self, batch: list[Request], device: str) -> None:
        self._position_maps, self._changes, self._keeps_positions = {}, None, True
        self.model: Any = SimpleNamespace(family=ONE_NUMBER)
        self._positions = torch.full((100,), 7, device=device)
        self.rope_state = self.prompt_embeds_state = self.mm_pruner = None
        self.model_config = CONFIG
        names = [str(i) for i in range(len(batch))]
        self.encoder_cache = SimpleNamespace(mm_features={n: r.mm_features for n, r in zip(names, batch, strict=True)})
        embeds = list(gathered(batch, device))
        self.encoder_runner = SimpleNamespace(gather_mm_embeddings=lambda *_, **__: (embeds, None))
        self.step: Any = SimpleNamespace(
            req_ids=names,
            num_tokens=len(numbers(batch, device)) - 2,
            num_tokens_after_padding=len(numbers(batch, device)),
            num_computed_tokens_np=np.array([r.num_computed_tokens for r in batch]),
            num_scheduled_tokens=np.array([r.scheduled for r in batch]),
            query_start_loc_np=None,
            prefill_len_np=None,
            positions=numbers(batch, device),
        )
        for index, (name, request) in enumerate(zip(names, batch, strict=True)):
            new: Any = SimpleNamespace(
                req_id=name,
                mm_features=request.mm_features,
                prompt_len=request.num_prompt_tokens,
                sampling_params=request.sampling_params,
            )
            self.add_request(index, new)

    def run(self) -> tuple[list[Tensor], Tensor]:
        embeds, _ = self.gather_mm_embeddings(self.step)
        positions = self.positions()
        assert self._positions is not None and positions.data_ptr() == self._positions.data_ptr()  # as a graph reads it
        return embeds, positions

    def positions(self) -> Tensor:
        """What the model gets."""
        nothing: Any = None
        positions = self.prepare_inputs(self.step, nothing)["positions"]
        assert positions is not None
        return positions


RUNNERS = pytest.mark.parametrize("runner", [Runner, State], ids=["v1", "v2"])


@RUNNERS
@given(batch=st.lists(requests(), min_size=1, max_size=4))
def test_a_step_equals_a_loop_over_tokens(runner: Any, batch: list[Request]) -> None:
    """Requests that keep, renumber, or do both, in any phase; rows beyond the step are left alone."""
    embeds, positions = runner(batch, "cpu").run()
    assert positions.tolist() == [*(place for request in batch for place in request.expected), 7, 7]
    assert [item.shape for item in embeds] == [(item.shape[0], WIDTH) for item in gathered(batch, "cpu")]


@RUNNERS
@given(batch=st.lists(requests(), min_size=1, max_size=4))
def test_a_step_reads_nothing_back_from_the_device(runner: Any, batch: list[Request]) -> None:
    """On the meta device there are no values: whatever needed one on the host, or copied one there, would raise."""
    embeds, _ = runner(batch, "meta").run()
    assert all(item.is_meta and item.shape[1] == WIDTH for item in embeds)


def test_with_model_runner_v2_the_batch_s_own_positions_stay() -> None:
    """Slots are mapped and random numbers drawn from them, and a request that has ended moves nobody's."""
    state = State([Request([Image(0, 1, 5, [3])], 0, 2)], "cpu")
    assert state.run()[1].tolist() == [3, 5, 7, 7]
    assert state.step.positions.tolist() == [0, 1, 7, 7]
    state.remove_request("0")
    assert state.positions().tolist() == [0, 1, 7, 7]
    assert state._position_maps == {}


@pytest.mark.parametrize("method", ["folder", "pool", "random"])
def test_the_encoder_reads_no_survivor_back(method: str) -> None:
    """From the tower's output to the embeddings with their positions; methods in the tower: tests/reducers."""
    plan = make_plan(
        Reduction.parse({"method": method, "ratio": 0.75, "positions": "keep"}), VisionGeometry(144, (12, 12), 3)
    )
    whole = KeptTokens(torch.zeros(144, WIDTH, device="meta"), torch.arange(144, device="meta"))
    (left,) = reduce_features([whole], [plan])
    assert attach(left.features, left.source).shape == (36, WIDTH + 3)


def test_a_model_whose_identities_are_not_ours_is_left_alone() -> None:
    """A client may name an item of vLLM's own models as it likes."""
    runner = Runner([Request([Image(0, 1, 5, [3])], 0, 1, [])], "cpu")
    runner.model.can_keep_positions = False
    embeds, positions = runner.run()
    assert positions.tolist() == [0, 7, 7]
    assert [item.shape for item in embeds] == [(1, WIDTH + 3)]
    assert SequencePositions.of([]) is None


@RUNNERS
@pytest.mark.parametrize(("prompt", "asked", "fits"), [(40, 56, True), (40, 57, False), (96, 1, False), (1, 95, True)])
def test_a_request_that_goes_beyond_the_models_positions_is_refused(
    runner: Any, prompt: int, asked: int, fits: bool
) -> None:
    """A hundred positions, of which one image leaves four as gaps."""
    params = SimpleNamespace(max_tokens=asked)
    batch = [Request([Image(0, 1, 5, [3])], 0, 1, num_prompt_tokens=prompt, sampling_params=params)]
    if fits:
        runner(batch, "cpu").run()
        return
    with pytest.raises(InvalidReduction, match=f"takes {prompt + 4} of the model's 100 positions, and {asked} more"):
        runner(batch, "cpu").run()


def test_gaps_alone_are_refused() -> None:
    """Requests without any are vLLM's own business."""
    positions.refuse_positions(prompt_tokens=200, beyond=0, asked=9, limit=100)
    positions.refuse_positions(prompt_tokens=200, beyond=-5, asked=9, limit=100)
