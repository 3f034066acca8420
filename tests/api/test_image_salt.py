"""The sender's salt is part of the identity by which all caches know an image or a video, and changes nothing else."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.media.image import ImageMediaIO
from vllm.multimodal.parse import MultiModalDataParser

from foldserve.server.api.media.connector import LoadedMedia
from foldserve.server.api.media.guard import MediaGuard
from foldserve.server.limits import Limits
from tests.images import jpeg, photo
from tests.videos import data_uri as video_uri
from tests.videos import video


def _png() -> bytes:
    """Its transparency is a setting that its identity holds already."""
    buffer = io.BytesIO()
    Image.new("RGBA", (40, 30), (200, 30, 30, 128)).save(buffer, "PNG")
    return buffer.getvalue()


FILES = {"jpeg": jpeg(photo(5)), "transparent png": _png()}
REDUCTIONS: dict[str, Any] = {
    "as it is": None,
    "reduced": {"ratio": 0.5},
    "seeded": {"method": "random", "ratio": 0.5},
    "marked twice": {"ratio": 0.5, "positions": "keep", "withdraw": True},
}


@pytest.fixture(scope="module")
def processor(tiny_llava: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    return MULTIMODAL_REGISTRY.create_processor(
        EngineArgs(model=str(tiny_llava), dtype="float32").create_model_config()
    )


def prepared(processor: Any, images: Sequence[Any], reduction: Any) -> Any:
    """What goes to the engine."""
    items = processor.info.parse_mm_data({"image": list(images)})
    prompt = processor.info.get_tokenizer().encode(" ".join(["<image>"] * len(images)))
    return processor(prompt, items, hf_processor_mm_kwargs={} if reduction is None else {"foldserve": reduction})


def sent(processor: Any, file: bytes, salt: str | None, reduction: Any) -> Any:
    """The same for a file in a chat of somebody with that salt."""

    async def run() -> Any:
        url = "data:image/any;base64," + base64.b64encode(file).decode()
        part = {"type": "image_url", "image_url": {"url": url}}
        message = {"role": "user", "content": [part]}
        async with MediaGuard(Limits()).loaded([message], "somebody", salt):
            return prepared(processor, [message["content"][0]["image_pil"]], reduction)  # type: ignore[index]

    return asyncio.run(run())


@pytest.mark.parametrize("reduction", REDUCTIONS.values(), ids=REDUCTIONS)
@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_only_the_identity_has_the_salt(processor: Any, file: bytes, reduction: Any) -> None:
    stock = prepared(processor, [ImageMediaIO().load_bytes(file)], reduction)
    unsalted, alice, again, bob = (sent(processor, file, salt, reduction) for salt in (None, "a", "a", "b"))
    assert unsalted["mm_hashes"] == stock["mm_hashes"]
    assert alice["mm_hashes"] == again["mm_hashes"]
    identities = [inputs["mm_hashes"]["image"][0] for inputs in (unsalted, alice, bob)]
    assert len(set(identities)) == 3
    assert len({identity[64:] for identity in identities}) == 1, "marks stay at the end"
    for inputs in (alice, bob):
        assert inputs["prompt_token_ids"] == stock["prompt_token_ids"]
        fields, expected = (dict(one["mm_kwargs"]["image"][0].get_data()) for one in (inputs, stock))
        assert fields.keys() == expected.keys()
        assert all(torch.equal(fields[name], expected[name]) for name in fields)


def test_a_video_has_the_salt_in_its_identity() -> None:
    """The frames' own bytes are not hashed: the same file of two keys would be one then."""

    async def identity(salt: str | None, frames: int = 4) -> str:
        part = {"type": "video_url", "video_url": {"url": video_uri(video(8))}}
        guard = MediaGuard(Limits(video_frames=frames))
        content: list[Any] = [part]
        async with guard.loaded([message := {"role": "user", "content": content}], None, salt):
            url = message["content"][0]["video_url"]["url"]
            loaded = await LoadedMedia().fetch_video_async(url)
            (items,) = MultiModalDataParser().parse_mm_data({"video": [loaded]}).values()
            return MultiModalHasher.hash_kwargs("blake3", video=items.get_item_for_hash(0))

    async def all_of_them() -> list[str]:
        return [await identity(*each) for each in ((None,), ("a",), ("b",), ("a",), ("a", 5))]

    plain, a, b, again, more_frames = asyncio.run(all_of_them())
    assert len({plain, a, b, more_frames}) == 4 and again == a
