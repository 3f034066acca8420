"""Transparent images on white, in every form that PNG has for it; expected values are computed from the samples."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.api.test_media_decode import decode, png_chunk

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
SIDE = 16
RANDOM = np.random.default_rng(5)


def png(samples: Any, depth: int, colour: int, *chunks: bytes) -> bytes:
    """A PNG of (H, W, channels) samples."""
    height, width, _ = samples.shape
    if depth == 16:
        rows = samples.astype(">u2").reshape(height, -1).view(np.uint8)
    elif depth == 8:
        rows = samples.astype(np.uint8).reshape(height, -1)
    else:
        bits = np.unpackbits(samples.astype(np.uint8).reshape(height, -1, 1), axis=2)[..., 8 - depth :]
        rows = np.packbits(bits.reshape(height, -1), axis=1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pieces = [png_chunk(b"IHDR", head), *chunks, png_chunk(b"IDAT", zlib.compress(data)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


def samples(depth: int, channels: int, shades: int = 1 << 16) -> Any:
    return RANDOM.integers(0, min(1 << depth, shades), (SIDE, SIDE, channels))


def eight_bits(values: Any, depth: int) -> Any:
    return values >> 8 if depth == 16 else values * 255 // ((1 << depth) - 1)


def on_white(rgb: Any, alpha: Any) -> Any:
    return np.where(alpha, rgb, 255).astype(np.uint8)


def assert_pixels(content: bytes, expected: Any) -> None:
    pixels = np.asarray(decode(content).media)
    assert pixels.shape == (SIDE, SIDE, 3)
    assert np.array_equal(pixels, np.broadcast_to(expected, pixels.shape))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_with_a_key(depth: int) -> None:
    grey = samples(depth, 1)
    for key in {0, int(grey[3, 3, 0]), (1 << depth) - 1}:
        content = png(grey, depth, GREY, png_chunk(b"tRNS", struct.pack(">H", key)))
        assert_pixels(content, on_white(eight_bits(grey, depth), grey != key))


@pytest.mark.parametrize("depth", [8, 16])
def test_colours_with_a_key(depth: int) -> None:
    """Of 16 bits Pillow keeps eight, so the samples differ in these."""
    rgb = samples(depth, 3, 256) << (depth - 8)
    key = rgb[3, 3]
    content = png(rgb, depth, RGB, png_chunk(b"tRNS", struct.pack(">3H", *key)))
    assert_pixels(content, on_white(eight_bits(rgb, depth), (rgb != key).any(axis=2, keepdims=True)))


@given(st.integers(0, 3), st.tuples(*[st.integers(0, 3)] * 3))
@settings(deadline=None)
def test_a_key_is_one_colour_exactly(seed: int, key: tuple[int, int, int]) -> None:
    rgb = np.random.default_rng(seed).integers(0, 4, (SIDE, SIDE, 3))
    content = png(rgb, 8, RGB, png_chunk(b"tRNS", struct.pack(">3H", *key)))
    assert_pixels(content, on_white(rgb, (rgb != key).any(axis=2, keepdims=True)))


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("alphas", [b"\0", b"\xff\0", b"\0\xff", b"\0\0"], ids=bytes.hex)
def test_palette(depth: int, alphas: bytes) -> None:
    index = samples(depth, 1)
    palette = RANDOM.integers(0, 256, (1 << depth, 3), np.uint8)
    content = png(index, depth, PALETTE, png_chunk(b"PLTE", palette.tobytes()), png_chunk(b"tRNS", alphas))
    alpha = np.frombuffer(alphas.ljust(1 << depth, b"\xff"), np.uint8)
    assert_pixels(content, on_white(palette[index[..., 0]], alpha[index]))


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("colour", [GREY_ALPHA, RGBA])
def test_alpha_channel(depth: int, colour: int) -> None:
    channels = 2 if colour == GREY_ALPHA else 4
    values = samples(depth, channels)
    values[..., -1] = RANDOM.integers(0, 2, (SIDE, SIDE)) * ((1 << depth) - 1)
    assert_pixels(png(values, depth, colour), on_white(eight_bits(values[..., :-1], depth), values[..., -1:]))


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("colour", [GREY, RGB])
def test_no_transparency(depth: int, colour: int) -> None:
    values = samples(depth, 1 if colour == GREY else 3)
    assert_pixels(png(values, depth, colour), eight_bits(values, depth))
