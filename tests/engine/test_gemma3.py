"""Gemma-3: images, crops, windows, and image tokens that attend both ways, against vLLM's own and plain PyTorch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Gemma3Config, SiglipVisionModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
from vllm import EngineArgs, ModelRegistry
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadataBuilder

from foldserve.reducers.item import plan_item
from foldserve.reducers.reduction import InvalidReduction, Reduction
from foldserve.server.engine import withdrawal
from foldserve.server.engine.families.gemma3 import Gemma3Family
from foldserve.server.engine.families.registry import family_of
from tests import gemma3_checkpoint
from tests.engine.conftest import MAX_TOKENS, Case, by_uuid_alone, greedy, start_engine
from tests.engine.gemma3_reference import Gemma3Reference, attention, crops
from tests.engine.keeping_reference import Answer
from tests.engine.maps import engine_maps, members
from tests.engine.method_table import assert_documented
from tests.engine.watch import watch
from tests.images import photo

SIZES = ((300, 200), (120, 500), (168, 168), (640, 130))
"""(width, height)"""

LEAST = 60
"""Pixels of a crop; of `SIZES` 2, 4, none and 4 crops."""

KEEP: dict[str, Any] = {"positions": "keep"}
CUT: dict[str, Any] = {
    "max_model_len": 512,
    "max_num_batched_tokens": 100,
    "long_prefill_token_threshold": 40,
    "num_gpu_blocks_override": 100,
}
"""Chunks cut every image, and the pool has room for a few of the prompts."""

CROPS = {"mm_processor_kwargs": {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": LEAST}}
"""An operator's option."""

WHOLE: dict[str, Any] = {"enable_prefix_caching": False, "max_num_batched_tokens": 8192, **CROPS}
"""A prompt is computed in one step, as images have to be where their tokens attend both ways."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gemma3_checkpoint.write(tmp_path_factory.mktemp("checkpoints") / "tiny-gemma3")


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Any:
    """Prefix caching is on, as by default."""
    return start_engine(checkpoint, **CUT, **CROPS)


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> Any:
    return start_engine(checkpoint, **WHOLE)


class Uncropped(Case):
    """A case whose images are not cut into crops, whatever the operator says."""

    def to_vllm(self) -> dict[str, Any]:
        prompt = super().to_vllm()
        return {**prompt, "mm_processor_kwargs": {**prompt.get("mm_processor_kwargs", {}), "do_pan_and_scan": False}}


def one_image(width: int, height: int, **reduction: object) -> Case:
    prompt = "user\n<start_of_image>what is it?\nmodel\n"
    return Uncropped(prompt, [photo(width * height, width, height)], [reduction])


def two_images(first: dict[str, Any], second: dict[str, Any]) -> Case:
    images = [photo(1, *SIZES[0]), photo(2, *SIZES[1])]
    return Uncropped("user\nfirst <start_of_image><start_of_image>then?\nmodel\n", images, [first, second])


def cropped(case: Case) -> Case:
    return Case(case.prompt, case.images, case.reductions)


MIXED = [
    *(one_image(*size) for size in SIZES),
    *(one_image(*size, ratio=ratio) for size, ratio in zip(SIZES, (0.5, 0.77, 0.25, 0.9), strict=True)),
    one_image(*SIZES[0], ratio=0.77),
    one_image(*SIZES[0], ratio=0.25),
    one_image(*SIZES[1], keep_tokens=11),
    one_image(*SIZES[2], method="random", ratio=0.6),
    one_image(*SIZES[2], method="divprune", ratio=0.6),
    one_image(*SIZES[3], method="pool", ratio=0.75),
    one_image(*SIZES[1], ratio=0.6, **KEEP),
    two_images({"ratio": 0.5, **KEEP}, {"ratio": 0.75}),
    two_images({"ratio": 0.5}, {}),
    Case("user\nhello there\nmodel\n"),
]
"""Sizes, ratios, methods and unreduced images in one batch."""

CROPPED = [
    *(cropped(one_image(*size)) for size in SIZES),
    *(cropped(one_image(*size, ratio=ratio)) for size, ratio in zip(SIZES, (0.5, 0.77, 0.25, 0.9), strict=True)),
    cropped(one_image(*SIZES[1], method="random", ratio=0.6, **KEEP)),
    cropped(one_image(*SIZES[0], keep_tokens=61)),
    cropped(two_images({"ratio": 0.5, **KEEP}, {"ratio": 0.75})),
]
"""An image and its crops, with text between them."""


def assert_same(
    runs: Sequence[Sequence[Answer]], path: Path, cases: Sequence[Case], *, both_ways: bool = False
) -> None:
    references = [Gemma3Reference(path, least=least, both_ways=both_ways) for least in (0, LEAST)]
    for case, *answers in zip(cases, *runs, strict=True):
        reference = references[not isinstance(case, Uncropped)]
        want, expected = reference.generate(case.prompt, case.images, case.reductions, MAX_TOKENS)
        for tokens, logprobs in answers:
            assert tokens == want, ([image.size for image in case.images], case.reductions)
            assert logprobs == pytest.approx(expected, abs=2e-5)


def test_all_in_one_batch_and_again_from_the_cache(llm: Any, checkpoint: Path) -> None:
    cases = MIXED + CROPPED
    with watch(llm) as seen:
        answers = [greedy(llm, cases) for _ in range(2)]
    assert seen.preempted
    assert_same(answers, checkpoint, cases)


def test_ratio_0_is_vllms_own_bit_for_bit(whole: Any, checkpoint: Path) -> None:
    stock_class = "StockGemma3ForConditionalGeneration"
    ModelRegistry.register_model(stock_class, "vllm.model_executor.models.gemma3_mm:Gemma3ForConditionalGeneration")
    plain = [*MIXED[:4], *CROPPED[:4], two_images({}, {})]
    stock = start_engine(checkpoint, hf_overrides={"architectures": [stock_class]}, worker_cls="auto", **WHOLE)
    expected = greedy(stock, [replace(case, reductions=()) for case in plain])
    assert greedy(whole, [replace(case, reductions=()) for case in plain]) == expected
    assert greedy(whole, plain) == expected


@contextmanager
def attending_both_ways() -> Iterator[None]:
    """vLLM's CPU attention, with image tokens that attend to each other where its runner says: as on a GPU."""
    build, forward = CPUAttentionMetadataBuilder.build, CPUAttentionBackendImpl.forward

    def built(self: Any, prefix: int, common: Any, *args: Any, **kwargs: Any) -> Any:
        metadata = build(self, prefix, common, *args, **kwargs)
        metadata.ranges = common.mm_req_doc_ranges
        return metadata

    def forwarded(
        self: Any, layer: Any, query: Any, key: Any, value: Any, cache: Any, metadata: Any, output: Any, **kwargs: Any
    ) -> Any:
        found = forward(self, layer, query, key, value, cache, metadata, output, **kwargs)
        for request, ranges in ({} if metadata is None else metadata.ranges or {}).items():
            first, last = metadata.query_start_loc[request : request + 2].tolist()
            n = last - first
            if n == 1:
                continue
            assert n == metadata.seq_lens[request], "a prompt in chunks"
            distance = torch.arange(n)[:, None] - torch.arange(n)
            mask = (distance >= 0) & (distance < (self.sliding_window if self.sliding_window > 0 else n))
            for start, end in ranges:
                mask[start : end + 1, start : end + 1] = True
            own = slice(first, last)
            attended = attention(query[own], key[own], value[own], mask, self.scale)
            output[own] = attended.reshape(output[own].shape)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CPUAttentionMetadataBuilder, "build", built)
        patch.setattr(CPUAttentionBackendImpl, "forward", forwarded)
        yield


def test_what_is_left_of_an_image_attends_both_ways(whole: Any, checkpoint: Path) -> None:
    """vLLM's ranges are those of the tokens that are left, image by image and crop by crop."""
    cases = MIXED + CROPPED
    with attending_both_ways():
        answers = greedy(whole, cases)
    assert_same([answers], checkpoint, cases, both_ways=True)
    one_way = Gemma3Reference(checkpoint)
    for case, (_, logprobs) in zip(MIXED[4:8], answers[4:8], strict=True):  # the reference tells the two
        _, (found,) = one_way.generate(case.prompt, case.images, case.reductions, 1)
        assert abs(found - logprobs[0]) > 1e-3


@pytest.mark.parametrize(
    ("reduction", "param", "reason"),
    [
        ({"method": "folder_cls", "ratio": 0.5}, "method", "in tower"),
        ({"method": "downsample", "ratio": 0.5}, "method", "before tower"),
        ({"ratio": 0.99}, "ratio", "ratio 0.99 would remove 35 of 36"),
        ({"withdraw": True}, "withdraw", "attend to each other in both directions"),
        (
            {"method": "folder+fastv", "ratio": 0.5},
            "method",
            "see a window of tokens: choose a method before",
        ),
    ],
    ids=str,
)
def test_refused(whole: Any, reduction: dict[str, Any], param: str, reason: str) -> None:
    with pytest.raises(InvalidReduction, match=reason) as caught:
        whole.generate([one_image(*SIZES[0], **reduction).to_vllm()], use_tqdm=False)
    assert caught.value.param == param


def test_an_image_that_is_known_may_come_as_its_uuid_alone(llm: Any) -> None:
    """Its size is remembered, which its plan is made of."""
    first, second = by_uuid_alone(llm, cropped(one_image(*SIZES[0], ratio=0.6)))
    assert second.prompt_token_ids == first.prompt_token_ids
    assert second.outputs[0].token_ids == first.outputs[0].token_ids


def test_graphs_of_the_tower_are_refused(checkpoint: Path) -> None:
    """vLLM has them for this model, and runs them instead of what reduces."""
    with pytest.raises(ValueError, match=r"cudagraph_mm_encoder .*does not go with foldserve"):
        start_engine(checkpoint, compilation_config={"cudagraph_mm_encoder": True})


def test_a_withdrawal_layer_is_refused_at_start_up(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="its image tokens attend to each other in both directions"):
        start_engine(checkpoint, **withdrawal.configure(3, device="cpu"))


def test_counts_of_published_crops(checkpoint: Path) -> None:
    """5,000 sizes, with crops and without."""
    model_config = EngineArgs(model=str(checkpoint)).create_model_config()
    model_config.hf_config.mm_tokens_per_image, model_config.hf_config.vision_config.image_size = 256, 896
    assert model_config.multimodal_config is not None
    vllm, rng = MULTIMODAL_REGISTRY.get_processing_info(model_config), random.Random(0)
    for options in ({}, {"do_pan_and_scan": True}):
        model_config.multimodal_config.mm_processor_kwargs = options
        family = family_of(model_config)
        assert family is not None
        for _ in range(2500):
            size = ImageSize(rng.randint(10, 4000), rng.randint(10, 4000))
            images = SimpleNamespace(get_image_size=lambda _, size=size: size)
            layout = family.layout(family.shape(images, 0, vllm, {}))
            assert layout.tokens == 256 * (1 + (crops(size.width, size.height, 256) if options else 0)), size
            assert family.read_plan(plan_item(Reduction(), layout).to_ints()) == plan_item(Reduction(), layout)
        assert family.largest.tokens == (256 * 5 if options else 256)


def test_published_shapes() -> None:
    """gemma-3-4b-it's tower and projector, without weights."""
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    config = Gemma3Config(
        text_config={"hidden_size": 2560, "num_attention_heads": 8, "num_key_value_heads": 4},
        vision_config={**vision, "image_size": 896, "patch_size": 14, "vision_use_head": False},
        mm_tokens_per_image=256,
    )
    with torch.device("meta"):
        tower, projector = SiglipVisionModel(config.vision_config), Gemma3MultiModalProjector(config)
        embeds = projector(tower(torch.empty(5, 3, 896, 896)).last_hidden_state)
    model_config: Any = SimpleNamespace(hf_config=config)
    layout = Gemma3Family.of(model_config).layout((5,))
    assert embeds.shape == (5, layout.tokens // 5, 2560) == (5, 256, 2560)


def test_the_map_shows_the_whole_image_and_then_its_crops(llm: Any) -> None:
    (maps,) = engine_maps(llm, "<start_of_image>", [photo(3, *SIZES[3])], [{"ratio": 0.5}])
    assert [found.region.name for found in maps] == ["base", *(f"tile {i}" for i in range(1, len(maps)))]
    assert maps[1].region.box == pytest.approx((0, 0, 1 / (len(maps) - 1), 1))  # side by side in a wide image
    assert members(maps[0]) != members(maps[1])


def test_the_page_says_which_methods_work(llm: Any) -> None:
    assert_documented("Gemma-3", llm)
