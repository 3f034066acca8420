"""LLaVA-OneVision: mosaics that shrink, videos, squares of tiles, against vLLM's own and plain PyTorch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import isqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import EngineArgs, ModelRegistry
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from foldserve.reducers.item import plan_item
from foldserve.reducers.plan import InvalidReduction, Reduction
from foldserve.server.engine import withdrawal
from foldserve.server.engine.families.llava_next import grid_geometry
from foldserve.server.engine.families.llava_onevision import FoldLlavaOnevisionProcessingInfo, LlavaOnevisionFamily
from tests import onevision_checkpoint
from tests.engine.conftest import MAX_TOKENS, Case, MediaCase, greedy, remembered, start_engine
from tests.engine.keeping_reference import Answer
from tests.engine.maps import engine_maps, members
from tests.engine.method_table import assert_documented
from tests.engine.onevision_reference import KeepingOnevisionReference, OnevisionReference, Video
from tests.engine.watch import forget, watch
from tests.images import photo

K = 2
SIZES = ((200, 130), (100, 380), (126, 126), (500, 370), (60, 60), (700, 260))
"""(width, height): two of the mosaics shrink."""

CUT: dict[str, Any] = {
    "max_model_len": 1024,
    "max_num_batched_tokens": 900,
    "limit_mm_per_prompt": {"image": 4, "video": 2},
}
"""Steps have room for one of the largest images, so that others are cut."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onevision_checkpoint.write(tmp_path_factory.mktemp("checkpoints") / "tiny-onevision")


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> OnevisionReference:
    return OnevisionReference(checkpoint, K)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[Any]:
    """With a withdrawal layer; prefix caching is on, as by default."""
    yield start_engine(checkpoint, **CUT, **withdrawal.configure(K, device="cpu"))


@pytest.fixture(scope="module")
def expect(reference: OnevisionReference) -> Callable[[Case], Answer]:
    return remembered(reference)


def ask(*parts: str) -> str:
    return f"<|im_start|>user {''.join(parts)}<|im_end|><|im_start|>assistant\n"


def one_image(width: int, height: int, **reduction: object) -> Case:
    return MediaCase(ask("<image>\nwhat is it?"), [photo(width * height, width, height)], [reduction])


def one_video(frames: int, **reduction: object) -> Case:
    return MediaCase(ask("<video>\nwhat happens?"), [video(frames)], [reduction])  # type: ignore[list-item]


def video(frames: int) -> Video:
    return np.stack([np.asarray(photo(100 * frames + i, 140, 90)) for i in range(frames)])


def both(image: dict[str, object], film: dict[str, object]) -> Case:
    items: list[Any] = [photo(1, 200, 130), video(2)]
    return MediaCase(ask("<image>\nand <video>\n?"), items, [image, film])


def two_images(first: dict[str, object], second: dict[str, object]) -> Case:
    return MediaCase(ask("<image>\nand <image>\n?"), [photo(1, 200, 130), photo(2, 100, 380)], [first, second])


ILLAVA: dict[str, Any] = {"method": "illava", "layers": [1, 2]}
"""Of 81 tokens of a tile: 64, 49, 36 or 25 stay."""

PLAIN = [*(one_image(*size) for size in SIZES), one_video(3), one_video(2), both({}, {}), two_images({}, {})]

BEFORE_THE_DECODER = [
    *(one_image(*size, ratio=ratio) for size, ratio in zip(SIZES, (0.5, 0.77, 0.25, 0.77, 0.5, 0.25), strict=True)),
    one_image(*SIZES[3], method="random", ratio=0.9),
    one_image(*SIZES[0], method="divprune", ratio=0.6),
    one_image(*SIZES[1], keep_tokens=60),
    one_image(*SIZES[3], method="base_only"),
    one_image(*SIZES[1], method="base_only+folder", ratio=0.6),
    one_video(3, ratio=0.5),
    one_video(2, ratio=0.77),
    one_video(2, method="random", ratio=0.25),
    one_video(3, method="evs", ratio=0.5),
    one_video(3, method="vidcom2", ratio=0.77),
    one_video(1, method="vidcom2", ratio=0.5),
    one_video(2, method="evs", keep_tokens=40),  # the newline is one
    both({"ratio": 0.5}, {"method": "vidcom2", "ratio": 0.5}),
    both({"ratio": 0.5}, {"ratio": 0.25}),
    both({}, {"ratio": 0.6}),
    two_images({"ratio": 0.77}, {}),
    two_images({"method": "base_only"}, {"ratio": 0.5}),
]
IN_SQUARES = [
    *(one_image(*size, **ILLAVA, ratio=ratio) for size, ratio in zip(SIZES, (0.21, 0.4, 0.56) * 2, strict=True)),
    one_image(*SIZES[3], method="downsample", ratio=0.5),
    one_image(*SIZES[0], method="downsample", ratio=0.25),
    one_video(3, **ILLAVA, ratio=0.4),
    one_video(2, method="downsample", ratio=0.3),
    two_images({**ILLAVA, "ratio": 0.4}, {"method": "downsample", "ratio": 0.6}),
    both({"ratio": 0.5}, {**ILLAVA, "ratio": 0.56}),
]
IN_THE_DECODER = [
    one_image(*SIZES[0], withdraw=True),
    one_image(*SIZES[3], ratio=0.5, withdraw=True),
    one_video(3, ratio=0.5, withdraw=True),
    both({"withdraw": True}, {"ratio": 0.5}),
    one_image(*SIZES[1], method="fastv", ratio=0.5),
    one_image(*SIZES[4], method="base_only+folder+fastv", ratio=0.5, decoder_ratio=0.3),
    one_video(2, method="fastv", ratio=0.5),
    one_image(*SIZES[0], **ILLAVA, ratio=0.4, decoder=True),
    one_video(3, **ILLAVA, ratio=0.21, decoder=True),
]
KEPT = [
    *(one_image(*size, ratio=0.6, positions="keep") for size in SIZES),
    one_image(*SIZES[0], method="base_only", positions="keep"),
    one_video(3, ratio=0.5, positions="keep"),
    one_video(3, method="evs", ratio=0.6, positions="keep"),
    both({}, {"method": "vidcom2", "ratio": 0.6, "positions": "keep"}),
    one_image(*SIZES[1], ratio=0.5, positions="keep", withdraw=True),
    both({"ratio": 0.3}, {"ratio": 0.6, "positions": "keep"}),
]


def assert_same(llm: Any, expect: Callable[[Case], Answer], cases: Sequence[Case]) -> None:
    for case, (tokens, logprobs) in zip(cases, greedy(llm, cases), strict=True):
        want, expected = expect(case)
        assert tokens == want, (case.prompt, case.reductions)
        assert logprobs == pytest.approx(expected, abs=2e-5)


def test_all_in_one_batch_and_again_from_the_cache(llm: Any, expect: Callable[[Case], Answer]) -> None:
    cases = BEFORE_THE_DECODER + IN_SQUARES + IN_THE_DECODER + PLAIN
    for _ in range(2):
        assert_same(llm, expect, cases)


def test_kept_positions_are_those_of_the_whole_image(llm: Any, checkpoint: Path) -> None:
    keeping = KeepingOnevisionReference(checkpoint, K)
    assert_same(llm, lambda case: keeping.generate(case.prompt, case.images, case.reductions, MAX_TOKENS), KEPT)


def test_videos_of_different_lengths_in_one_step(
    llm: Any, expect: Callable[[Case], Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's model gives these a dimension more, which its runner takes for a mistake of the model's."""
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    stock: list[torch.Size] = []
    process = LlavaOnevisionForConditionalGeneration._process_video_pixels

    def seen(self: Any, inputs: Any) -> Any:
        found = process(self, inputs)
        stock.extend(video.shape for video in found)
        return found

    monkeypatch.setattr(LlavaOnevisionForConditionalGeneration, "_process_video_pixels", seen)
    forget(llm)
    assert_same(llm, expect, [one_video(3), one_video(2)])
    width = model.config.text_config.hidden_size
    assert stock == [(1, 3 * 25 + 1, width), (1, 2 * 25 + 1, width)]


def test_ratio_0_is_vllms_own_bit_for_bit(checkpoint: Path, expect: Callable[[Case], Answer]) -> None:
    """One request at a time: vLLM's own engine ends with videos of different lengths in one step.

    On the same engine then reduced images and videos in chunks, some of them preempted.
    """
    stock_class = "StockLlavaOnevisionForConditionalGeneration"
    module = "vllm.model_executor.models.llava_onevision:LlavaOnevisionForConditionalGeneration"
    ModelRegistry.register_model(stock_class, module)
    cases = [replace(case, reductions=()) for case in PLAIN]
    small = {"long_prefill_token_threshold": 100, "num_gpu_blocks_override": 40}
    stock = start_engine(checkpoint, hf_overrides={"architectures": [stock_class]}, worker_cls="auto", **CUT, **small)
    expected = [greedy(stock, [case]) for case in cases]
    del stock
    ours = start_engine(checkpoint, **CUT, **small)
    assert [greedy(ours, [case]) for case in cases] == expected
    forget(ours)
    assert [greedy(ours, [case]) for case in PLAIN] == expected
    with watch(ours) as seen:
        assert_same(ours, expect, BEFORE_THE_DECODER)
    assert seen.preempted


def published() -> tuple[LlavaOnevisionFamily, FoldLlavaOnevisionProcessingInfo]:
    """`llava-hf/llava-onevision-qwen2-7b-ov-hf`, as far as counts go."""
    config = onevision_checkpoint.config(side=384, layers=26)
    family = LlavaOnevisionFamily.of(SimpleNamespace(hf_config=config))
    assert isinstance(family, LlavaOnevisionFamily)
    context: Any = SimpleNamespace(get_hf_config=lambda *_: config, model_config=SimpleNamespace(hf_config=config))
    return family, FoldLlavaOnevisionProcessingInfo(context)


def test_items_have_as_many_tokens_as_vllm_says() -> None:
    """5,000 images and every video of up to 64 frames; none has more than the largest, which vLLM's own is not."""
    (family, info), rng = published(), random.Random(0)
    largest = family.largest
    for _ in range(5000):
        height = rng.randint(20, 4000)
        width = max(1, round(height * 10 ** rng.uniform(-1.5, 1.5)))
        layout = family.layout((height, width))
        assert layout.tokens == info.get_num_image_tokens(image_width=width, image_height=height) <= largest.tokens
        assert family.read_plan(plan_item(Reduction(), layout).to_ints()) == plan_item(Reduction(), layout)
    for frames in range(1, 65):
        tokens = info.get_num_video_tokens(image_width=1, image_height=1, num_frames=frames)
        assert family.layout((frames, 0)).tokens == tokens == 196 * frames + 1
    size = info.get_image_size_with_most_features()
    assert family.layout((size.height, size.width)) == largest and largest.tokens == 8765
    stock = LlavaOnevisionProcessingInfo.get_image_size_with_most_features(info)
    assert family.layout((stock.height, stock.width)).tokens == 8748


def test_published_sizes_without_a_device(checkpoint: Path) -> None:
    """All that is packed has the planned length, and no value is read, on the meta device."""
    family, _ = published()
    model = Published()
    asked: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((1080, 1920), {"ratio": 0.66}),
        ((1080, 1920), {"method": "base_only"}),
        ((384, 384), {"ratio": 0.5, "positions": "keep"}),
        ((2304, 2304), {"method": "random", "keep_tokens": 900}),
        ((300, 2000), {"method": "base_only+folder", "ratio": 0.9}),
    ]
    plans = [plan_item(Reduction.parse(reduction), family.layout(shape)) for shape, reduction in asked]
    pixels = [torch.empty(37, 3, 384, 384, device="meta") for _ in plans]
    for left, plan in zip(family.encode(model, {"pixel_values": pixels}, plans), plans, strict=True):
        assert left.features.shape == (plan.kept, 896) and left.source.shape == (plan.kept,)
    films = [plan_item(Reduction(ratio=ratio), family.layout((frames, 0))) for frames, ratio in ((32, 0.5), (8, 0.9))]
    frames = [torch.empty(plan.layout.shape[0], 3, 384, 384, device="meta") for plan in films]
    for left, plan in zip(family.encode(model, {"pixel_values_videos": frames}, films), films, strict=True):
        assert left.features.shape == (plan.kept, 896)
    assert [plan.kept for plan in films] == [32 * 98 + 1, 8 * 20 + 1]


class Published:
    """What the family asks of the published model, without values."""

    vision_tower = None
    image_newline = torch.empty(896, device="meta")
    multi_modal_projector = staticmethod(torch.nn.Linear(1152, 896, device="meta"))

    def _image_pixels_to_features(self, tower: None, tiles: torch.Tensor) -> torch.Tensor:
        return torch.empty(len(tiles), 729, 1152, device="meta")

    def _parse_and_validate_image_input(self, **inputs: Any) -> dict[str, Any]:
        return inputs

    _parse_and_validate_video_input = _parse_and_validate_image_input


REFUSED: list[tuple[Case, str, str]] = [
    (one_image(*SIZES[0], method="tome", ratio=0.5), "method", "leaves no grid of tokens in a tile"),
    (one_image(*SIZES[0], method="turbo", ratio=0.5), "method", "leaves no grid of tokens in a tile"),
    (one_image(*SIZES[0], **ILLAVA, ratio=0.5), "ratio", "41 is not a perfect square"),
    (one_image(*SIZES[0], **ILLAVA, ratio=0.4, positions="keep"), "positions", "laid out anew"),
    (one_image(*SIZES[0], ratio=0.99), "ratio", "the base tile: ratio 0.99 would"),
    (one_video(3, ratio=0.97), "ratio", "would remove 24 of 25"),
    (one_video(3, method="evs", ratio=0.7), "ratio", "the first frame of a video, 25 of 75 tokens"),
    (one_image(*SIZES[0], method="evs", ratio=0.5), "method", "is for videos"),
    (one_video(3, method="base_only"), "method", "videos have no base tile"),
    (both({"ratio": 0.5}, {"method": "stf", "ratio": 0.5}), "method", "projector"),
]


@pytest.mark.parametrize(("case", "param", "told"), REFUSED, ids=[str(case.reductions[-1]) for case, _, _ in REFUSED])
def test_refused(llm: Any, case: Case, param: str, told: str) -> None:
    with pytest.raises(InvalidReduction, match=told) as caught:
        llm.generate([case.to_vllm()], use_tqdm=False)
    assert caught.value.param == param


def test_frames_that_are_chosen_while_they_are_processed(llm: Any) -> None:
    prompt = one_video(3, ratio=0.5).to_vllm()
    prompt["mm_processor_kwargs"]["num_frames"] = 2
    with pytest.raises(InvalidReduction, match="choose them before"):
        llm.generate([prompt], use_tqdm=False)


def test_images_travel_as_bytes_beside_a_video_too(checkpoint: Path) -> None:
    processor = MULTIMODAL_REGISTRY.create_processor(EngineArgs(str(checkpoint)).create_model_config())
    case = both({"ratio": 0.5}, {})
    items = processor.info.parse_mm_data(case.to_vllm()["multi_modal_data"])
    sent = processor(processor.info.get_tokenizer().encode(case.prompt), items)["mm_kwargs"]
    image, film = sent["image"][0], sent["video"][0]
    assert image is not None and image["pixel_values"].data.dtype == torch.uint8
    assert film is not None and film["pixel_values_videos"].data.is_floating_point()


def test_the_reference_tells_a_mosaic_laid_out_of_other_squares(
    llm: Any, expect: Callable[[Case], Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns for rows, as if tokens had another order."""
    laid_out = LlavaOnevisionFamily._laid_out

    def wrong(self: Any, tiles: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        side = isqrt(tiles.shape[1])
        return laid_out(self, tiles.view(len(tiles), side, side, -1).transpose(1, 2).flatten(1, 2), shape)

    monkeypatch.setattr(LlavaOnevisionFamily, "_laid_out", wrong)
    forget(llm)
    case = IN_SQUARES[0]
    ((tokens, logprobs),) = greedy(llm, [case])
    want, expected = expect(case)
    assert tokens != want or logprobs != pytest.approx(expected, abs=1e-3)
    forget(llm)


def test_videos_lose_tokens_in_the_layers_of_illavas_authors() -> None:
    family = LlavaOnevisionFamily([[384, 384]], 384, grid_geometry(27, 27))
    asked = Reduction.parse({"method": "illava", "ratio": 368 / 729})
    assert dict(family.of_video(asked).options) == {"layers": (3, 4, 5, 6)}
    named = Reduction.parse({"method": "illava", "ratio": 0.5, "layers": [5, 6, 7, 8]})
    assert family.of_video(named) == named
    folder = Reduction.parse({"ratio": 0.5})
    assert family.of_video(folder) == folder


def test_the_map_shows_a_mosaic_that_shrinks_and_each_frame(llm: Any, reference: OnevisionReference) -> None:
    ((base, mosaic),) = engine_maps(llm, "<image>", [photo(3, *SIZES[3])], [{"ratio": 0.5}])
    assert (base.region.name, mosaic.region.name) == ("base", "mosaic")
    assert sum(len(group) for group in members(mosaic)) == mosaic.region.rows * mosaic.region.columns
    (frames,) = engine_maps(llm, "<video>", [video(3)], [{"ratio": 0.5}], "video")
    assert [found.region.name for found in frames] == ["frame 1", "frame 2", "frame 3"]
    assert all(found.region.rows * found.region.columns == len(found.group) for found in frames)
    assert members(frames[0]) != members(frames[2])


def test_the_map_of_what_acts_in_the_tower_shows_a_frame_before_it_is_pooled(llm: Any) -> None:
    vision = llm.llm_engine.vllm_config.model_config.hf_config.vision_config
    side = vision.image_size // vision.patch_size
    (frames,) = engine_maps(llm, "<video>", [video(2)], [ILLAVA | {"ratio": 0.4}], "video", counted=False)
    assert [(found.region.rows, found.region.columns, len(found.sizes)) for found in frames] == [(side, side, 49)] * 2


def test_the_page_says_which_methods_work(llm: Any) -> None:
    assert_documented("OneVision", llm)
