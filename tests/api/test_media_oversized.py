"""Images above the limits: refused, or scaled down within what a request may hold in memory."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from prometheus_client import REGISTRY

from foldserve.server.api.errors import LimitExceeded
from foldserve.server.api.media.budget import MediaBudget
from foldserve.server.api.media.decode import ImageFile
from foldserve.server.limits import Limits
from tests.api.test_media_decode import encode, solid_png
from tests.images import photo

SMALL = Limits(oversized="scale", max_image_megapixels=0.1, max_media_megapixels=0.3, max_image_side=400)


def decode(content: bytes, limits: Limits = SMALL) -> Any:
    return MediaBudget(limits).admit(ImageFile.open(content)).decode()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("size", [(480, 320), (320, 480), (800, 40), (300, 301), (401, 240)], ids=str)
def test_scaled_to_the_limits(format: str, size: tuple[int, int]) -> None:
    image = decode(encode(photo(2).resize(size), format)).media
    assert image.mode == "RGB"
    assert max(image.size) <= 400 and image.width * image.height <= 100_000
    assert abs(image.width / image.height - size[0] / size[1]) < 0.05 * size[0] / size[1]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_it_is_the_same_picture(format: str) -> None:
    """Beside what Pillow makes of the whole one; a JPEG came at half its size."""
    content = encode(photo(2, 480, 320), format)
    scaled = decode(content).media
    whole = ImageFile.open(content).decode().media.resize(scaled.size, Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(scaled, int) - np.asarray(whole, int)).mean() < 4


@pytest.mark.parametrize("size", [(400, 250), (250, 400), (8, 8)], ids=str)
def test_what_fits_is_left_alone(size: tuple[int, int]) -> None:
    content = encode(photo(2, 400, 250).resize(size), "PNG")
    scaled, refused = decode(content), decode(content, Limits())
    assert np.array_equal(np.asarray(scaled.media), np.asarray(refused.media))
    assert scaled.io_config == refused.io_config


def test_a_scaled_image_has_another_identity() -> None:
    content = encode(photo(2, 480, 320), "PNG")
    assert decode(content).io_config != decode(content, Limits()).io_config


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_it_is_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in ("JPEG", "PNG"):
        image = decode(encode(photo(2, 800, 200), format, exif=exif)).media
        assert (image.width > image.height) == (orientation < 5)
        assert max(image.size) <= 400


def test_a_large_jpeg_is_never_held_whole() -> None:
    file = MediaBudget(SMALL).admit(ImageFile.open(encode(photo(2, 1600, 1200), "JPEG")))
    assert file.decoded_pixels == file.image.size[0] * file.image.size[1] == 200 * 150
    assert file.decode().media.size == (200, 150)


LARGE = {
    "png": solid_png(800, 400),
    "png-bomb": solid_png(13_000, 13_000),
    "png-beyond-pillow": solid_png(20_000, 20_000),
    "progressive": encode(photo(2, 1600, 1200), "JPEG", progressive=True),
    "webp": encode(photo(2, 1600, 1200), "WEBP"),
    "gif": encode(photo(2, 1600, 1200), "GIF"),
}


@pytest.mark.parametrize("name", LARGE)
def test_what_must_be_held_whole_is_refused_beyond_a_requests_bound(name: str) -> None:
    with pytest.raises(LimitExceeded, match="too many pixels"):
        decode(LARGE[name])


def test_a_jpeg_beyond_what_pillow_finds_safe() -> None:
    content = encode(photo(2, 64, 64), "JPEG")
    start = content.index(b"\xff\xc0") + 5
    with pytest.raises(LimitExceeded, match="too many pixels"):
        decode(content[:start] + b"\xff\xff\xff\xff" + content[start + 4 :])


@pytest.mark.parametrize(("size", "message"), [((4, 900), "8 pixels or more"), ((2000, 30), "50 times")], ids=str)
def test_shapes_stay_refused(size: tuple[int, int], message: str) -> None:
    with pytest.raises(LimitExceeded, match=message):
        decode(encode(photo(2, 400, 400).resize(size), "PNG"))


def test_a_side_that_would_get_too_short() -> None:
    limits = Limits(oversized="scale", max_image_side=100)
    with pytest.raises(LimitExceeded, match="too long to be scaled down"):
        decode(encode(photo(2, 900, 60).resize((900, 60)), "PNG"), limits)


def test_all_images_of_a_request_share_one_bound() -> None:
    budget = MediaBudget(SMALL)
    content = encode(photo(2, 520, 300), "PNG")
    budget.admit(ImageFile.open(content))
    with pytest.raises(LimitExceeded, match="together"):
        budget.admit(ImageFile.open(content))


def test_refused_by_default() -> None:
    with pytest.raises(LimitExceeded, match=r"more than 0\.1 megapixels"):
        decode(encode(photo(2, 480, 320), "JPEG"), Limits(max_image_megapixels=0.1))


def test_it_is_told(caplog: pytest.LogCaptureFixture) -> None:
    logger = "foldserve.server.api.media.budget"
    before = REGISTRY.get_sample_value("foldserve_images_scaled_total") or 0
    with caplog.at_level(logging.INFO, logger=logger):
        decode(encode(photo(2, 480, 320), "PNG"))
    assert caplog.record_tuples == [(logger, logging.INFO, "an image of 480x320 is scaled down to 387x258")]
    assert REGISTRY.get_sample_value("foldserve_images_scaled_total") == before + 1


@settings(deadline=None)
@given(
    st.integers(8, 900),
    st.integers(8, 900),
    st.sampled_from(["JPEG", "PNG"]),
    st.booleans(),
)
def test_any_size_fits_or_is_refused(width: int, height: int, format: str, progressive: bool) -> None:
    options = {"progressive": progressive} if format == "JPEG" else {}
    content = encode(Image.new("RGB", (width, height), (9, 99, 199)), format, **options)
    budget = MediaBudget(SMALL)
    try:
        image = budget.admit(ImageFile.open(content)).decode().media
    except LimitExceeded:
        assert max(width, height) > 50 * min(width, height) or width * height > 300_000
        return
    assert max(image.size) <= 400 and image.width * image.height <= 100_000
    assert budget.pixels_used <= 300_000
