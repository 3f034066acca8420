"""The decode guard: ordinary images as vLLM decodes them, hostile ones refused, and never anything else."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin
from vllm.multimodal.media import ImageMediaIO

from foldserve.server.api.errors import FoldserveError, InvalidImage, LimitExceeded
from foldserve.server.api.media.budget import MediaBudget
from foldserve.server.api.media.decode import ImageFile
from foldserve.server.limits import Limits
from tests.images import photo

WIDE = photo(1, 72, 48)


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decode(content: bytes, limits: Limits | None = None) -> Any:
    file = ImageFile.open(content)
    MediaBudget(limits or Limits()).spend_pixels(*file.image.size)
    return file.decode()


def data(content: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(kind: bytes, data: bytes) -> bytes:
    """A small PNG with one more chunk after its header."""
    png = encode(WIDE, "PNG")
    return png[:33] + png_chunk(kind, data) + png[33:]


def frames(count: int, format: str) -> bytes:
    colours = [Image.new("P" if format == "GIF" else "RGB", (16, 16), 0) for _ in range(2)]
    colours[1].putpixel((3, 3), 5 if format == "GIF" else (9, 9, 9))
    many = [colours[i % 2] for i in range(count)]
    return encode(many[0], format, save_all=True, append_images=many[1:])


EXIF_ROTATED = Image.Exif()
EXIF_ROTATED[0x0112] = 6
SOUND = {
    "jpeg": encode(WIDE, "JPEG"),
    "jpeg-progressive": encode(WIDE, "JPEG", progressive=True),
    "jpeg-cmyk": encode(WIDE.convert("CMYK"), "JPEG"),
    "jpeg-grey": encode(WIDE.convert("L"), "JPEG"),
    "jpeg-exif": encode(WIDE, "JPEG", exif=EXIF_ROTATED),
    "jpeg-broken-exif": encode(WIDE, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 40),
    "png": encode(WIDE, "PNG"),
    "png-alpha": encode(WIDE.convert("RGBA"), "PNG"),
    "png-grey-alpha": encode(WIDE.convert("LA"), "PNG"),
    "png-palette": encode(WIDE.convert("P"), "PNG"),
    "png-palette-alpha": encode(WIDE.quantize(16), "PNG", transparency=bytes(range(0, 256, 16))),
    "png-bits": encode(WIDE.convert("1"), "PNG"),
    "png-text": encode(WIDE, "PNG", pnginfo=PngImagePlugin.PngInfo()),
    "webp": encode(WIDE, "WEBP"),
    "webp-lossless-alpha": encode(WIDE.convert("RGBA"), "WEBP", lossless=True),
    "gif": encode(WIDE, "GIF"),
    "gif-frames": frames(5, "GIF"),
    "apng": frames(5, "PNG"),
    "webp-frames": frames(5, "WEBP"),
    "polyglot": encode(WIDE, "JPEG") + b"PK\x03\x04 a zip, a page: <html><script>",
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")  # what the file is for
@pytest.mark.parametrize("name", SOUND)
def test_same_pixels_and_identity_as_vllm(name: str) -> None:
    ours, theirs = decode(SOUND[name]), ImageMediaIO().load_bytes(SOUND[name])
    assert ours.media.mode == "RGB"
    assert np.array_equal(np.asarray(ours.media), np.asarray(theirs.media))
    assert (ours.original_bytes, ours.io_config) == (theirs.original_bytes, theirs.io_config)


def test_orientation_is_applied() -> None:
    assert decode(SOUND["jpeg-exif"]).media.size == (48, 72)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(SOUND["jpeg-exif"])))
    assert np.array_equal(np.asarray(decode(SOUND["jpeg-exif"]).media), np.asarray(upright))


def test_sixteen_bits_keep_their_shades() -> None:
    """Pillow's conversion turns all but the darkest 256 of 65,536 shades white."""
    shades = np.arange(0, 1 << 16, 16, dtype=np.uint16).reshape(64, 64)
    pixels = np.asarray(decode(encode(Image.fromarray(shades), "PNG")).media)
    assert np.array_equal(pixels, np.repeat((shades >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_first_frame_of_many() -> None:
    for format in ("GIF", "PNG"):
        assert decode(frames(10_000, format)).media.getpixel((3, 3)) == (0, 0, 0)


REFUSED: dict[str, bytes] = {
    "empty": b"",
    "zeros": bytes(1000),
    "text": b"hello",
    "svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
    "html": b"<html></html>",
    "tiff": encode(WIDE, "TIFF"),
    "tiff-loop": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "bmp": encode(WIDE, "BMP"),
    "ico": encode(WIDE, "ICO"),
    "pdf": encode(WIDE, "PDF"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "jpeg-truncated": SOUND["jpeg"][: len(SOUND["jpeg"]) // 2],
    "jpeg-header-only": SOUND["jpeg"][:100],
    "png-truncated": SOUND["png"][: len(SOUND["png"]) // 2],
    "png-header-only": SOUND["png"][:33],
    "webp-truncated": SOUND["webp"][: len(SOUND["webp"]) // 2],
    "gif-truncated": SOUND["gif"][: len(SOUND["gif"]) // 2],
    "png-transparency-cut": png_with(b"tRNS", b"")[:70],
    "jpeg-scan-bomb": SOUND["jpeg-progressive"][:-2] + b"\xff\xda\0\x08\1\1\1\0\1\1" * 5000 + b"\xff\xd9",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_files(name: str) -> None:
    with pytest.raises(InvalidImage) as refusal:
        decode(REFUSED[name])
    assert not any(word in str(refusal.value).lower() for word in ("pil", "0x", "chunk", "bytesio", "buffer"))


def solid_png(width: int, height: int) -> bytes:
    """One colour: a file a thousandth the size of its pixels."""
    data = zlib.compress(bytes(min((1 + width) * height, 1 << 20)))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((1, 1), "8 pixels or more"),
        ((7, 300), "8 pixels or more"),
        ((1, 20_000), "8 pixels or more"),
        ((20_000, 1), "8 pixels or more"),
        ((20_000, 400), "16384 pixels at most"),
        ((16_000, 100), "50 times"),
        ((8_000, 8_000), "40 megapixels"),
        ((13_000, 13_000), "too many pixels"),
        ((20_000, 20_000), "too many pixels"),
        ((2**31 - 1, 2**31 - 1), "too many pixels"),
    ],
    ids=str,
)
def test_sizes_are_refused_from_the_header(size: tuple[int, int], message: str) -> None:
    with pytest.raises(LimitExceeded, match=message):
        decode(solid_png(*size))


def test_webp_canvas_of_a_terabyte() -> None:
    """The header promises 2^24 x 2^8 pixels, in a file of 60 bytes."""
    head = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + (2**24 - 1).to_bytes(3, "little") + b"\xff\0\0"
    body = b"WEBP" + head + SOUND["webp"][12:]
    with pytest.raises(FoldserveError):
        decode(b"RIFF" + struct.pack("<I", len(body)) + body)


def test_pixels_of_all_images_together() -> None:
    budget = MediaBudget(Limits(max_image_megapixels=1, max_media_megapixels=2.5))
    budget.spend_pixels(1000, 1000)
    budget.spend_pixels(1000, 1000)
    with pytest.raises(LimitExceeded, match=r"more than 2\.5 megapixels together"):
        budget.spend_pixels(1000, 1000)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A sound file cut, overwritten, doubled or with bytes put in, or noise behind a sound file's first bytes."""
    content = bytearray(SOUND[draw(st.sampled_from(sorted(SOUND)))])
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(content)))
        piece = draw(st.binary(max_size=12))
        match draw(st.integers(0, 3)):
            case 0:
                del content[at:]
            case 1:
                content[at : at + len(piece)] = piece
            case 2:
                content[at:at] = piece
            case _:
                content[at:at] = content[: draw(st.integers(0, 64))]
    return bytes(content)


@pytest.mark.filterwarnings("ignore:(Corrupt EXIF data|Truncated File Read|Metadata Warning):UserWarning")
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(damaged() | st.binary(max_size=200))
def test_damage_gives_an_image_or_our_error(content: bytes) -> None:
    try:
        image = decode(content)
    except FoldserveError as error:
        assert isinstance(error, InvalidImage | LimitExceeded)
    else:
        assert image.media.mode == "RGB"
