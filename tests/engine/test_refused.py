"""What `vllm.LLM` refuses: options at start-up, and single requests, without ending the engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from vllm import EngineArgs
from vllm.config import CUDAGraphMode, VllmConfig

from foldserve.reducers.plan import InvalidReduction
from foldserve.server.engine.families.registry import FAMILY_CLASSES
from foldserve.server.engine.tower_graphs import check_graphs
from foldserve.server.engine.worker import WORKERS
from foldserve.server.settings import CONFIG_KEY
from tests import qwen_checkpoint
from tests.engine.conftest import Case, greedy, start_engine
from tests.images import photo


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"compilation_config": {"cudagraph_mm_encoder": True}}, "cudagraph_mm_encoder"),
        ({"enable_lora": True, "enable_tower_connector_lora": True}, "--enable-tower-connector-lora"),
    ],
    ids=["graphs of the tower", "adapters of the tower"],
)
def test_options(tiny_llava: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} .*does not go with foldserve"):
        start_engine(tiny_llava, **options)


def test_graphs_of_the_tower_on_a_cpu(tiny_llava: Path) -> None:
    with pytest.raises(ValueError, match="--tower-graphs does not go with a CPU: CUDA graphs need an NVIDIA GPU"):
        start_engine(tiny_llava, additional_config={CONFIG_KEY: {"tower_graphs": True}})


def no_change(config: VllmConfig) -> None: ...


def eager(config: VllmConfig) -> None:
    config.model_config.enforce_eager = True


def without_graphs(config: VllmConfig) -> None:
    config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE


def on_two_gpus(config: VllmConfig) -> None:
    config.parallel_config.tensor_parallel_size = 2


def with_vllms_worker(config: VllmConfig) -> None:
    config.parallel_config.worker_cls = "vllm.v1.worker.gpu_worker.Worker"


def in_two_stages(config: VllmConfig) -> None:
    config.parallel_config.pipeline_parallel_size = 2


@pytest.mark.parametrize(
    ("change", "default", "named"),
    [
        (no_change, {}, None),
        (no_change, {"ratio": 0.5}, None),
        (no_change, {"method": "cdpruner", "ratio": 0.5}, None),
        (no_change, {"method": "random"}, None),  # removes nothing
        (no_change, {"method": "random", "ratio": 0.5}, "the default method 'random': it draws"),
        (no_change, {"method": "pixelprune"}, "the default method 'pixelprune': each image's pixels"),
        (no_change, {"method": "pixelprune+folder", "ratio": 0.5}, "the default method 'pixelprune': each"),
        (no_change, {"method": "mmtok", "ratio": 0.5}, "the default method 'mmtok': it chooses"),
        (eager, {}, "--enforce-eager"),
        (without_graphs, {}, "cudagraph_mode NONE"),
        (on_two_gpus, {}, "--tensor-parallel-size"),
        (with_vllms_worker, {}, "worker_cls vllm.v1.worker.gpu_worker.Worker: foldserve's"),
        (in_two_stages, {}, "--pipeline-parallel-size"),
    ],
)
def test_graphs_of_the_tower_on_a_gpu(
    tiny_llava: Path, change: Callable[[VllmConfig], None], default: dict[str, object], named: str | None
) -> None:
    config = on_a_gpu(tiny_llava)
    config.additional_config = {CONFIG_KEY: {"tower_graphs": True, "default_reduction": default}}
    change(config)
    with (
        nullcontext() if named is None else pytest.raises(ValueError, match=f"--tower-graphs does not go with.*{named}")
    ):
        check_graphs(config)
    config.additional_config = {CONFIG_KEY: {"default_reduction": default}}
    check_graphs(config)


def test_graphs_of_the_tower_without_images(tiny_llava: Path) -> None:
    config = on_a_gpu(tiny_llava, limit_mm_per_prompt={"image": 0})
    config.additional_config = {CONFIG_KEY: {"tower_graphs": True}}
    with pytest.raises(ValueError, match="--limit-mm-per-prompt of no images"):
        check_graphs(config)


def test_graphs_of_another_familys_tower(tmp_path: Path) -> None:
    config = on_a_gpu(qwen_checkpoint.write(tmp_path / "qwen2_5_vl", "qwen2_5_vl"))
    config.additional_config = {CONFIG_KEY: {"tower_graphs": True}}
    able = {name for name, entry in FAMILY_CLASSES.items() if entry.load_family().is_capturable}
    assert able == {"LlavaForConditionalGeneration"}
    with pytest.raises(ValueError, match="a model of Qwen2_5_VLForConditionalGeneration: the graphs are made for"):
        check_graphs(config)


def on_a_gpu(model: Path, **options: Any) -> VllmConfig:
    """A configuration as far as `check_graphs` looks at it."""
    config = EngineArgs(str(model), worker_cls=WORKERS["cpu"], **options).create_engine_config()
    config.device_config.device_type = "cuda"
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    return config


def test_positions_beyond_the_models(tiny_llava: Path) -> None:
    """Fifteen images of ten tokens fit into the context, and their positions not into those of the model."""
    llm = start_engine(tiny_llava, max_model_len=512, limit_mm_per_prompt={"image": 40})
    trained = llm.model_config.hf_text_config.max_position_embeddings

    def prompt(images: int, positions: str) -> Case:
        reduction = {"keep_tokens": 10, "positions": positions}
        return Case("<image> " * images, [photo(i, 64, 64) for i in range(images)], [reduction] * images)

    fitting, beyond = prompt(3, "keep"), prompt(trained // 144 + 1, "keep")
    before = greedy(llm, [fitting])
    for _ in range(2):
        with pytest.raises(InvalidReduction, match=f"of the model's {trained} positions"):
            greedy(llm, [beyond])
    assert greedy(llm, [prompt(trained // 144 + 1, "renumber")])
    assert greedy(llm, [fitting]) == before
