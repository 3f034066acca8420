"""Video-LLaVA, which vLLM does not have, and LLaVA-NeXT-Video: images, and videos frame by frame, against vLLM's own
model, transformers' and plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, LlavaNextVideoConfig, VideoLlavaConfig
from vllm import EngineArgs, ModelRegistry
from vllm.model_executor.models.llava_next_video import LlavaNextVideoPooler
from vllm.multimodal import MULTIMODAL_REGISTRY

from foldserve.reducers.geometry import VisionGeometry
from foldserve.reducers.item import plan_item
from foldserve.reducers.plan import InvalidReduction, Reduction
from foldserve.server.engine import withdrawal
from foldserve.server.engine.families import video_llava
from foldserve.server.engine.families.llava_next_video import (
    FoldLlavaNextVideoProcessingInfo,
    LlavaNextVideoFamily,
)
from foldserve.server.engine.families.video_llava import VideoLlavaFamily
from tests import video_checkpoint
from tests.engine.conftest import MAX_TOKENS, Case, MediaCase, greedy, remembered, start_engine
from tests.engine.keeping_reference import Answer
from tests.engine.maps import engine_maps, members
from tests.engine.method_table import assert_documented
from tests.engine.video_reference import (
    KeepingNextVideoReference,
    KeepingVideoReference,
    LlavaNextVideoReference,
    Video,
    VideoLlavaReference,
)
from tests.engine.watch import forget, watch
from tests.images import photo

K = 2
CUT: dict[str, Any] = {
    "max_model_len": 1024,
    "max_num_batched_tokens": 800,
    "limit_mm_per_prompt": {"image": 4, "video": 3},
}
SMALL = {"long_prefill_token_threshold": 90, "num_gpu_blocks_override": 33}
"""Chunks cut every image and video, and the pool has room for a few of the prompts."""


def video(frames: int, seed: int = 0) -> Video:
    return np.stack([np.asarray(photo(1000 * seed + 100 * frames + i, 90, 70)) for i in range(frames)])


def ask(*items: Any, reductions: Sequence[dict[str, object]] = ()) -> MediaCase:
    marks = " and ".join("<video>" if isinstance(item, np.ndarray) else "<image>" for item in items)
    return MediaCase(f"USER: {marks}\nwhat is it? ASSISTANT:", items, reductions)


def one_image(seed: int, **reduction: object) -> MediaCase:
    return ask(photo(seed, 80, 60 + seed), reductions=[reduction])


def one_video(frames: int, **reduction: object) -> MediaCase:
    return ask(video(frames), reductions=[reduction])


def several(*reductions: dict[str, object]) -> MediaCase:
    """An image, a video of two frames, another image, and a video of one."""
    return ask(photo(1, 80, 60), video(2), photo(2, 60, 90), video(1), reductions=reductions)


VIDEOS = [
    *(one_video(frames) for frames in (1, 2, 4)),
    *(one_video(frames, ratio=ratio) for frames, ratio in ((1, 0.5), (4, 0.77), (2, 0.25), (3, 0.5))),
    one_video(3, method="random", ratio=0.6),
    one_video(3, method="divprune", ratio=0.6, rest="merge"),
    one_video(4, method="pool", ratio=0.75),
    one_video(3, keep_tokens=40),
    one_video(3, method="evs", ratio=0.5),
    one_video(4, method="vidcom2", ratio=0.7),
    one_video(1, method="vidcom2", ratio=0.5),
    one_video(5, ratio=0.66),  # more frames than are profiled
]
IN_THE_DECODER = [
    one_video(2, withdraw=True),
    one_video(4, ratio=0.5, withdraw=True),
    one_video(2, method="fastv", ratio=0.5),
    one_video(3, method="folder+fastv", ratio=0.5, decoder_ratio=0.5),
    one_video(2, method="illava_decoder", ratio=0.4),
]
KEPT: list[Case] = [
    one_video(1, ratio=0.5, positions="keep"),
    one_video(3, ratio=0.6, positions="keep"),
    one_video(2, method="random", ratio=0.3, positions="keep"),
    one_video(3, method="vidcom2", ratio=0.6, positions="keep"),
    one_video(2, ratio=0.5, positions="keep", withdraw=True),
]
IMAGES = [
    one_image(1),
    *(one_image(i, ratio=ratio) for i, ratio in ((2, 0.5), (3, 0.77), (4, 0.25))),
    one_image(5, method="random", ratio=0.5),
    one_image(6, method="folder_cls", ratio=0.5),
    one_image(7, method="tome", ratio=0.4),
    one_image(8, method="downsample", ratio=0.5),
    one_image(11, method="visionzip", ratio=0.6),
    several({}, {}, {}, {}),
    several({"ratio": 0.5}, {"method": "evs", "ratio": 0.4}, {"ratio": 0.3}, {"method": "vidcom2", "ratio": 0.5}),
    several({"ratio": 0.5}, {"ratio": 0.25}, {"method": "illava", "layers": [1, 2], "ratio": 0.5}, {"ratio": 0.77}),
]
MATCHED: dict[str, object] = {"match_class_token": True}
CLASS_TOKENS = [
    *(one_video(frames, ratio=ratio, **MATCHED) for frames, ratio in ((1, 0.25), (3, 0.49), (4, 0.77))),
    one_video(2, ratio=0.5, scale="official", **MATCHED),
    one_video(2, ratio=0.5),  # the same frames, matched without it
    one_video(3, keep_tokens=40, **MATCHED),
    several({"ratio": 0.5}, {"ratio": 0.4, **MATCHED}, {"ratio": 0.3}, {"ratio": 0.6, **MATCHED}),
]
IMAGES_IN_THE_DECODER = [
    one_video(3, ratio=0.4, withdraw=True, **MATCHED),
    one_image(9, withdraw=True),
    one_image(10, method="folder+fastv", ratio=0.5, decoder_ratio=0.3),
    several({}, {"ratio": 0.5, "withdraw": True}, {"ratio": 0.5}, {}),
]
NOTHING_REMOVED: list[Case] = [one_video(1), one_video(4)]
NO_IMAGE_REMOVED: list[Case] = [one_image(1), ask(photo(1, 80, 60), video(2), reductions=[{}, {}])]


@pytest.fixture(scope="module", params=["video_llava", "llava_next_video"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    write = getattr(video_checkpoint, f"write_{request.param}")
    found: Path = write(tmp_path_factory.mktemp("checkpoints") / request.param)
    return found


def has_images(checkpoint: Path) -> bool:
    return checkpoint.name == "video_llava"


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> VideoLlavaReference:
    return (VideoLlavaReference if has_images(checkpoint) else LlavaNextVideoReference)(checkpoint, K)


@pytest.fixture(scope="module")
def options(checkpoint: Path) -> dict[str, Any]:
    return CUT if has_images(checkpoint) else CUT | {"limit_mm_per_prompt": {"video": 1}, "max_model_len": 512}


@pytest.fixture(scope="module")
def llm(checkpoint: Path, options: dict[str, Any]) -> Iterator[Any]:
    """With a withdrawal layer; prefix caching is on, as by default."""
    yield start_engine(checkpoint, **options, **withdrawal.configure(K, device="cpu"))


@pytest.fixture(scope="module")
def cases(checkpoint: Path) -> list[Case]:
    return [*VIDEOS, *([*IMAGES, *CLASS_TOKENS] if has_images(checkpoint) else ())]


@pytest.fixture(scope="module")
def expect(reference: VideoLlavaReference) -> Callable[[Case], Answer]:
    return remembered(reference)


def assert_same(llm: Any, expect: Callable[[Case], Answer], cases: Sequence[Case]) -> None:
    for case, (tokens, logprobs) in zip(cases, greedy(llm, cases), strict=True):
        want, expected = expect(case)
        assert tokens == want, (case.prompt, case.reductions)
        assert logprobs == pytest.approx(expected, abs=2e-5), (case.prompt, case.reductions)


def test_all_in_one_batch_and_again_from_the_cache(
    llm: Any, expect: Callable[[Case], Answer], cases: list[Case], checkpoint: Path
) -> None:
    for _ in range(2):
        assert_same(llm, expect, [*cases, *IN_THE_DECODER, *(IMAGES_IN_THE_DECODER if has_images(checkpoint) else ())])


def test_kept_positions_are_those_of_the_whole_video(llm: Any, checkpoint: Path) -> None:
    """Class tokens have theirs, and so does text between and after videos."""
    kept, keeping = (
        KEPT,
        (KeepingVideoReference if has_images(checkpoint) else KeepingNextVideoReference)(checkpoint, K),
    )
    if has_images(checkpoint):
        keep: dict[str, object] = {"positions": "keep"}
        kept = [
            *KEPT,
            one_image(4, ratio=0.5, positions="keep"),
            one_video(3, ratio=0.4, positions="keep", **MATCHED),
            several({"ratio": 0.5}, {"ratio": 0.5, **keep}, {"ratio": 0.3, **keep}, {}),
        ]
    assert_same(llm, lambda case: keeping.generate(case.prompt, case.images, case.reductions, MAX_TOKENS), kept)


def test_nothing_removed_is_the_model_of_others(
    checkpoint: Path, options: dict[str, Any], expect: Callable[[Case], Answer], cases: list[Case]
) -> None:
    """vLLM's own bit for bit, or transformers' where vLLM has none; then reduced ones in chunks, some preempted."""
    small = SMALL if has_images(checkpoint) else SMALL | {"num_gpu_blocks_override": 18}
    whole = NOTHING_REMOVED + (NO_IMAGE_REMOVED if has_images(checkpoint) else [])
    plain = [replace(case, reductions=()) for case in whole]
    if has_images(checkpoint):
        ours = start_engine(checkpoint, **options, **small)
        for case, (tokens, _) in zip(plain, greedy(ours, plain), strict=True):
            assert tokens == transformers_alone(checkpoint, case)
    else:
        stock_class = "StockLlavaNextVideoForConditionalGeneration"
        module = "vllm.model_executor.models.llava_next_video:LlavaNextVideoForConditionalGeneration"
        ModelRegistry.register_model(stock_class, module)
        alone: dict[str, Any] = {"hf_overrides": {"architectures": [stock_class]}, "worker_cls": "auto"}
        stock = start_engine(checkpoint, **alone, **options, **small)
        expected = greedy(stock, plain)
        del stock
        ours = start_engine(checkpoint, **options, **small)
        assert greedy(ours, plain) == expected
        forget(ours)
        assert greedy(ours, whole) == expected
    with watch(ours) as seen:
        assert_same(ours, expect, cases)
    assert seen.preempted


def transformers_alone(checkpoint: Path, case: Case) -> list[int]:
    """Its own processor and its own `generate`."""
    reference = VideoLlavaReference(checkpoint, K)
    images = [item for item in case.images if not isinstance(item, np.ndarray)] or None
    videos = [item for item in case.images if isinstance(item, np.ndarray)]
    inputs = reference.processor(text=case.prompt, images=images, videos=videos or None, return_tensors="pt")
    found = reference.model.generate(**inputs, max_new_tokens=MAX_TOKENS, min_new_tokens=MAX_TOKENS, do_sample=False)
    ids: list[int] = found[0, inputs["input_ids"].shape[1] :].tolist()
    return ids


REFUSED: list[tuple[Case, str, str]] = [
    (one_video(2, method="tome", ratio=0.5), "method", "works in tower"),
    (one_video(2, method="downsample", ratio=0.5), "method", "works before tower"),
    (one_video(2, ratio=0.999), "ratio", "have to stay"),
    (one_video(4, method="evs", ratio=0.8), "ratio", "a ratio of at most 0.75$"),
    (one_video(2, keep_tokens=3), "keep_tokens", "is not what this image can keep"),
]


@pytest.mark.parametrize(("case", "param", "told"), REFUSED, ids=[str(case.reductions[0]) for case, _, _ in REFUSED])
def test_refused(llm: Any, case: Case, param: str, told: str) -> None:
    with pytest.raises(InvalidReduction, match=told) as caught:
        llm.generate([case.to_vllm()], use_tqdm=False)
    assert caught.value.param == param


def test_frames_that_are_chosen_while_they_are_processed(llm: Any) -> None:
    prompt = one_video(3, ratio=0.5).to_vllm()
    prompt["mm_processor_kwargs"]["num_frames"] = 2
    with pytest.raises(InvalidReduction, match="choose them before"):
        llm.generate([prompt], use_tqdm=False)


def test_prompts_are_as_long_as_planned(llm: Any, reference: VideoLlavaReference, checkpoint: Path) -> None:
    case = one_video(4, ratio=0.5)
    (output,) = llm.generate([case.to_vllm()], use_tqdm=False)
    text = len(llm.get_tokenizer()(case.prompt)["input_ids"]) - 1
    frame = 1 + 72 if has_images(checkpoint) else 18
    assert len(output.prompt_token_ids) == text + 4 * frame


@pytest.mark.parametrize("checkpoint", ["video_llava"], indirect=True)
def test_the_reference_tells_class_tokens_in_another_place(
    llm: Any, expect: Callable[[Case], Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind their frames."""
    prepend = video_llava._prepend_class_token

    def wrong(class_token: torch.Tensor, frame: Any) -> Any:
        right = prepend(class_token, frame)
        return type(right)(right.features.roll(-1, 0), right.source)

    monkeypatch.setattr(video_llava, "_prepend_class_token", wrong)
    forget(llm)
    case = one_video(2, ratio=0.5)
    want, expected = expect(case)
    ((tokens, logprobs),) = greedy(llm, [case])
    assert tokens != want or logprobs != pytest.approx(expected, abs=1e-3)
    forget(llm)


@pytest.mark.parametrize("checkpoint", ["video_llava"], indirect=True)
def test_only_frames_behind_a_class_token_can_be_matched_with_it(llm: Any) -> None:
    with pytest.raises(InvalidReduction, match="as the frames of Video-LLaVA's videos have: leave it out"):
        llm.generate([one_image(1, ratio=0.5, **MATCHED).to_vllm()], use_tqdm=False)
    family = VideoLlavaFamily(VisionGeometry(144, (12, 12)), 8)
    plain, matched = (
        plan_item(Reduction(ratio=0.5, options=options), family.layout((3,)))
        for options in ((), (("match_class_token", True),))
    )
    assert family.read_plan(matched.to_ints()) == matched
    assert matched.kept == plain.kept
    assert (plain.grids[0].folds, matched.grids[0].folds) == ((71, 1), (72,))  # half of what is one token longer


@pytest.mark.parametrize("checkpoint", ["video_llava"], indirect=True)
def test_a_video_that_is_not_reduced_may_be_sampled_by_the_processor(checkpoint: Path) -> None:
    """As an operator may have it; placeholders are counted after that."""
    options: dict[str, Any] = {"mm_processor_kwargs": {"do_sample_frames": True, "num_frames": 2}}
    processor = MULTIMODAL_REGISTRY.create_processor(EngineArgs(str(checkpoint), **options).create_model_config())
    items = processor.info.parse_mm_data({"video": video(4)})
    found = processor(processor.info.get_tokenizer().encode("<video>"), items)
    assert len(found["prompt_token_ids"]) == 2 * 145


def vision(image_size: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        image_size=image_size, patch_size=14, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16
    )


def test_published_sizes() -> None:
    """`LanguageBind/Video-LLaVA-7B-hf` and `llava-hf/LLaVA-NeXT-Video-7B-hf`, as far as counts go."""
    model_config: Any = SimpleNamespace(hf_config=VideoLlavaConfig(vision_config=vision(224)), max_model_len=4096)
    of_llava = VideoLlavaFamily.of(model_config)
    assert of_llava.largest.tokens == 256 and of_llava.most_frames(Reduction()) == 8
    assert of_llava.layout((8,)).tokens == 2056
    half = plan_item(Reduction(ratio=0.5), of_llava.layout((8,)))
    assert half.kept == 8 * 129 and of_llava.read_plan(half.to_ints()) == half
    model_config.hf_config = LlavaNextVideoConfig(vision_config=vision(336))
    of_next = LlavaNextVideoFamily.of(model_config)
    assert of_next is not None and of_next.layout((32,)).tokens == 32 * 144
    assert (of_next.most_frames(Reduction()), of_next.most_frames(Reduction(ratio=0.5))) == (21, 28)
    assert [of_next.most_frames(Reduction(method, ratio=0.2)) for method in ("folder", "evs")] == [26, 26]
    assert of_next.most_frames(Reduction("evs", keep_tokens=3000)) == 28


@pytest.mark.parametrize("image_size", [336, 350, 364], ids=lambda size: f"{size // 14} patches")
def test_a_frame_has_as_many_tokens_as_pooling_leaves(image_size: int) -> None:
    """Of 25 x 25 patches 12 x 12; vLLM counts 13 x 13 there."""
    config = LlavaNextVideoConfig(vision_config=vision(image_size))
    context: Any = SimpleNamespace(get_hf_config=lambda *_: config)
    model_config: Any = SimpleNamespace(hf_config=config, max_model_len=4096)
    family = LlavaNextVideoFamily.of(model_config)
    assert family is not None
    pooled = LlavaNextVideoPooler(config)(torch.zeros(1, (image_size // 14) ** 2, 8))
    info = FoldLlavaNextVideoProcessingInfo(context)
    tokens = info.get_num_video_tokens(image_width=1, image_height=1, num_frames=3)
    assert family.layout((3,)).tokens == tokens == 3 * pooled.shape[1]


@pytest.mark.parametrize("wrong", [{"vision_feature_select_strategy": "full"}, {"vision_feature_layer": [-2, -5]}])
def test_a_config_that_is_not_of_video_llava(wrong: dict[str, Any]) -> None:
    model_config: Any = SimpleNamespace(hf_config=VideoLlavaConfig(vision_config=vision(224), **wrong))
    with pytest.raises(ValueError, match="Video-LLaVA needs CLIP towers"):
        VideoLlavaFamily.of(model_config)


def test_the_map_shows_each_frame(llm: Any, checkpoint: Path) -> None:
    (frames,) = engine_maps(llm, "<video>", [video(2)], [{"ratio": 0.5}], "video")
    assert [found.region.name for found in frames] == ["frame 1", "frame 2"]
    assert members(frames[0]) != members(frames[1])
    if has_images(checkpoint):
        (matched,) = engine_maps(llm, "<video>", [video(2)], [{"ratio": 0.25, **MATCHED}], "video")
        for found in matched:
            merged = [group for group in members(found) if len(group) > 1]
            evens = [sum(patch % 2 == 0 for patch in group) for group in merged]
            assert merged and evens == [1] * len(
                merged
            )  # one at an odd place takes others up: behind a class token even
        ((image,),) = engine_maps(llm, "<image>", [photo(3)], [{"method": "tome", "ratio": 0.5}])
        assert sorted(token for group in members(image) for token in group) == list(range(len(image.group)))


def test_the_page_says_which_methods_work(checkpoint: Path, llm: Any) -> None:
    assert_documented("Video-LLaVA" if has_images(checkpoint) else "NeXT-Video", llm)
