"""CUDA graphs of the vision tower, as far as a CPU can try them: `Recorded` stands in for a graph.

`make test-runners` runs those with an engine's runner on V2 too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foldserve.reducers.item import ItemPlan, plan_item
from foldserve.reducers.reduction import Reduction
from foldserve.server.settings import CONFIG_KEY
from tests import siglip_checkpoint
from tests.engine.conftest import V2, Case, greedy, start_engine
from tests.engine.cuda.copies import HostWaits, host_goes_on
from tests.engine.cuda.recorded import Recorded
from tests.engine.test_methods import ON_BOTH, REDUCTIONS, one_image
from tests.engine.watch import forget
from tests.images import photo

Asked = dict[str, object]

KEPT: Asked = {"method": "folder", "ratio": 0.66, "positions": "keep"}
MODULE = "foldserve.server.engine.tower_graphs"
REASONS = {
    "random": "draws other tokens",
    "pixelprune": "each image's pixels",
    "pixelprune+folder": "each image's pixels",
    "pixelprune+divprune": "each image's pixels",
    "pixelprune+mmtok": "each image's pixels",
    "mmtok": "each image's question",
}
"""Methods that are refused, and why."""
CAPTURED = [
    *[(tower, asked) for tower, asked in ON_BOTH if asked["method"] not in REASONS],
    *[(tower, asked) for tower in REDUCTIONS for asked in ({}, KEPT)],
]
BATCHES = (1, 7, 11)
ROOM = 14 * 144  # of a step: so many images are profiled


@pytest.fixture(scope="module", autouse=True)
def recording() -> Iterator[None]:
    """Records in the place of CUDA's graphs, and lets a CPU have them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{MODULE}.CudaGraph", Recorded)
        patch.setattr(f"{MODULE}._conflicts", lambda config: iter(()))
        yield


@pytest.fixture(scope="module")
def models(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """By tower."""
    siglip = siglip_checkpoint.write(tmp_path_factory.mktemp("checkpoints") / "tiny-siglip", tiny_llava)
    engines = {
        tower: start_engine(path, max_num_batched_tokens=ROOM)
        for tower, path in {"clip": tiny_llava, "siglip": siglip}.items()
    }
    yield {tower: runner_of(llm).get_model() for tower, llm in engines.items()}


def runner_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


@contextmanager
def captured(model: Any, asked: Asked) -> Iterator[Any]:
    """The model with graphs of this default reduction."""
    with pytest.MonkeyPatch.context() as patch:
        config = {CONFIG_KEY: {"default_reduction": asked, "tower_graphs": True}}
        patch.setattr(model._vllm_config, "additional_config", config)
        patch.delitem(vars(model), "tower_graphs", raising=False)
        model.tower_graphs.capture(None)
        yield model.tower_graphs
        del model.tower_graphs


def plan_of(model: Any, asked: Asked) -> ItemPlan:
    return plan_item(model.family.with_positions(Reduction.parse(asked)), model.family.largest)


def inputs(model: Any, asked: Sequence[Asked], seed: int) -> dict[str, Any]:
    """Of `embed_multimodal`: an image for each reduction."""
    pixels = [torch.from_numpy(np.array(photo(seed + i, 168, 168))).permute(2, 0, 1) for i in range(len(asked))]
    plans = [torch.tensor(plan_of(model, one).to_ints()) for one in asked]
    return {"pixel_values": torch.stack(pixels).contiguous(), "image_plan": plans}


@torch.inference_mode()
def assert_as_without(model: Any, graphs: Any, asked: Sequence[Asked], sizes: Sequence[int]) -> None:
    """Replays for two batches of images, and then what the model gives without graphs, bit for bit.

    Without graphs images go in the same parts: kernels for other numbers of rows may round otherwise.

    Args:
        sizes: of the graphs that have to be replayed.
    """
    graphs.replays.clear()
    given = [inputs(model, asked, seed) for seed in (100, 200)]
    found = [model.embed_multimodal(**one) for one in given]
    assert sorted(graphs.replays.elements()) == sorted([*sizes, *sizes])
    plans = [plan_of(model, one) for one in asked]
    for one, embeds in zip(given, found, strict=True):
        for part in graphs.parts(range(len(asked)), plans):
            pixels = model.normalized(one["pixel_values"][part])
            eager = model._encode(model.family, {"pixel_values": pixels}, [plans[i] for i in part])
            assert all(torch.equal(embeds[i], own) for i, own in zip(part, eager, strict=True))


def in_sizes(count: int) -> list[int]:
    return [size for size in (8, 4, 2, 1) if count & size]


@pytest.mark.parametrize(("tower", "asked"), CAPTURED, ids=[f"{tower} {asked}" for tower, asked in CAPTURED])
def test_replays_equal_the_model_without_graphs(models: dict[str, Any], tower: str, asked: Asked) -> None:
    with captured(models[tower], asked) as graphs:
        for count in BATCHES:
            assert_as_without(models[tower], graphs, [asked] * count, in_sizes(count))


@pytest.mark.parametrize("tower", REDUCTIONS)
def test_other_plans_share_a_batch_without_graphs(models: dict[str, Any], tower: str) -> None:
    others: list[Asked] = [{}, {"ratio": 0.9}, {**KEPT, "positions": "renumber"}, {"method": "tome", "ratio": 0.5}]
    with captured(models[tower], KEPT) as graphs:
        assert_as_without(models[tower], graphs, [KEPT, others[0], KEPT, *others[1:], KEPT], [2, 1])
        assert_as_without(models[tower], graphs, others, [])


def without_a_clone(graphs: Any, pixels: Tensor) -> Tensor:
    graphs._pixels[: len(pixels)].copy_(pixels)
    graphs.replays[len(pixels)] += 1
    return graphs._graphs[len(pixels)].replay()


def without_new_pixels(graphs: Any, pixels: Tensor) -> Tensor:
    graphs.replays[len(pixels)] += 1
    return graphs._graphs[len(pixels)].replay().clone()


def in_another_order(graphs: Any, pixels: Tensor) -> Tensor:
    return without_a_clone(graphs, pixels).flip(0)


@pytest.mark.parametrize("wrong", [without_a_clone, without_new_pixels, in_another_order])
def test_a_wrong_replay_is_noticed(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Tensor]
) -> None:
    with captured(models["clip"], KEPT) as graphs:
        monkeypatch.setattr(graphs, "replay", partial(wrong, graphs))
        with pytest.raises(AssertionError):
            assert_as_without(models["clip"], graphs, [KEPT] * 3, [2, 1])


def test_a_graph_of_another_plan_is_noticed(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many tokens, so that no shape tells."""
    kept = plan_of(models["clip"], KEPT).kept
    with captured(models["clip"], KEPT) as graphs:
        monkeypatch.setattr(graphs, "plan", plan_of(models["clip"], {"method": "divprune", "keep_tokens": kept}))
        with pytest.raises(AssertionError):
            assert_as_without(models["clip"], graphs, [{"method": "divprune", "keep_tokens": kept}] * 2, [2])


def test_graphs_are_no_larger_than_what_start_up_profiled(models: dict[str, Any], tiny_llava: Path) -> None:
    with captured(models["clip"], {}) as graphs:
        assert graphs.sizes == (8, 4, 2, 1)
    engine = start_engine(tiny_llava, max_num_batched_tokens=3 * 144)
    small = runner_of(engine).get_model()
    with captured(small, KEPT) as graphs:
        assert graphs.sizes == (2, 1)
        assert_as_without(small, graphs, [KEPT] * 3, [2, 1])


@pytest.fixture(scope="module")
def on_meta(models: dict[str, Any]) -> dict[str, Any]:
    """The models without values: the meta device stands for the GPU."""
    return {tower: _on_meta(model) for tower, model in models.items()}


@pytest.mark.parametrize(("tower", "asked"), CAPTURED, ids=[f"{tower} {asked}" for tower, asked in CAPTURED])
def test_nothing_captured_copies_from_the_host(
    on_meta: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tower: str, asked: Asked
) -> None:
    plan = plan_of(on_meta[tower], asked)
    with host_goes_on(monkeypatch, allow_pinned=False):
        embeds = encoded(on_meta[tower], plan)
    assert {(len(own), own.is_meta) for own in embeds} == {(plan.kept, True)}


@pytest.mark.parametrize("asked", [{"method": "random", "ratio": 0.5}, {"method": "pixelprune", "tau": 60}])
def test_a_copy_from_the_host_is_noticed(
    on_meta: dict[str, Any], monkeypatch: pytest.MonkeyPatch, asked: Asked
) -> None:
    from foldserve.reducers.pixelprune import Cells

    model = on_meta["clip"]
    plan = plan_item(Reduction.parse(asked), model.family.largest, Cells.of(torch.arange(144) % 3 > 0))
    with pytest.raises(HostWaits), host_goes_on(monkeypatch, allow_pinned=False):
        encoded(model, plan)


@pytest.mark.parametrize(
    "read", [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.unique()]
)
def test_a_read_of_the_device_is_noticed(read: Callable[[Tensor], object]) -> None:
    def run() -> Tensor:
        x = torch.ones(3)
        read(x)
        return x

    with pytest.raises(HostWaits):
        Recorded(run)


def encoded(model: Any, plan: ItemPlan) -> list[Tensor]:
    pixels = torch.empty(2, 3, 168, 168, device="meta")
    with torch.inference_mode():
        return [*model._encode(model.family, {"pixel_values": pixels}, [plan] * 2)]


def _on_meta(model: Any) -> Any:
    """A copy whose tower and projector have no values. vLLM's CPU kernels of products don't take the meta device."""
    found = copy.copy(model)
    found._modules = dict(model._modules)
    for name in ("vision_tower", "multi_modal_projector"):
        found._modules[name] = copy.deepcopy(model._modules[name]).to("meta")
        for module in found._modules[name].modules():
            if hasattr(module, "cpu_linear"):
                module.cpu_linear = partial(_product, module)
    return found


def _product(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], module.output_size_per_partition)


@pytest.fixture(scope="module")
def llm(tiny_llava: Path) -> Any:
    """Started with the option. Chunks of 700 tokens encode up to four images and cut longer prompts."""
    ours = {CONFIG_KEY: {"default_reduction": KEPT, "tower_graphs": True}}
    return start_engine(tiny_llava, max_num_batched_tokens=700, additional_config=ours)


@pytest.fixture
def graphs(llm: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Those of the engine, captured by its runner."""
    runner = runner_of(llm)
    capture(runner, monkeypatch)
    graphs = runner.get_model().tower_graphs
    assert graphs.is_captured() and graphs.sizes == (4, 2, 1)
    return graphs


def test_answers_are_those_without_graphs(llm: Any, graphs: Any) -> None:
    prompt = "USER: <image> and <image> and <image>\nWhich? ASSISTANT:"
    cases = [
        *(one_image(seed, KEPT) for seed in range(300, 308)),
        Case(prompt, [photo(1), photo(2), photo(3)], [KEPT, {"method": "tome", "ratio": 0.5}, KEPT]),
        Case("USER: no picture at all ASSISTANT:"),
        Case(prompt, [photo(4), photo(5), photo(6)], [{}, KEPT, {"method": "random", "ratio": 0.5}]),
        one_image(7, {"method": "mmtok", "ratio": 0.5, "query": "Where is it?"}),
        Case(prompt, [photo(8), photo(9), photo(10)], [{}, KEPT, {}]),
    ]
    replayed = greedy(llm, cases)
    assert graphs.replays[4] and graphs.replays[1]
    graphs.clear()
    forget(llm)
    graphs.replays.clear()
    for (ids, logprobs), (found_ids, found_logprobs) in zip(greedy(llm, cases), replayed, strict=True):
        assert found_ids == ids and found_logprobs == pytest.approx(logprobs, abs=1e-5)
    assert not graphs.replays


def test_the_runner_leaves_replays_to_the_model(llm: Any, graphs: Any) -> None:
    runner = runner_of(llm)
    encoder = runner.model_state.encoder_runner.cudagraph_manager if V2 else runner.encoder_cudagraph_manager
    assert encoder is graphs and not graphs.supports_modality("image")


def test_captured_again_after_it_was_measured(llm: Any, graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM captures once to measure memory, drops these graphs, and captures those that serve."""
    graphs.clear()
    assert not graphs.is_captured()
    capture(runner_of(llm), monkeypatch)
    assert graphs.is_captured()


def test_the_gpus_runners_capture() -> None:
    """Model runner V1's. V2 asks the model's state, as above."""
    from foldserve.server.engine.tower_graphs import CapturingRunner
    from foldserve.server.engine.worker_cuda import FoldGPUModelRunner, WithdrawingGPUModelRunner

    assert issubclass(FoldGPUModelRunner, CapturingRunner) and issubclass(WithdrawingGPUModelRunner, CapturingRunner)


def test_a_start_that_captured_nothing_fails(llm: Any, graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vLLM finds out that a backend takes no CUDA graphs, long after the options were checked."""
    from vllm.v1.worker.gpu_worker import Worker

    from foldserve.server.engine.worker_cuda import FoldWorker

    monkeypatch.setattr(Worker, "compile_or_warm_up_model", lambda self: "times")
    worker: Any = FoldWorker.__new__(FoldWorker)
    worker.model_runner = runner_of(llm)
    assert worker.compile_or_warm_up_model() == "times"
    graphs.clear()
    with pytest.raises(RuntimeError, match="captured no CUDA graphs"):
        worker.compile_or_warm_up_model()


def test_the_runner_measures_their_memory(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """V1: what all graphs take is estimated before the KV cache is sized, and then given back."""
    free = [2**30]

    class Allocating(Recorded):
        def __init__(self, run: Callable[[], Tensor], pool: object) -> None:
            super().__init__(run, pool)
            free[0] -= 5 << 20

    ours = {CONFIG_KEY: {"default_reduction": KEPT, "tower_graphs": True}}
    engine = start_engine(tiny_llava, max_num_batched_tokens=700, additional_config=ours)
    runner = runner_of(engine)
    as_on_a_gpu(runner, monkeypatch)
    monkeypatch.setattr(f"{MODULE}.CudaGraph", Allocating)
    monkeypatch.setattr("torch.accelerator.get_memory_info", lambda *args: (free[0], 2**30))
    monkeypatch.setattr(runner.compilation_config, "max_cudagraph_capture_size", 1)
    runner._cleanup_profiling_kv_cache()  # on a GPU there is none yet
    assert runner.profile_cudagraph_memory() == 3 * (5 << 20)
    assert not runner.get_model().tower_graphs.is_captured()


def capture(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's start-up on a GPU does, with vLLM's code."""
    as_on_a_gpu(runner, monkeypatch)
    if V2:
        runner.model_state.encoder_runner.capture()
    else:
        runner.capture_model()


def as_on_a_gpu(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner as on a GPU, and a device that does nothing."""
    monkeypatch.setattr("torch.accelerator.synchronize", lambda *args: None)
    monkeypatch.setattr("torch.accelerator.empty_cache", lambda: None)
    monkeypatch.setattr("torch.accelerator.get_memory_info", lambda *args: (0, 0))
    monkeypatch.setattr("vllm.platforms.current_platform.graph_pool_handle", lambda: None, raising=False)
    if V2:
        monkeypatch.setattr("vllm.distributed.parallel_state.graph_capture", lambda device: nullcontext())
        return
    from vllm.config import CUDAGraphMode

    from foldserve.server.engine.tower_graphs import CapturingRunner

    if not isinstance(runner, CapturingRunner):  # only the GPU's runner is one
        runner.__class__ = type("Runner", (CapturingRunner, type(runner)), {})
    runner_module = "vllm.v1.worker.gpu_model_runner"
    monkeypatch.setattr(f"{runner_module}.graph_capture", lambda device: nullcontext())
    monkeypatch.setattr(f"{runner_module}.lock_workspace", lambda: None)
    monkeypatch.setattr(runner.compilation_config, "cudagraph_mode", CUDAGraphMode.FULL_DECODE_ONLY)
