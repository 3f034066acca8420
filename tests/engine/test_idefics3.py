"""Idefics3 and SmolVLM: an image's tokens lie in pieces, one for each tile, against vLLM's own and plain PyTorch."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.models.smolvlm.processing_smolvlm as smolvlm_processing
from transformers import Idefics3Config
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from vllm import EngineArgs, ModelRegistry
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageProcessorItems, ImageSize

from foldserve.reducers.item import plan_item
from foldserve.reducers.reduction import InvalidReduction, Reduction
from foldserve.server.engine import withdrawal
from foldserve.server.engine.families.idefics3 import Idefics3Family
from foldserve.server.engine.families.registry import FAMILY_CLASSES, family_of
from foldserve.server.engine.positions import SequencePositions
from foldserve.server.quality.engine.kl_probe import chat_prompt, probe
from tests import idefics3_checkpoint
from tests.engine.conftest import MAX_TOKENS, Case, by_uuid_alone, greedy, start_engine
from tests.engine.idefics3_reference import Idefics3Reference, tiling
from tests.engine.maps import engine_maps, members
from tests.engine.method_table import assert_documented
from tests.engine.watch import encode_in_pieces, forget, watch
from tests.images import photo

SIZES = ((300, 200), (120, 500), (168, 168), (640, 130))
"""(width, height): 3 x 2, 1 x 3, 3 x 3 and 3 x 1 tiles, and the whole image."""

K = 3  # of 8 layers
KEEP: dict[str, Any] = {"positions": "keep"}

CUT: dict[str, Any] = {
    "max_model_len": 768,
    "max_num_batched_tokens": 600,
    "long_prefill_token_threshold": 100,
    "num_gpu_blocks_override": 28,
}
"""Chunks cut every image, and the pool has room for a few of the prompts."""


@pytest.fixture(scope="module", params=["idefics3", "smolvlm"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smolvlm_processing, "num2words", str)  # spells numbers in prompts with videos
        yield idefics3_checkpoint.write(tmp_path_factory.mktemp("checkpoints") / request.param, request.param)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Idefics3Reference:
    return Idefics3Reference(checkpoint, K)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Any:
    """Chunks cut every image; prefix caching is on, as by default."""
    options = {"max_model_len": 2048, "max_num_batched_tokens": 600, "long_prefill_token_threshold": 300}
    return start_engine(checkpoint, **options, **withdrawal.configure(K, device="cpu"))


def one_image(width: int, height: int, **reduction: object) -> Case:
    return Case("User:<image>what is it?\nAssistant:", [photo(width * height, width, height)], [reduction])


def two_images(first: dict[str, Any], second: dict[str, Any]) -> Case:
    images = [photo(1, *SIZES[0]), photo(2, *SIZES[1])]
    return Case("User:first <image> then <image>?\nAssistant:", images, [first, second])


MIXED = [
    *(one_image(*size) for size in SIZES),
    *(one_image(*size, ratio=ratio) for size, ratio in zip(SIZES, (0.5, 0.77, 0.25, 0.9), strict=True)),
    one_image(*SIZES[0], ratio=0.77),
    one_image(*SIZES[0], ratio=0.25),
    one_image(*SIZES[1], keep_tokens=41),
    one_image(*SIZES[2], method="random", ratio=0.6),
    one_image(*SIZES[2], method="divprune", ratio=0.6),
    one_image(*SIZES[3], method="pool", ratio=0.75),
    one_image(*SIZES[1], ratio=0.6, **KEEP),
    one_image(*SIZES[3], method="random", ratio=0.6, **KEEP),
    two_images({"ratio": 0.5, **KEEP}, {"ratio": 0.75}),
    two_images({"ratio": 0.5}, {}),
    Case("User:hello there\nAssistant:"),
]
"""Sizes, ratios, methods and unreduced images in one batch."""

WITHDRAWN = [
    one_image(*SIZES[0], withdraw=True),
    one_image(*SIZES[1], ratio=0.5, withdraw=True),
    one_image(*SIZES[3], ratio=0.5, withdraw=True, **KEEP),
    two_images({"ratio": 0.75}, {"withdraw": True}),
    two_images({"ratio": 0.5, "withdraw": True}, {}),
]
"""An image's tokens go, marks and lines between them stay."""


def assert_same(llm: Any, reference: Idefics3Reference, cases: Sequence[Case], *, times: int = 1) -> None:
    runs = [greedy(llm, cases) for _ in range(times)]
    for case, *answers in zip(cases, *runs, strict=True):
        want, expected = reference.generate(case.prompt, case.images, case.reductions, MAX_TOKENS)
        for tokens, logprobs in answers:
            assert tokens == want, ([image.size for image in case.images], case.reductions)
            assert logprobs == pytest.approx(expected, abs=2e-5)


def test_all_in_one_batch_and_again_from_the_cache(llm: Any, reference: Idefics3Reference) -> None:
    assert_same(llm, reference, MIXED + WITHDRAWN, times=2)


@pytest.mark.parametrize("checkpoint", ["idefics3"], indirect=True)
def test_a_tower_that_takes_an_image_at_a_time(
    llm: Any, reference: Idefics3Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one step encodes goes through the tower in pieces."""
    pieces = encode_in_pieces(llm, 260, monkeypatch)
    assert_same(llm, reference, MIXED[5:12])
    assert len(pieces) > 1


@pytest.mark.parametrize("checkpoint", ["idefics3"], indirect=True)
def test_calibration_withdraws_the_same_tokens(llm: Any, reference: Idefics3Reference) -> None:
    image = photo(1, *SIZES[1])
    full, withdrawn = probe(llm, chat_prompt(llm, image, "what is it?"), range(K, K + 1))
    prompt = "user:<image>what is it?<end_of_utterance>\nAssistant:"
    for logits, withdraw in ((full[0], False), (withdrawn[0, 0], True)):
        (token,), (logprob,) = reference.generate(prompt, [image], [{"withdraw": withdraw}], 1)
        assert int(logits.argmax()) == token
        assert float(logits.log_softmax(-1)[token]) == pytest.approx(logprob, abs=1e-4)


@pytest.mark.parametrize("checkpoint", ["idefics3"], indirect=True)
def test_ratio_0_is_vllms_own_bit_for_bit(checkpoint: Path, reference: Idefics3Reference) -> None:
    """And on the same engine reduced images in chunks, some of them preempted."""
    (architecture,) = json.loads((checkpoint / "config.json").read_text())["architectures"]
    module, stock_class = FAMILY_CLASSES[architecture].model.partition(".")[0], f"Stock{architecture}"
    ModelRegistry.register_model(stock_class, f"vllm.model_executor.models.{module}:{architecture}")
    plain = [*(one_image(*size) for size in SIZES), two_images({}, {})]
    stock = start_engine(checkpoint, hf_overrides={"architectures": [stock_class]}, worker_cls="auto", **CUT)
    expected = greedy(stock, [replace(case, reductions=()) for case in plain])
    del stock
    ours = start_engine(checkpoint, **CUT)
    assert greedy(ours, [replace(case, reductions=()) for case in plain]) == expected
    assert greedy(ours, plain) == expected
    with watch(ours) as seen:
        assert_same(ours, reference, MIXED)
    assert seen.preempted


class OneRun(SequencePositions):
    """Positions as if an image's tokens lay in one piece."""

    def places(self, feature: Any, source: Any) -> Any:
        return source


@pytest.mark.parametrize("checkpoint", ["idefics3"], indirect=True)
def test_the_reference_tells_wrong_positions(
    llm: Any, reference: Idefics3Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    monkeypatch.setattr(model.family, "position_map", OneRun.of)
    forget(llm)
    case = one_image(*SIZES[1], ratio=0.6, **KEEP)
    ((tokens, logprobs),) = greedy(llm, [case])
    want, expected = reference.generate(case.prompt, case.images, case.reductions, MAX_TOKENS)
    assert tokens != want or logprobs != pytest.approx(expected, abs=1e-3)
    forget(llm)


@pytest.mark.parametrize(
    ("reduction", "param", "reason"),
    [
        ({"method": "folder_cls", "ratio": 0.5}, "method", "in tower"),
        ({"method": "downsample", "ratio": 0.5}, "method", "before tower"),
        ({"ratio": 0.99}, "ratio", "7 grids of 36 tokens, each reduced by itself: ratio 0.99 would remove 35"),
        ({"method": "fastv", "ratio": 0.5}, "method", "this model puts text between an image's tiles"),
        ({"method": "illava_decoder", "ratio": 0.5}, "method", "withdraw them all, or reduce before the decoder"),
    ],
    ids=str,
)
@pytest.mark.parametrize("checkpoint", ["idefics3"], indirect=True)
def test_refused(llm: Any, reduction: dict[str, Any], param: str, reason: str) -> None:
    with pytest.raises(InvalidReduction, match=reason) as caught:
        llm.generate([one_image(*SIZES[0], **reduction).to_vllm()], use_tqdm=False)
    assert caught.value.param == param


@pytest.mark.parametrize("checkpoint", ["idefics3"], indirect=True)
def test_an_image_in_one_piece_may_have_tokens_chosen(llm: Any) -> None:
    """Where the request, or the operator, has images not cut."""
    case = one_image(*SIZES[0], method="fastv", ratio=0.5).to_vllm()
    case["mm_processor_kwargs"]["do_image_splitting"] = False
    (output,) = llm.generate([case], use_tqdm=False)
    assert output.prompt_token_ids.count(llm.get_tokenizer().convert_tokens_to_ids("<image>")) == 36


@pytest.mark.parametrize("checkpoint", ["idefics3"], indirect=True)
def test_the_request_may_say_how_large_an_image_is_made(llm: Any) -> None:
    """As the operator may, with `--mm-processor-kwargs`."""
    case = one_image(*SIZES[0], ratio=0.5).to_vllm()
    case["mm_processor_kwargs"]["size"] = {"longest_edge": 2 * idefics3_checkpoint.SIDE}
    (output,) = llm.generate([case], use_tqdm=False)
    tiles = 1 + 2 * 2
    assert output.prompt_token_ids.count(llm.get_tokenizer().convert_tokens_to_ids("<image>")) == tiles * 18


@pytest.mark.parametrize("checkpoint", ["idefics3"], indirect=True)
def test_an_image_that_is_known_may_come_as_its_uuid_alone(llm: Any) -> None:
    """Its size is remembered, which its plan is made of."""
    first, second = by_uuid_alone(llm, one_image(*SIZES[0], ratio=0.6))
    assert second.prompt_token_ids == first.prompt_token_ids
    assert second.outputs[0].token_ids == first.outputs[0].token_ids


def test_graphs_of_the_tower_are_refused(checkpoint: Path) -> None:
    """vLLM has them for this model, and runs them instead of what reduces."""
    with pytest.raises(ValueError, match=r"cudagraph_mm_encoder .*does not go with foldserve"):
        start_engine(checkpoint, compilation_config={"cudagraph_mm_encoder": True})


def test_counts_are_those_of_hugging_faces_processor(checkpoint: Path) -> None:
    """50 sizes, as they really come out."""
    model_config = EngineArgs(model=str(checkpoint)).create_model_config()
    vllm, family, rng = MULTIMODAL_REGISTRY.get_processing_info(model_config), family_of(model_config), random.Random(0)
    process = vllm.get_hf_processor().image_processor
    assert family is not None
    for _ in range(50):
        width, height = rng.randint(5, 900), rng.randint(5, 900)
        image = photo(0, 64, 64).resize((width, height))
        pixels = process([[image]], return_tensors="pt")["pixel_values"][0]
        assert family.shape(ImageProcessorItems([image]), 0, vllm, {}) == (len(pixels),), (width, height)


def test_counts_of_published_tiles(checkpoint: Path) -> None:
    """5,000 sizes; 512 pixels a side in 64 tokens, as SmolVLM-256M and -500M have them."""
    model_config = EngineArgs(model=str(checkpoint)).create_model_config()
    vision = model_config.hf_config.vision_config
    vision.image_size, vision.patch_size, model_config.hf_config.scale_factor = 512, 16, 4
    options = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
    model_config.multimodal_config.mm_processor_kwargs = options
    vllm, family, rng = MULTIMODAL_REGISTRY.get_processing_info(model_config), family_of(model_config), random.Random(0)
    assert family is not None
    for _ in range(5000):
        size = ImageSize(rng.randint(10, 4000), rng.randint(10, 4000))
        layout = family.layout(family.shape(SimpleNamespace(get_image_size=lambda _, size=size: size), 0, vllm, {}))
        rows, columns = tiling(size.width, size.height, 512, 2048)
        assert layout.tokens == 64 * (rows * columns + 1), size
        assert family.read_plan(plan_item(Reduction(), layout).to_ints()) == plan_item(Reduction(), layout)
    assert family.sizes_matter and family.largest.tokens == 64 * 17


@pytest.mark.parametrize(
    ("image", "patch", "scale", "tokens"), [(512, 16, 4, 64), (384, 14, 3, 81), (364, 14, 2, 169)], ids=str
)
def test_published_shapes(image: int, patch: int, scale: int, tokens: int) -> None:
    """SmolVLM-256M's and -500M's, SmolVLM's and Idefics3-8B's connector, without weights."""
    vision = {"hidden_size": 768, "image_size": image, "patch_size": patch}
    config = Idefics3Config(vision_config=vision, text_config={"hidden_size": 576}, scale_factor=scale)
    with torch.device("meta"):
        embeds = Idefics3Connector(config)(torch.empty(17, (image // patch) ** 2, 768))
    model_config: Any = SimpleNamespace(hf_config=config)
    layout = Idefics3Family.of(model_config).layout((17,))
    assert embeds.shape == (17, layout.tokens // 17, 576) == (17, tokens, 576)


def test_the_map_shows_each_tile_and_then_the_whole_image(llm: Any) -> None:
    (maps,) = engine_maps(llm, "<image>", [photo(3, *SIZES[3])], [{"ratio": 0.5}])
    rows, columns = tiling(*SIZES[3], idefics3_checkpoint.SIDE, idefics3_checkpoint.LONGEST)
    assert [found.region.name for found in maps] == [*(f"tile {i + 1}" for i in range(columns * rows)), "base"]
    assert maps[0].region.box == pytest.approx((0, 0, 1 / columns, 1 / rows))
    assert members(maps[0]) != members(maps[-1])


def test_the_page_says_which_methods_work(llm: Any) -> None:
    assert_documented("Idefics3", llm)
