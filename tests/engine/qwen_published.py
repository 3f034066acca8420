"""The Qwen-VL models that are published, as their config.json describes them, without weights: on the meta device.

`test_qwen.py` runs it, in a process of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from vllm import EngineArgs
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageProcessorItems
from vllm.utils.network_utils import get_open_port

from foldserve.reducers.item import Layout, plan_item
from foldserve.reducers.reduction import Reduction
from foldserve.server.engine import withdrawal
from foldserve.server.engine.families.registry import family_of
from foldserve.server.engine.family import Family
from foldserve.server.engine.kv_cost import kv_cost
from foldserve.server.engine.plugin import register
from tests import qwen_checkpoint


@dataclass(frozen=True)
class Published:
    """What config.json says, and what is known of the model beside it.

    Attributes:
        parameters: in billions, as the model's page shows them.
        row: columns of an image's token in the encoder cache.
        first_layer: the least withdrawal layer.
        kv_bytes: of a token.
    """

    model_type: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    parameters: float
    row: int
    first_layer: int
    kv_bytes: int


def _text(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        **more,
    }


def _tower_2_5(width: int, intermediate: int = 3420) -> dict[str, Any]:
    tower = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "patch_size": 14, "window_size": 112}
    more = {"fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2}
    return {**tower, "intermediate_size": intermediate, "out_hidden_size": width, **more}


def _tower_3(width: int, *, large: bool) -> dict[str, Any]:
    size: dict[str, Any] = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
    if large:
        size = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304}
    taps = [8, 16, 24] if large else [5, 11, 17]
    more = {"num_heads": 16, "patch_size": 16, "num_position_embeddings": 2304, "deepstack_visual_indexes": taps}
    return {**size, **more, "out_hidden_size": width}


_LARGER = {"vocab_size": 152064}
_TIED = {"tie_word_embeddings": True}
_ROPE_3 = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
_QWEN3 = {"head_dim": 128, "max_position_embeddings": 262144, "rope_parameters": _ROPE_3}
_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
_TOWER_2 = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}

MODELS = {  # experts first: vLLM makes the groups that they are split over with the first model of a process
    "Qwen3-VL-30B-A3B": Published(
        "qwen3_vl_moe",
        _text(2048, 48, 32, 4, 6144, **_QWEN3, **_EXPERTS),
        _tower_3(2048, large=True),
        31.07,
        4 * 2048,
        4,
        98304,
    ),
    "Qwen2-VL-2B": Published(
        "qwen2_vl", _text(1536, 28, 12, 2, 8960, **_TIED), _TOWER_2 | {"hidden_size": 1536}, 2.21, 1536, 1, 28672
    ),
    "Qwen2-VL-7B": Published(
        "qwen2_vl", _text(3584, 28, 28, 4, 18944, **_LARGER), _TOWER_2 | {"hidden_size": 3584}, 8.29, 3584, 1, 57344
    ),
    "Qwen2.5-VL-3B": Published(
        "qwen2_5_vl", _text(2048, 36, 16, 2, 11008, **_TIED), _tower_2_5(2048), 3.75, 2048, 1, 36864
    ),
    "Qwen2.5-VL-7B": Published(
        "qwen2_5_vl", _text(3584, 28, 28, 4, 18944, **_LARGER), _tower_2_5(3584), 8.29, 3584, 1, 57344
    ),
    "Qwen2.5-VL-72B": Published(
        "qwen2_5_vl", _text(8192, 80, 64, 8, 29568, **_LARGER), _tower_2_5(8192, 3456), 73.41, 8192, 1, 327680
    ),
    "Qwen3-VL-2B": Published(
        "qwen3_vl",
        _text(2048, 28, 16, 8, 6144, **_QWEN3, **_TIED),
        _tower_3(2048, large=False),
        2.13,
        4 * 2048,
        4,
        114688,
    ),
    "Qwen3-VL-4B": Published(
        "qwen3_vl",
        _text(2560, 36, 32, 8, 9728, **_QWEN3, **_TIED),
        _tower_3(2560, large=False),
        4.44,
        4 * 2560,
        4,
        147456,
    ),
    "Qwen3-VL-8B": Published(
        "qwen3_vl", _text(4096, 36, 32, 8, 12288, **_QWEN3), _tower_3(4096, large=True), 8.77, 4 * 4096, 4, 147456
    ),
    "Qwen3-VL-32B": Published(
        "qwen3_vl", _text(5120, 64, 64, 8, 25600, **_QWEN3), _tower_3(5120, large=True), 33.36, 4 * 5120, 4, 262144
    ),
}

COUNTS = {
    "qwen2": {(2048, 1365): (49, 73), (1280, 720): (26, 46), (28, 28): (2, 2), (9000, 6000): (104, 156)},
    "qwen3": {(2048, 1365): (43, 64), (1280, 720): (22, 40), (28, 28): (8, 8), (9000, 6000): (104, 156)},
}
"""(width, height) of an image -> rows and columns of its tokens. The first is the authors' own example, 14,308 patches
of Qwen2-VL; the last two are below and above the bounds of `preprocessor_config.json`."""


@pytest.fixture(scope="module", params=MODELS)
def known(request: pytest.FixtureRequest) -> Published:
    return MODELS[request.param]


@pytest.fixture(scope="module")
def config(known: Published, tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    register()
    path = tmp_path_factory.mktemp("published")
    pixels = (256 * 256, 4096 * 4096) if known.model_type.startswith("qwen3") else (56 * 56, 3584 * 3584)
    qwen_checkpoint.describe(path, known.model_type, known.text, known.vision, pixels)
    args = EngineArgs(
        str(path), dtype="bfloat16", max_model_len=32768, enforce_eager=True, limit_mm_per_prompt={"video": 0}
    )
    return args.create_engine_config()


@pytest.fixture(scope="module")
def family(config: VllmConfig) -> Family:
    found = family_of(config.model_config)
    assert found is not None
    return found


def layout(config: VllmConfig, family: Family, width: int, height: int) -> Layout:
    info = MULTIMODAL_REGISTRY.get_processing_info(config.model_config)
    return family.layout(family.shape(ImageProcessorItems([Image.new("RGB", (width, height))]), 0, info, {}))


def test_counts(known: Published, config: VllmConfig, family: Family) -> None:
    """Ours, vLLM's and the documented ones."""
    info: Any = MULTIMODAL_REGISTRY.get_processing_info(config.model_config)
    for (width, height), grid in COUNTS[known.model_type[:5]].items():
        found = layout(config, family, width, height)
        assert found.shape == (*grid, 1)
        processor = info.get_image_processor()
        of_vllm = info.get_num_image_tokens(
            image_width=width, image_height=height, image_processor=processor, mm_kwargs={}
        )
        assert found.tokens == of_vllm == grid[0] * grid[1]
    assert family.largest.tokens == info.get_max_image_tokens() == 128 * 128


def test_geometry(known: Published, config: VllmConfig, family: Family) -> None:
    geometry = family.largest.parts[0].geometry
    assert geometry.layers == known.vision["depth"]
    whole = tuple(known.vision.get("fullatt_block_indexes", range(geometry.layers)))
    assert geometry.reducing_layers == whole and geometry.layers - 1 in whole  # the last for what acts after it
    assert family.row_width(config.model_config) == known.row
    assert withdrawal.first_layer(config.model_config.hf_config) == known.first_layer
    assert kv_cost(config, None).sequence_bytes(1) == known.kv_bytes


def test_on_the_meta_device(known: Published, config: VllmConfig, family: Family) -> None:
    """As large as published, and reduced rows as many and as wide as planned."""
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        with torch.device("meta"):
            model: Any = initialize_model(vllm_config=config)
    parameters = sum(weight.numel() for weight in model.parameters())
    assert parameters / 1e9 == pytest.approx(known.parameters, abs=0.006)
    for layer in model.visual.modules():
        if isinstance(layer, LinearBase):
            layer.cpu_linear = F.linear  # which a CPU's layer gets with its weights
    model.can_keep_positions, model._tokens_at_once = True, 128 * 128
    found = layout(config, family, 1280, 720)
    rows, columns, _ = found.shape
    patches, token = 4 * rows * columns, 3 * 2 * known.vision["patch_size"] ** 2
    for method, positions, more in (("folder", "renumber", 0), ("tome", "keep", 3), ("illava", "keep", 3)):
        plan = plan_item(Reduction.parse({"method": method, "ratio": 0.5, "positions": positions}), found)
        image = {
            "pixel_values": torch.empty(patches, token, device="meta"),
            "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]]),
            "image_plan": torch.tensor([plan.to_ints()]),
        }
        with torch.inference_mode():
            (embeds,) = model.embed_multimodal(**image)
        assert embeds.shape == (plan.kept, known.row + more) == (rows * columns // 2, known.row + more)
