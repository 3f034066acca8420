"""Our processor's output for an image equals vLLM's bit for bit, although it computes it in a shorter way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import BatchFeature, CLIPImageProcessor, SiglipImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_llava import LlavaImageProcessor
from transformers.models.llava.processing_llava import LlavaProcessor

from foldserve.reducers.plan import InvalidReduction
from foldserve.server.engine.pixels import Normalize, leaving_bytes
from foldserve.server.engine.processor import DUMMY_FIELD, parse_reductions
from tests.images import photo

IMAGES = [photo(1), photo(2, 200, 300), photo(3).convert("L").convert("RGB")]
OPTIONS: list[dict[str, Any]] = [{}, {"do_normalize": False}, {"images_kwargs": {"do_normalize": False}}]


@pytest.fixture(scope="module", params=["clip", "siglip"])
def checkpoint(request: pytest.FixtureRequest, tiny_llava: Path, siglip: Path) -> Path:
    return {"clip": tiny_llava, "siglip": siglip}[request.param]


def processors(checkpoint: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    """Ours and vLLM's own, of a server with `--mm-processor-kwargs options`."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration
    from vllm.multimodal import MULTIMODAL_REGISTRY

    config = EngineArgs(model=str(checkpoint), dtype="float32", mm_processor_kwargs=options).create_model_config()
    ours = MULTIMODAL_REGISTRY.create_processor(config)
    return ours, LlavaForConditionalGeneration._processor_factory.build_processor(ours.info.ctx)


def pixels(processor: Any, **asked: Any) -> Any:
    """What the tower gets."""
    normalize = Normalize(processor.info.get_hf_processor().image_processor, torch.float32)
    return [normalize(image) if image.dtype == torch.uint8 else image for image in raw(processor, **asked)]


def raw(processor: Any, **asked: Any) -> Any:
    """What goes to the engine."""
    items = processor.info.parse_mm_data({"image": IMAGES})
    prompt = processor.info.get_tokenizer().encode("<image> and <image> and <image>")
    inputs = processor(prompt, items, hf_processor_mm_kwargs=asked)
    return [item["pixel_values"].data for item in inputs["mm_kwargs"]["image"]]


@pytest.mark.parametrize("options", OPTIONS, ids=["no options", "flat", "of images"])
def test_pixels_are_those_of_vllm(checkpoint: Path, options: dict[str, Any]) -> None:
    ours, stock = processors(checkpoint, options)
    for found in (pixels(ours), pixels(ours, foldserve={"ratio": 0.5})):
        assert all(torch.equal(a, b) for a, b in zip(found, pixels(stock), strict=True))


def test_options_are_not_lost(checkpoint: Path) -> None:
    """Else the comparison above would prove nothing."""
    plain, *others = (pixels(processors(checkpoint, options)[0])[0] for options in OPTIONS)
    assert not any(torch.equal(plain, other) for other in others)


def test_the_short_way_is_taken(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    whole = LlavaProcessor.__call__

    def watched(self: LlavaProcessor, *args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(LlavaProcessor, "__call__", watched)
    pixels(processors(checkpoint, {})[0], foldserve=[{"ratio": 0.5}, {}, {"ratio": 0.9}])
    assert not calls
    pixels(processors(checkpoint, OPTIONS[1])[0])
    assert len(calls) == 1


class Softened(CLIPImageProcessor):
    """Does more with a normalized image than others."""

    def rescale_and_normalize(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().rescale_and_normalize(*args, **kwargs) / 2


class Padded(CLIPImageProcessor):
    """Adds a border after normalizing: nothing in the bytes stands for its zeros."""

    def _preprocess(self, *args: Any, **kwargs: Any) -> BatchFeature:
        done = super()._preprocess(*args, **kwargs)
        return BatchFeature({"pixel_values": torch.nn.functional.pad(done["pixel_values"], (1, 1, 1, 1))})


@pytest.mark.parametrize(
    "kind, options, splits",
    [
        (CLIPImageProcessor, {}, True),
        (CLIPImageProcessor, {"rescale_factor": 1 / 128}, True),
        (SiglipImageProcessor, {}, True),
        (LlavaImageProcessor, {"do_pad": True}, True),
        (CLIPImageProcessor, {"do_normalize": False}, False),
        (CLIPImageProcessor, {"do_rescale": False}, False),
        (CLIPImageProcessorPil, {}, False),
        (Softened, {}, False),
        (Padded, {}, False),
    ],
)
def test_only_what_gives_the_same_is_split(kind: Any, options: dict[str, Any], splits: bool) -> None:
    assert (leaving_bytes(kind(**options)) is not None) == splits


def made(processor: Any, images: list[Any], uuids: Sequence[str], asked: Any, cache: Any = None) -> list[int]:
    """Placeholders of each image."""
    items = processor.info.parse_mm_data({"image": images}, validate=False)
    prompt = processor.info.get_tokenizer().encode("<image>" * len(images))
    inputs = processor(prompt, items, {"image": list(uuids)}, hf_processor_mm_kwargs={"foldserve": asked}, cache=cache)
    for item, place in zip(inputs["mm_kwargs"]["image"], inputs["mm_placeholders"]["image"], strict=True):
        plan = processor._family.read_plan(item["image_plan"].data.tolist())
        assert plan.kept == place.length and (plan.cells is None or plan.cells.kept == place.length)
    return [place.length for place in inputs["mm_placeholders"]["image"]]


def test_images_whose_pixels_decide_are_processed_once(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come first; what was made of them then is what goes to the engine, and is not made again if known."""
    from vllm.multimodal.cache import MultiModalProcessorOnlyCache

    ours, _ = processors(tiny_llava, {})
    batches: list[int] = []
    stock = type(ours)._apply_stock

    def watched(self: Any, mm_items: Any, hf_kwargs: Any) -> Any:
        if mm_items:  # not cached, all of them
            batches.append(mm_items.get_count("image"))
        return stock(self, mm_items, hf_kwargs)

    monkeypatch.setattr(type(ours), "_apply_stock", watched)
    asked, names = {"method": "pixelprune", "tau": 60}, ["a", "b", "c"]
    kept = made(ours, IMAGES, names, asked)
    assert batches == [3] and min(kept) < 144
    assert made(ours, IMAGES, names, asked) == kept and batches == [3, 3]  # without a cache they are needed
    cache = MultiModalProcessorOnlyCache(ours.info.ctx.model_config)
    assert made(ours, IMAGES[:1], names[:1], asked, cache) == kept[:1] and batches == [3, 3, 1]
    assert made(ours, IMAGES, names, asked, cache) == kept and batches == [3, 3, 1, 2]
    assert made(ours, [None, IMAGES[1], None], names, asked, cache) == kept and batches == [3, 3, 1, 2]
    assert made(ours, [IMAGES[1], photo(9)], ["b", "d"], asked, cache)[0] == kept[1] and batches == [3, 3, 1, 2, 1]
    others = [asked, {"ratio": 0.5}, {**asked, "tau": 200}]
    assert made(ours, IMAGES, names, others, cache)[:2] == [kept[0], 72] and batches == [3, 3, 1, 2, 1, 1, 2]
    with pytest.raises(InvalidReduction, match="send the image with its uuid"):
        made(ours, [None], ["a"], {**asked, "tau": 61}, cache)


def test_pixels_that_are_no_bytes_decide_nothing(tiny_llava: Path) -> None:
    ours, _ = processors(tiny_llava, OPTIONS[1])
    with pytest.raises(InvalidReduction, match="'pixelprune' compares bytes") as refusal:
        made(ours, IMAGES[:1], ["a"], {"method": "pixelprune"})
    assert refusal.value.param == "method"


def test_images_travel_as_bytes(checkpoint: Path) -> None:
    ours, stock = processors(checkpoint, {})
    for image in raw(ours):
        assert image.dtype == torch.uint8 and image.is_contiguous()
    assert {image.dtype for image in raw(stock)} == {torch.float32}
    assert {image.dtype for image in raw(processors(checkpoint, OPTIONS[1])[0])} == {torch.float32}


@pytest.mark.parametrize("value", [{"ratio": float("nan")}, {"ratio": 2}, {"ratios": 0.5}, "", 3, {"ratio": object()}])
def test_a_bad_reduction_is_refused_each_time(value: object) -> None:
    for _ in range(2):
        with pytest.raises(InvalidReduction):
            parse_reductions(value, 1)


def test_a_clients_image_that_looks_like_the_profile_runs_dummy_is_another_one(checkpoint: Path) -> None:
    """Caches would tell the model else that it is one."""
    ours, stock = processors(checkpoint, {})
    side = ours.info.get_image_size_with_most_features().width
    items = ours.info.parse_mm_data({"image": Image.new("RGB", (side, side), color=255)})
    dummy = ours.get_dummy_mm_inputs({"image": 1})
    image = ours(ours.info.get_tokenizer().encode("<image>"), items)
    assert torch.equal(*(sent["mm_kwargs"]["image"][0]["pixel_values"].data for sent in (dummy, image)))
    assert DUMMY_FIELD in dummy["mm_kwargs"]["image"][0] and DUMMY_FIELD not in image["mm_kwargs"]["image"][0]
    assert dummy["mm_hashes"]["image"] != image["mm_hashes"]["image"]
    assert len(dummy["mm_placeholders"]["image"]) == 1
    placeholders = [
        made["mm_placeholders"]["image"][0].length for made in (dummy, stock.get_dummy_mm_inputs({"image": 1}))
    ]
    assert placeholders[0] == placeholders[1]
