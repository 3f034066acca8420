"""LLaVA-NeXT: tiles, newlines and counts that depend on the image's size, against vLLM's own and plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, LlavaNextConfig
from vllm import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY

from foldserve.reducers.item import Layout, Part, plan_item
from foldserve.reducers.plan import InvalidReduction, Reduction
from foldserve.server.engine import withdrawal
from foldserve.server.engine.families.llava_next import LlavaNextFamily
from foldserve.server.engine.families.registry import family_of
from tests import next_checkpoint
from tests.engine.conftest import MAX_TOKENS, Case, by_uuid_alone, greedy, start_engine
from tests.engine.maps import engine_maps, members
from tests.engine.method_table import assert_documented
from tests.engine.next_reference import KeepingNextReference, NextReference
from tests.engine.qwen_reference import folder_groups
from tests.engine.watch import forget
from tests.images import photo

K = 2
SIZES = ((300, 200), (120, 480), (168, 168), (640, 130), (60, 60), (333, 337), (700, 560))
"""(width, height): each canvas is the best one of some."""

sides = st.integers(1, 3000)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_llava: Path) -> Path:
    return next_checkpoint.write(tmp_path_factory.mktemp("checkpoints") / "tiny-next", tiny_llava)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> NextReference:
    return NextReference(checkpoint, K)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[Any]:
    """Chunks cut every image; prefix caching is on, as by default."""
    yield start_engine(
        checkpoint, max_model_len=2048, max_num_batched_tokens=250, **withdrawal.configure(K, device="cpu")
    )


def published() -> LlavaNextConfig:
    """`llava-hf/llava-v1.6-vicuna-7b-hf`, as far as counts go."""
    canvases = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    vision = CLIPVisionConfig(image_size=336, patch_size=14, num_hidden_layers=24)
    return LlavaNextConfig(
        vision_config=vision, image_grid_pinpoints=canvases, architectures=["LlavaNextForConditionalGeneration"]
    )


@pytest.fixture(scope="module")
def info() -> Any:
    from vllm.model_executor.models.llava_next import LlavaNextProcessingInfo

    class Context:
        config = published()

        def get_hf_config(self, *_: Any) -> LlavaNextConfig:
            return self.config

    return LlavaNextProcessingInfo(Context())


def published_family(info: Any) -> LlavaNextFamily:
    model_config: Any = SimpleNamespace(hf_config=info.get_hf_config())
    family = LlavaNextFamily.of(model_config)
    assert family is not None
    return family


@given(sides, sides)
def test_an_image_has_as_many_tokens_as_vllm_says(info: Any, width: int, height: int) -> None:
    family = published_family(info)
    layout = family.layout((height, width))
    assert family.base((height, width)) == Layout(
        (Part(layout.parts[0].geometry, separators=1),), (height, width), family
    )
    assert layout.tokens == info.get_num_image_tokens(image_width=width, image_height=height) <= family.largest.tokens
    assert family.read_plan(plan_item(Reduction(), layout).to_ints()) == plan_item(Reduction(), layout)


def test_the_largest_image(info: Any) -> None:
    size = info.get_image_size_with_most_features()
    family = published_family(info)
    assert family.sizes_matter
    assert family.largest == family.layout((size.height, size.width))
    assert family.largest.tokens == 576 + 48 * 48 + 48


def one_image(width: int, height: int, **reduction: object) -> Case:
    seed = width * height
    return Case("USER: <image>\nWhat is in the picture? ASSISTANT:", [photo(seed, width, height)], [reduction])


def assert_same(llm: Any, reference: NextReference, cases: list[Case]) -> None:
    for case, (tokens, logprobs) in zip(cases, greedy(llm, cases), strict=True):
        want, expected = reference.generate(case.prompt, case.images, case.reductions, MAX_TOKENS)
        assert tokens == want, (case.images[0].size, case.reductions)
        assert logprobs == pytest.approx(expected, abs=1e-4)


def test_nothing_removed_equals_plain_pytorch(llm: Any, reference: NextReference) -> None:
    assert_same(llm, reference, [one_image(*size) for size in SIZES])


def test_sizes_ratios_and_methods_in_one_batch(llm: Any, reference: NextReference) -> None:
    """Twice: the second time from the caches."""
    ratios = (0.5, 0.77, 0.25, 0.9, 0.5, 0.66, 0.3)
    cases = [one_image(*size, ratio=ratio) for size, ratio in zip(SIZES, ratios, strict=True)]
    cases += [
        one_image(300, 200),
        one_image(300, 200, keep_tokens=100),
        one_image(333, 337, method="random", ratio=0.6),
        one_image(333, 337, method="divprune", ratio=0.6, rest="merge"),
        one_image(333, 337, method="mmtok", ratio=0.6, query="What is the color of the car on the left?"),
        one_image(120, 480, ratio=0.5, withdraw=True),
        one_image(640, 130, withdraw=True),
        one_image(60, 60, method="folder+fastv", ratio=0.5),
        Case(
            "USER: <image> and <image>\nDiffer how? ASSISTANT:",
            [photo(1, 640, 130), photo(2, 333, 337)],
            [{"method": "random", "ratio": 0.3}, {"ratio": 0.66, "withdraw": True}],
        ),
    ]
    for _ in range(2):
        assert_same(llm, reference, cases)


def test_base_tiles_and_squares_beside_others(llm: Any, reference: NextReference) -> None:
    """Of 144 tokens of a tile 121, 100, 64 or 49 stay."""
    illava: dict[str, Any] = {"method": "illava", "layers": [0, 2]}
    amounts = zip(SIZES, (0.16, 0.31, 0.56, 0.66, 0.31, 0.56, 0.31), strict=True)
    cases = [one_image(*size, **illava, ratio=ratio) for size, ratio in amounts]
    cases += [one_image(*size, method="base_only") for size in SIZES[:2]]
    cases += [
        one_image(640, 130, method="base_only+folder", ratio=0.5),
        one_image(333, 337, method="base_only+random", keep_tokens=40),
        one_image(60, 60, method="base_only+folder+fastv", ratio=0.5, decoder_ratio=0.3),
        one_image(700, 560, method="base_only", withdraw=True),
        one_image(300, 200, method="downsample", ratio=0.5),
        one_image(120, 480, method="downsample", ratio=0.75, withdraw=True),
        one_image(60, 60, **illava, ratio=0.56, decoder=True),
        one_image(300, 200, ratio=0.5),
        one_image(300, 200),
        Case(
            "USER: <image> and <image>\nDiffer how? ASSISTANT:",
            [photo(1, 640, 130), photo(2, 333, 337)],
            [{**illava, "ratio": 0.31}, {"method": "base_only"}],
        ),
    ]
    for _ in range(2):
        assert_same(llm, reference, cases)


def test_the_tower_sees_the_base_tile_alone(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside an image that is whole."""
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    tower = Mock(side_effect=model._image_pixels_to_features)
    monkeypatch.setattr(model, "_image_pixels_to_features", tower)
    forget(llm)
    greedy(llm, [one_image(700, 560, method="base_only"), one_image(333, 337)], 1)
    assert sum(len(call.args[1]) for call in tower.call_args_list) == 1 + (1 + 4)


def test_kept_positions_are_those_of_the_whole_image(llm: Any, checkpoint: Path) -> None:
    """Newlines have theirs, and so does text between and after the images."""
    cases = [one_image(*size, ratio=0.6, positions="keep") for size in SIZES]
    cases += [
        one_image(640, 130, ratio=0.5, positions="keep", withdraw=True),
        one_image(120, 480, method="base_only", positions="keep"),
        one_image(300, 200, method="base_only+folder", ratio=0.5, positions="keep"),
        Case(
            "USER: <image> and <image>\nDiffer how? ASSISTANT:",
            [photo(1, 640, 130), photo(2, 333, 337)],
            [{"method": "random", "ratio": 0.3, "positions": "keep"}, {"ratio": 0.66}],
        ),
    ]
    assert_same(llm, KeepingNextReference(checkpoint, K), cases)


def test_ratio_0_is_vllms_own_bit_for_bit(checkpoint: Path) -> None:
    """Without K; unreduced images beside a reduced one are the same to the tower only."""
    from vllm import ModelRegistry

    stock_class = "StockLlavaNextForConditionalGeneration"
    ModelRegistry.register_model(stock_class, "vllm.model_executor.models.llava_next:LlavaNextForConditionalGeneration")
    options: dict[str, Any] = {"max_model_len": 2048, "enable_prefix_caching": False}
    stock = start_engine(checkpoint, hf_overrides={"architectures": [stock_class]}, worker_cls="auto", **options)
    plain = [replace(one_image(*size), reductions=()) for size in SIZES]
    expected = greedy(stock, plain)
    ours = start_engine(checkpoint, **options)
    assert greedy(ours, plain) == expected
    assert greedy(ours, [one_image(*size) for size in SIZES]) == expected


def test_blocks_fall_by_the_plan(llm: Any, reference: NextReference) -> None:
    case = one_image(700, 560, ratio=0.5)
    (plan,) = reference.plans(case.images, case.reductions)
    (output,) = llm.generate([case.to_vllm()], use_tqdm=False)
    text = len(llm.get_tokenizer()(case.prompt.replace("<image>", ""))["input_ids"])
    assert len(output.prompt_token_ids) == text + plan.kept
    assert plan.kept == sum(
        p.count * (p.geometry.tokens - p.geometry.tokens // 2) + p.separators for p in plan.layout.parts
    )


def test_an_image_that_is_known_may_come_as_its_uuid_alone(llm: Any) -> None:
    """Its size is remembered, which its plan is made of."""
    case = one_image(300, 200, ratio=0.5)
    first, second = by_uuid_alone(llm, case)
    assert second.prompt_token_ids == first.prompt_token_ids
    assert second.outputs[0].token_ids == first.outputs[0].token_ids
    unknown = case.to_vllm() | {"multi_modal_uuids": {"image": ["another"]}, "multi_modal_data": {"image": [None]}}
    with pytest.raises(InvalidReduction, match="send the image with its uuid"):
        llm.generate([unknown], use_tqdm=False)


def test_an_evaluation_counts_each_image(checkpoint: Path, reference: NextReference) -> None:
    from foldserve.server.quality.engine.offline import AnsweringModel

    images = [photo(1, *size) for size in SIZES]
    found = AnsweringModel(str(checkpoint)).layouts(images)
    assert [(it.tokens, it.shape) for it in found] == [(it.tokens, it.shape) for it in map(reference.layout, images)]


@pytest.mark.parametrize(
    ("reduction", "param"),
    [
        ({"method": "folder_cls", "ratio": 0.5}, "method"),
        ({"method": "tome", "ratio": 0.5}, "method"),
        ({"method": "illava", "ratio": 0.5, "layers": [0]}, "ratio"),  # 72 are no square
        ({"method": "downsample", "ratio": 0.5, "positions": "keep"}, "positions"),
        ({"keep_tokens": 10}, "keep_tokens"),
    ],
    ids=str,
)
def test_refused(llm: Any, reduction: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidReduction) as caught:
        llm.generate([one_image(300, 200, **reduction).to_vllm()], use_tqdm=False)
    assert caught.value.param == param


def test_a_ratio_that_one_part_can_not_take_names_the_image_and_the_part(llm: Any) -> None:
    """A strip's mosaic has 2 rows of 36 tokens, half of its base tile's 144."""
    cases = one_image(300, 200), one_image(1200, 44)
    prompt = "USER: <image> and <image>\nDiffer how? ASSISTANT:"
    case = Case(prompt, [each.images[0] for each in cases], [{"ratio": 0.99}] * 2)
    with pytest.raises(InvalidReduction, match=r"image 2 of 2: the mosaic of tiles: ratio 0.99 would") as caught:
        llm.generate([case.to_vllm()], use_tqdm=False)
    assert caught.value.param == "ratio"


def test_pixels_travel_as_bytes(checkpoint: Path) -> None:
    assert sent_pixels(EngineArgs(str(checkpoint)).create_model_config()).dtype == torch.uint8


def sent_pixels(config: Any) -> torch.Tensor:
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    items = processor.info.parse_mm_data({"image": photo(1, 300, 200)})
    sent = processor(processor.info.get_tokenizer().encode("<image>"), items)["mm_kwargs"]["image"][0]
    assert sent is not None
    pixels: torch.Tensor = sent["pixel_values"].data
    return pixels


def test_a_variant_that_is_not_reduced_gets_pixels_as_vllm_sends_them(checkpoint: Path) -> None:
    """Nobody would make floats of bytes there."""
    config = EngineArgs(str(checkpoint), hf_overrides={"vision_feature_select_strategy": "full"}).create_model_config()
    assert family_of(config) is None
    assert sent_pixels(config).is_floating_point()


def test_newlines_stay_at_the_ends_of_rows() -> None:
    from foldserve.server.engine.families.llava_next import end_rows
    from foldserve.server.engine.vision import KeptTokens

    left = KeptTokens(
        torch.tensor([[5.0], [0.0], [2.0]]), torch.tensor([5, 0, 2])
    )  # of 3 rows of 2; the second is empty
    packed = end_rows(left, 3, 2, torch.tensor([-1.0]))
    assert packed.features.flatten().tolist() == [0, -1, 2, -1, 5, -1]
    assert packed.source.tolist() == [0, 2, 3, 5, 7, 8]


def test_the_map_shows_the_base_tile_and_the_mosaic(llm: Any, reference: NextReference) -> None:
    for size in SIZES[:3]:
        image = photo(7, *size)
        ((base, mosaic),) = engine_maps(llm, "<image>", [image], [{"ratio": 0.6}])
        (plan,) = reference.plans([image], [{"ratio": 0.6}])
        pixels = reference.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
        with torch.no_grad():
            tiles = reference.tiles(pixels, plan)
            grids = [tiles[0], reference.mosaic(tiles[1:], plan.layout.shape).flatten(0, 1)]
        for found, grid, grid_plan in zip((base, mosaic), grids, plan.grids, strict=True):
            groups = folder_groups(grid.numpy(), grid_plan.removed)
            assert members(found) == [sorted(own) for _, own in groups]
            assert list(found.source) == [first for first, _ in groups]
        assert (base.region.name, mosaic.region.name) == ("base", "mosaic")
        rows, columns = reference.mosaic_grid((image.height, image.width), 12)
        assert (mosaic.region.rows, mosaic.region.columns) == (rows, columns)
        assert mosaic.region.box == pytest.approx((0, 0, 1, 1), abs=1.2 / min(rows, columns))  # to a token


def test_the_map_of_what_acts_on_tiles_shows_each_and_drops_padding(llm: Any, reference: NextReference) -> None:
    asked: dict[str, object] = {"method": "illava", "ratio": 0.4375, "layers": [1]}
    for reduction in (asked, {"method": "downsample", "ratio": 0.5}):
        image = photo(8, 640, 130)
        ((base, *tiles),) = engine_maps(llm, "<image>", [image], [reduction])
        (plan,) = reference.plans([image], [reduction])
        assert plan.tile is not None
        pixels = reference.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
        each = [reference.tower.members(tile[None], plan.tile) for tile in pixels]
        side = round(plan.tile.kept**0.5)
        in_the_mosaic = [place for row in reference.places((130, 640), side) for place in row]
        assert members(base) == each[0]
        for i, (found, held) in enumerate(zip(tiles, each[1:], strict=True)):
            assert found.region.name == f"tile {i + 1}"
            assert members(found) == [own for token, own in enumerate(held) if (i, token) in in_the_mosaic]
        assert any(-1 in found.group for found in tiles)


def test_the_map_of_a_base_tile_alone_drops_the_mosaic(llm: Any) -> None:
    ((base, mosaic),) = engine_maps(llm, "<image>", [photo(9, 300, 200)], [{"method": "base_only"}])
    assert members(base) == [[i] for i in range(len(base.group))]
    assert members(mosaic) == [] and set(mosaic.group) == {-1}


def test_the_page_says_which_methods_work(llm: Any) -> None:
    assert_documented("NeXT", llm)
