"""Metadata of images cost nothing, whatever they hold, and damaged metadata don't make an image unreadable."""

from __future__ import annotations

import io
import random
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from vllm.multimodal.media import ImageMediaIO

from foldserve.server.api.errors import FoldserveError, InvalidImage
from foldserve.server.api.media import jpeg, png, webp
from foldserve.server.api.media.decode import ImageFile
from foldserve.server.api.media.orientation import orientation
from tests.api.test_media_decode import SOUND, WIDE, decode, encode, png_chunk

JPEG, PNG, WEBP = SOUND["jpeg"], SOUND["png"], SOUND["webp-lossless-alpha"]
SCANS = b"\xff\xda" * 500
NOISE = random.Random(7).randbytes(3_000_000)


def pixels(content: bytes) -> Any:
    return np.asarray(decode(content).media)


def as_vllm(content: bytes) -> Any:
    return np.asarray(ImageMediaIO().load_bytes(content).media)


def segment(code: int, data: bytes) -> bytes:
    return bytes([0xFF, code]) + struct.pack(">H", len(data) + 2) + data


def mpo() -> bytes:
    other = WIDE.transpose(Image.Transpose.ROTATE_180)
    return encode(WIDE, "MPO", save_all=True, append_images=[other])


# 1. JPEG

JPEGS = {
    "video": JPEG + b"MotionPhoto_Data\0\0\0\x18ftypmp42" + NOISE,
    "video-of-scans": JPEG + SCANS,
    "gain-map": JPEG + SOUND["jpeg-progressive"] * 20,
    "thermal": JPEG[:2]
    + b"".join(segment(0xE3, NOISE[i : i + 65_000]) for i in range(0, 2_000_000, 65_000))
    + JPEG[2:],
    "scans-in-segments": JPEG[:2] + segment(0xEB, SCANS) + segment(0xFE, SCANS) + segment(0xE5, b"\xff\xd8") + JPEG[2:],
    "mpo": mpo(),
    "mpo-cut-behind-the-first": mpo()[:-500],
    "mpo-index-damaged": JPEG[:2] + segment(0xE2, b"MPF\0MM\0*" + b"\xff" * 40) + JPEG[2:],
    "icc-damaged": JPEG[:2] + segment(0xE2, b"ICC_PROFILE\0\x09\x01" + NOISE[:1000]) + JPEG[2:],
    "icc-empty": JPEG[:2] + segment(0xE2, b"ICC_PROFILE\0") + JPEG[2:],
    "photoshop-damaged": JPEG[:2] + segment(0xED, b"Photoshop 3.0\0008BIM") + JPEG[2:],
    "exif-damaged": JPEG[:2] + segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08" + NOISE[:60_000]) + JPEG[2:],
    "restarts": encode(WIDE, "JPEG", restart_marker_rows=1),
    "fill-bytes": JPEG.replace(b"\xff\xdb", b"\xff\xff\xff\xff\xdb"),
    "exif-in-many-pieces": JPEG[:2] + segment(0xE1, b"Exif\0\0x") * 90_000 + JPEG[2:],
}


@pytest.mark.parametrize("name", JPEGS)
def test_jpegs_with_anything_beside_the_image(name: str) -> None:
    assert np.array_equal(pixels(JPEGS[name]), pixels(JPEG))


def test_the_first_of_many_pictures_is_what_vllm_sees() -> None:
    assert np.array_equal(pixels(mpo()), as_vllm(mpo()))


COLOURS = {"cmyk": SOUND["jpeg-cmyk"], "rgb": encode(WIDE, "JPEG", keep_rgb=True), "grey": SOUND["jpeg-grey"]}


@pytest.mark.parametrize("name", COLOURS)
def test_segments_that_say_how_colours_are_stored_stay(name: str) -> None:
    content = COLOURS[name]
    padded = content[:2] + segment(0xE2, NOISE[:9000]) + content[2:]
    assert np.array_equal(pixels(padded), as_vllm(content))


SCAN = b"\xff\xda\0\x08\1\1\1\0\1\1"
PROGRESSIVE = SOUND["jpeg-progressive"][:-2]
BOMBS = {
    "plain": PROGRESSIVE + SCAN * 200,
    "then-a-video": PROGRESSIVE + SCAN * 200 + b"\xff\xd9" + NOISE,
    "with-fill-bytes": PROGRESSIVE + (b"\xff\xff" + SCAN) * 200,
    "with-comments": PROGRESSIVE + (segment(0xFE, b"\xff\xd9") + SCAN) * 200,
    "with-restarts": PROGRESSIVE + (b"\xff\xd0\xff\xd7" + SCAN) * 200,
    "with-data": PROGRESSIVE + (SCAN + b"\xff\0\x12" * 9) * 200,
    "behind-metadata": PROGRESSIVE[:2] + segment(0xE1, NOISE[:9000]) + PROGRESSIVE[2:] + SCAN * 200,
}


@pytest.mark.parametrize("name", BOMBS)
def test_scan_bombs(name: str) -> None:
    with pytest.raises(InvalidImage, match="more than 100 scans"):
        ImageFile.open(BOMBS[name])


JUNK = st.builds(segment, st.sampled_from([*range(0xE1, 0xEE), 0xEF, 0xFE]), st.binary(max_size=40))
SPICE = st.sampled_from([SCANS, b"\xff\xd9", b"\xff\xd8", b"\xff\xff\xda", b"\xff"])


@settings(deadline=None)
@given(
    st.lists(JUNK | st.builds(segment, st.just(0xEC), SPICE), max_size=8), st.binary(max_size=60) | SPICE, st.booleans()
)
def test_any_segments_and_anything_behind(segments: list[bytes], behind: bytes, progressive: bool) -> None:
    sound = SOUND["jpeg-progressive" if progressive else "jpeg"]
    content = sound[:2] + b"".join(segments) + sound[2:] + behind
    assert np.array_equal(pixels(content), pixels(sound))


# 2. PNG


def png_before(*chunks: bytes, content: bytes = PNG) -> bytes:
    return content[:33] + b"".join(chunks) + content[33:]


def png_behind(*chunks: bytes, content: bytes = PNG) -> bytes:
    return content[:-12] + b"".join(chunks) + content[-12:]


def bad_crc(kind: bytes, data: bytes) -> bytes:
    return png_chunk(kind, data)[:-1] + b"?"


BOMB = zlib.compress(bytes(1 << 27))
CHUNKS = {
    "itxt-bomb": png_chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB),
    "xmp-bomb": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB),
    "ztxt-bomb": png_chunk(b"zTXt", b"a\0\0" + BOMB),
    "exif-as-text-bomb": png_chunk(b"zTXt", b"Raw profile type exif\0\0" + BOMB),
    "icc-bomb": png_chunk(b"iCCP", b"a\0\0" + BOMB),
    "exif-of-3-mb": png_chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff" + NOISE),
    "text-of-3-mb": png_chunk(b"tEXt", b"a\0" + NOISE),
    "many-texts": png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000))) * 100,
    "unknown-compression": png_chunk(b"zTXt", b"a\0\7abc"),
    "icc-without-a-name": png_chunk(b"iCCP", b"abc"),
    "icc-unknown-compression": png_chunk(b"iCCP", b"a\0\7abc"),
    "gamma-cut": png_chunk(b"gAMA", b"\0"),
    "chroma-cut": png_chunk(b"cHRM", b"\0\0\0"),
    "srgb-empty": png_chunk(b"sRGB", b""),
    "resolution-cut": png_chunk(b"pHYs", b"\0\0"),
    "animation-cut": png_chunk(b"acTL", b"\0\0"),
    "frame-cut": png_chunk(b"fcTL", b"\0"),
    "frame-beyond-the-image": png_chunk(b"fcTL", struct.pack(">5L2H2B", 0, 9999, 9999, 0, 0, 1, 1, 0, 0)),
    "gamma-checksum": bad_crc(b"gAMA", b"\0\0\0\1"),
    "text-checksum": bad_crc(b"tEXt", b"a\0b"),
    "exif-checksum": bad_crc(b"eXIf", b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
    "transparency-checksum": bad_crc(b"tRNS", b"\0\1\0\2\0\3"),
    "transparency-of-another-type": png_chunk(b"tRNS", bytes(2)),
    "suggested-palette-checksum": bad_crc(b"PLTE", b"\0\0\0"),
    "private": png_chunk(b"prVt", NOISE[:100]),
    "no-ascii": png_chunk(b"\xe9\xe9\xe9\xe9", b""),
}


@pytest.mark.parametrize("where", [png_before, png_behind], ids=["before", "behind"])
@pytest.mark.parametrize("name", CHUNKS)
def test_pngs_with_damaged_or_enormous_chunks(name: str, where: Callable[..., bytes]) -> None:
    assert np.array_equal(pixels(where(CHUNKS[name])), pixels(PNG))


@pytest.mark.parametrize("end", [-4, -11, -12, -12 - len(CHUNKS["text-of-3-mb"]) + 20])
def test_a_png_that_is_cut_behind_its_pixels(end: int) -> None:
    assert np.array_equal(pixels(png_behind(CHUNKS["text-of-3-mb"])[:end]), pixels(PNG))


@pytest.mark.parametrize(
    "content",
    [
        PNG[:60] + bytes([PNG[60] ^ 0xFF]) + PNG[61:],
        PNG[:-30],
        png_before(content=PNG[:33] + PNG[-12:]),
        SOUND["png-palette"].replace(b"PLTE", b"PLTF"),
        SOUND["png-palette"][:45] + b"?" + SOUND["png-palette"][46:],
    ],
    ids=["pixels", "cut", "no-pixels", "no-palette", "palette"],
)
def test_pngs_with_damaged_pixels(content: bytes) -> None:
    with pytest.raises(InvalidImage, match="damaged"):
        decode(content)


# 3. WebP


def riff(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def webp_with(*chunks: bytes, first: bytes = b"", cut: int = 0) -> bytes:
    """Extended format with chunks before and behind the image."""
    flags = bytes([0x10 | 0x2C, 0, 0, 0])
    size = (WIDE.width - 1).to_bytes(3, "little") + (WIDE.height - 1).to_bytes(3, "little")
    body = b"WEBP" + riff(b"VP8X", flags + size) + first + WEBP[12:] + b"".join(chunks)
    return (b"RIFF" + struct.pack("<I", len(body)) + body)[: -cut or None]


WEBPS = {
    "sound": webp_with(riff(b"EXIF", b""), riff(b"XMP ", b"<x/>"), first=riff(b"ICCP", b"abc")),
    "announced-but-missing": webp_with(),
    "exif-of-3-mb": webp_with(riff(b"EXIF", NOISE)),
    "exif-damaged": webp_with(riff(b"EXIF", b"Exif\0\0MM\0*\xff\xff\xff\xff")),
    "exif-cut": webp_with(riff(b"EXIF", NOISE[:1000]), cut=500),
    "xmp-cut": webp_with(riff(b"EXIF", b""), riff(b"XMP ", NOISE[:1001]), cut=1),
    "icc-of-3-mb": webp_with(first=riff(b"ICCP", NOISE)),
    "unknown": webp_with(riff(b"abcd", NOISE[:77]), first=riff(b"efgh", b"")),
    "size-beyond-the-file": webp_with(b"EXIF\xff\xff\xff\x7f"),
}


@pytest.mark.parametrize("name", WEBPS)
def test_webps_with_damaged_or_enormous_chunks(name: str) -> None:
    assert np.array_equal(pixels(WEBPS[name]), pixels(WEBP))


# 4. Orientation


def exif_of(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    exif[0x010E] = "a description that does not fit into the entry"
    return exif.tobytes()


def xmp_of(value: int, form: str = 'tiff:Orientation="%d"') -> bytes:
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description {form % value}/></x:xmpmeta>'.encode()


def as_text(value: int, zipped: bool) -> bytes:
    exif = exif_of(value)
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(exif):8}\n{exif.hex()}\n", zip=zipped)
    return encode(WIDE, "PNG", pnginfo=info)


def as_xmp(value: int, zipped: bool) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp_of(value).decode(), zip=zipped)
    return encode(WIDE, "PNG", pnginfo=info)


BIG_ENDIAN = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0%c\0\0\0\0\0\0"
TURNED: dict[str, Callable[[int], bytes]] = {
    "jpeg-exif": lambda value: encode(WIDE, "JPEG", exif=exif_of(value)),
    "jpeg-xmp": lambda value: encode(WIDE, "JPEG", xmp=xmp_of(value)),
    "jpeg-xmp-element": lambda value: encode(
        WIDE, "JPEG", xmp=xmp_of(value, "<tiff:Orientation>%d</tiff:Orientation>")
    ),
    "jpeg-exif-wins": lambda value: encode(WIDE, "JPEG", exif=exif_of(value), xmp=xmp_of(3)),
    "jpeg-big-endian": lambda value: JPEG[:2] + segment(0xE1, BIG_ENDIAN % value) + JPEG[2:],
    "mpo": lambda value: encode(WIDE, "MPO", save_all=True, append_images=[WIDE], exif=exif_of(value)),
    "png": lambda value: encode(WIDE, "PNG", exif=exif_of(value)),
    "png-behind": lambda value: png_behind(png_chunk(b"eXIf", exif_of(value)[6:])),
    "png-text": lambda value: as_text(value, zipped=False),
    "png-zipped-text": lambda value: as_text(value, zipped=True),
    "png-xmp": lambda value: as_xmp(value, zipped=False),
    "png-zipped-xmp": lambda value: as_xmp(value, zipped=True),
    "webp": lambda value: encode(WIDE, "WEBP", lossless=True, exif=exif_of(value)),
    "webp-xmp": lambda value: encode(WIDE, "WEBP", lossless=True, xmp=xmp_of(value)),
}


@pytest.mark.parametrize("value", [1, 2, 3, 4, 5, 6, 7, 8, 0, 9])
@pytest.mark.parametrize("name", TURNED)
def test_images_are_upright_as_in_vllm(name: str, value: int) -> None:
    content = TURNED[name](value)
    assert np.array_equal(pixels(content), as_vllm(content))
    assert (decode(content).media.size == WIDE.size) == (value not in (5, 6, 7, 8))


TEXT_TAGS, NUMBER_TAGS = (0x010E, 0x010F, 0x0110, 0x0131, 0x013B), (0x0103, 0x0106, 0x0128, 0x0213)


@given(
    value=st.integers(0, 12),
    texts=st.dictionaries(st.sampled_from(TEXT_TAGS), st.text("ab", max_size=20)),
    numbers=st.dictionaries(st.sampled_from(NUMBER_TAGS), st.integers(0, 65_535)),
    has_it=st.booleans(),
)
def test_orientation_is_read_as_pillow_does(
    value: int, texts: dict[int, str], numbers: dict[int, int], has_it: bool
) -> None:
    exif = Image.Exif()
    for tag, content in (texts | numbers).items():
        exif[tag] = content
    if has_it:
        exif[0x0112] = value
    data = exif.tobytes()
    reread = Image.Exif()
    reread.load(data)
    read = reread.get(0x0112, 1)
    assert orientation(data, b"") == (read if 1 <= read <= 8 else 1)


@given(st.binary(max_size=80) | st.binary(max_size=80).map(lambda data: b"Exif\0\0II*\0\x08\0\0\0" + data))
def test_any_bytes_are_an_orientation(data: bytes) -> None:
    assert 1 <= orientation(data, data) <= 8


# 5. Time

HOSTILE: dict[str, tuple[Callable[[bytes], object], bytes, bytes]] = {
    "jpeg-fill-bytes": (jpeg.strip_metadata, b"\xff\xd8\xff", b"\xff"),
    "jpeg-escaped": (jpeg.strip_metadata, b"\xff\xd8\xff\xda\0\x08", b"\xff\0"),
    "jpeg-fill-and-escaped": (jpeg.strip_metadata, b"\xff\xd8\xff\xda\0\x08", b"\xff" * 63 + b"\0"),
    "jpeg-restarts": (jpeg.strip_metadata, b"\xff\xd8\xff\xda\0\x08", b"\xff\xd0"),
    "jpeg-comments": (jpeg.strip_metadata, b"\xff\xd8", segment(0xFE, b"x" * 300)),
    "jpeg-exif": (jpeg.strip_metadata, b"\xff\xd8", segment(0xE1, b"Exif\0\0" + b"x" * 300)),
    "png-texts": (png.strip_metadata, PNG[:33], png_chunk(b"tEXt", b"x" * 300)),
    "png-exif": (png.strip_metadata, PNG[:33], png_chunk(b"eXIf", b"x" * 300)),
    "png-zipped-exif": (png.strip_metadata, PNG[:33], png_chunk(b"zTXt", b"Raw profile type exif\0\0" + BOMB[:300])),
    "png-pixels": (png.strip_metadata, PNG[:33], png_chunk(b"IDAT", b"x" * 300)),
    "webp-chunks": (webp.strip_metadata, webp_with()[:30], riff(b"abcd", b"x" * 300)),
    "webp-xmp": (webp.strip_metadata, webp_with()[:30], riff(b"XMP ", b"tiff:Orientation" * 20)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_time_grows_no_faster_than_the_file(name: str) -> None:
    read, start, piece = HOSTILE[name]

    def seconds(size: int) -> float:
        content = start + piece * (size // len(piece))
        best = float("inf")
        for _ in range(3):
            began = time.thread_time()
            read(content)
            best = min(best, time.thread_time() - began)
        return best

    assert seconds(4_000_000) < 6 * seconds(1_000_000) + 0.01


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xd8" + segment(0xFE, b"") * 200_000 + JPEG[2:],
        png_before(png_chunk(b"tEXt", b"") * 200_000),
        webp_with(riff(b"abcd", b"") * 200_000),
    ],
    ids=["jpeg", "png", "webp"],
)
def test_files_of_too_many_parts(content: bytes) -> None:
    with pytest.raises(InvalidImage, match="more than 100000 parts"):
        ImageFile.open(content)


@settings(deadline=None)
@given(st.sampled_from([JPEG[:20], PNG[:33], PNG, WEBP, webp_with()]), st.binary(max_size=60), st.integers(0, 40))
def test_any_damage_gives_an_image_or_our_error(start: bytes, middle: bytes, keep: int) -> None:
    content = start[: len(start) - keep] + middle + PNG[33:]
    try:
        decode(content)
    except FoldserveError as error:
        assert str(error)


def test_pillow_gets_no_metadata() -> None:
    everything = [JPEGS["exif-damaged"], png_before(*CHUNKS.values()), WEBPS["sound"], TURNED["png-xmp"](6)]
    for content in everything:
        info = Image.open(io.BytesIO(ImageFile.open(content).stripped.content)).info
        assert not {"exif", "xmp", "icc_profile", "XML:com.adobe.xmp"} & set(info)
