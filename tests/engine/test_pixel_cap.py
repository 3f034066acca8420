"""The pixel cap of `ratio: "auto"` in the processor: images' pixels settle their counts before all else is planned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.cache import MultiModalProcessorOnlyCache

from foldserve.reducers.ladder import STEPS, PixelCap, StepBounds
from foldserve.reducers.plan import InvalidReduction
from foldserve.server.engine.processor import SETTLED
from tests import qwen_checkpoint
from tests.images import page, photo
from tests.reducers.naive import naive_pixelprune

LADDER = tuple(range(1, STEPS + 1))
STEP_BOUNDS = StepBounds(LADDER, LADDER[3:])
CAP = PixelCap(2, 13, STEP_BOUNDS)
ASKED = {"ratio": 0.75}
"""As the server sends it: with the fewest tokens that an image can get."""


class Processor:
    """A checkpoint's, with images whose pixels are the tower's.

    Attributes:
        side: pixels of a cell.
        size: of its images.
    """

    def __init__(self, checkpoint: Path, prompt: str, side: int, size: tuple[int, int], **options: Any) -> None:
        config = EngineArgs(str(checkpoint), dtype="float32", **options).create_model_config()
        self.made: Any = MULTIMODAL_REGISTRY.create_processor(config)
        self.prompt, self.side, self.size = prompt, side, size

    @property
    def tokens(self) -> int:
        return self.size[0] * self.size[1] // self.side**2

    def page(self, seed: int) -> Image.Image:
        return page(seed, *self.size, noise=1)

    def photo(self, seed: int) -> Image.Image:
        return photo(seed, *self.size)

    def cells(self, image: Image.Image, levels: int) -> int:
        """That its pixels do not predict."""
        rows, columns, _ = (np.asarray(image).shape[i] // self.side for i in (0, 1, 2))
        cut = np.asarray(image).reshape(rows, self.side, columns, self.side, 3).swapaxes(1, 2)
        return len(naive_pixelprune(cut.reshape(rows, columns, -1).tolist(), levels, anchored=False))

    def inputs(self, images: Sequence[Any], caps: Sequence[PixelCap] | None, asked: Any = ASKED, **more: Any) -> Any:
        """What the processor gives."""
        items = self.made.info.parse_mm_data({"image": [*images]}, validate=False)
        prompt = self.made.info.get_tokenizer().encode(self.prompt * len(images))
        uuids = {"image": more.pop("uuids", [None] * len(images))}
        kwargs = {"foldserve": asked} | ({} if caps is None else {"foldserve_caps": caps})
        return self.made(prompt, items, uuids, hf_processor_mm_kwargs=kwargs, **more)

    def __call__(self, *args: Any, **more: Any) -> tuple[list[int], list[str], Any]:
        """Placeholders and identities of the images, and what they settled to."""
        inputs = self.inputs(*args, **more)
        kept = [place.get_num_embeds() for place in inputs["mm_placeholders"]["image"]]
        for item, count in zip(inputs["mm_kwargs"]["image"], kept, strict=True):
            assert self.made._family.read_plan(item["image_plan"].data.tolist()).kept == count  # the engine's plan
        return kept, inputs["mm_hashes"]["image"], inputs[SETTLED]


def qwen(model_type: str, side: int) -> Callable[[Path, Path], Processor]:
    def make(tiny_llava: Path, folder: Path) -> Processor:
        checkpoint = qwen_checkpoint.write(folder / model_type, model_type)
        return Processor(checkpoint, qwen_checkpoint.IMAGE, side, (8 * side, 5 * side))

    return make


def llava(tiny_llava: Path, folder: Path) -> Processor:
    return Processor(tiny_llava, "<image>", SIDE, (12 * SIDE, 12 * SIDE))


SIDE = 14
MADE = {"llava": llava, "qwen2_vl": qwen("qwen2_vl", 28), "qwen3_vl": qwen("qwen3_vl", 32)}


@pytest.fixture(scope="module", params=MADE)
def processor(request: pytest.FixtureRequest, tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return MADE[request.param](tiny_llava, tmp_path_factory.mktemp("capped"))


def sixteenths(tokens: int, step: int) -> int:
    return -(-tokens * step // STEPS)


def test_a_page_gets_what_its_pixels_do_not_predict_and_a_photo_what_its_group_needs(processor: Processor) -> None:
    images = [processor.page(1), processor.photo(2)]
    kept, _, settled = processor(images, [CAP, CAP])
    tokens = processor.tokens
    counts = [processor.cells(image, 2) for image in images]
    assert [one.unpredicted for one in settled] == counts and counts[1] == tokens
    capped = next(step for step in LADDER if sixteenths(tokens, step) >= counts[0])
    assert 4 < capped < 13, "else the image shows nothing"
    assert kept == [sixteenths(tokens, capped), sixteenths(tokens, 13)]


def test_levels_decide(processor: Processor) -> None:
    image = processor.page(1)
    kept = {
        levels: processor([image], [PixelCap(levels, 16, StepBounds(LADDER, LADDER))])[0][0] for levels in (0, 2, 255)
    }
    assert kept[0] == processor.tokens > kept[2] > kept[255] == max(2, sixteenths(processor.tokens, 1))


def test_one_count_is_one_identity(processor: Processor) -> None:
    """Whatever led to it: embeddings and KV blocks are the same. Another count is another image to every cache."""
    image = processor.page(1)
    _, names, ((step, _, _),) = processor([image], [CAP])
    ratio = (STEPS - step) / STEPS
    assert processor([image], None, {"ratio": ratio})[1] == names
    assert processor([image], [PixelCap(2, 14, STEP_BOUNDS)])[1] == names
    others = [processor([image], [cap])[1] for cap in (PixelCap(0, 13, STEP_BOUNDS), PixelCap(255, 13, STEP_BOUNDS))]
    others += [processor([image], None, {"ratio": 3 / 16})[1], processor([processor.page(2)], [CAP])[1]]
    assert names not in others and others[0] == others[2]
    whole = processor([image], [PixelCap(0, 16, STEP_BOUNDS)])
    assert whole == ([processor.tokens], processor([image], None, {})[1], whole[2])


def test_images_are_processed_once_and_what_their_pixels_say_is_remembered(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    stock = type(processor.made)._apply_stock

    def watched(self: Any, mm_items: Any, hf_kwargs: Any) -> Any:
        if mm_items and mm_items.get_all_counts().get("image"):
            batches.append(mm_items.get_count("image"))
        return stock(self, mm_items, hf_kwargs)

    monkeypatch.setattr(type(processor.made), "_apply_stock", watched)
    images, uuids = [processor.page(3), processor.photo(4)], ["a", "b"]
    cache = MultiModalProcessorOnlyCache(processor.made.info.ctx.model_config)
    kept, names, settled = processor(images, [CAP, CAP], uuids=uuids, cache=cache)
    assert batches == [2]
    assert processor(images, [CAP, CAP], uuids=uuids, cache=cache) == (kept, names, settled)
    assert processor([None, None], [CAP, CAP], uuids=uuids, cache=cache) == (kept, names, settled)
    assert batches == [2]
    with pytest.raises(InvalidReduction, match="send the image with its uuid"):
        processor([None], [PixelCap(3, 13, STEP_BOUNDS)], uuids=["a"], cache=cache)


def test_a_smaller_image_is_looked_at_as_it_came(processor: Processor) -> None:
    """`downsample` may make it smaller before it is processed: its cells are those of the whole."""
    image, asked = processor.page(1), {"method": "downsample"}
    capped = processor.inputs([image], [CAP], asked | {"ratio": 0.75})
    (settled,) = capped[SETTLED]
    _, _, (folded,) = processor([image], [CAP])
    assert settled == folded
    plain = processor.inputs([image], None, asked | {"ratio": (STEPS - settled.step) / STEPS})
    assert capped["mm_hashes"] == plain["mm_hashes"]
    sent, expected = (made["mm_kwargs"]["image"][0]["pixel_values"].data for made in (capped, plain))
    assert sent.shape == expected.shape and (sent == expected).all()


def test_bytes_are_needed(tiny_llava: Path) -> None:
    options = {"mm_processor_kwargs": {"do_normalize": False}}
    processor = Processor(tiny_llava, "<image>", SIDE, (12 * SIDE, 12 * SIDE), **options)
    with pytest.raises(InvalidReduction, match="a pixel cap, which compares bytes") as refusal:
        processor([processor.page(1)], [CAP])
    assert refusal.value.param == "ratio"


def test_embeddings_are_refused(tiny_llava: Path) -> None:
    import torch

    processor = Processor(tiny_llava, "<image>", SIDE, (12 * SIDE, 12 * SIDE), enable_mm_embeds=True)
    hidden = processor.made.info.ctx.model_config.get_hidden_size()
    with pytest.raises(InvalidReduction, match="not embeddings"):
        processor([torch.zeros(144, hidden)], [CAP])
