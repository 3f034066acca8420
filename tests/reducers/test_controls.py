"""The controls: average pooling, random choice, a smaller image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from foldserve.reducers.downsample import grid_for, interpolate_positions, resize
from foldserve.reducers.fold import keep
from foldserve.reducers.pool import pool, windows
from foldserve.reducers.random import draw_indices
from tests.reducers.check import assert_fp32_inside, assert_nothing_read, assert_partition, draw, few

sides = st.integers(1, 5)


@few
@given(st.integers(1, 3), sides, sides, sides, sides, st.integers(0, 2**31))
def test_pool_is_the_mean_of_each_window(batch: int, high: int, wide: int, rows: int, columns: int, seed: int) -> None:
    grid, n = (rows * high, columns * wide), rows * high * columns * wide
    (x,) = draw(seed, (batch, n, 3), dtype=torch.float64)
    reduced = pool(x, grid, (high, wide))
    assert_partition(reduced, n, rows * columns)
    image = x.view(batch, *grid, 3)
    for row in range(rows):
        for column in range(columns):
            window = image[:, row * high : (row + 1) * high, column * wide : (column + 1) * wide]
            slot = row * columns + column
            torch.testing.assert_close(reduced.tokens[:, slot], window.mean(dim=(1, 2)))
            assert (reduced.source[:, slot] == row * high * grid[1] + column * wide).all()
    assert (reduced.sizes == high * wide).all()
    assert_fp32_inside(lambda x: pool(x, grid, (high, wide)), x)
    assert_nothing_read(lambda x: pool(x, grid, (high, wide)), x)


@few
@given(st.integers(1, 3), sides, sides, st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_pool_with_smaller_last_windows(batch: int, high: int, wide: int, rows: int, columns: int, seed: int) -> None:
    (x,) = draw(seed, (batch, rows * columns, 3), dtype=torch.float64)
    reduced = pool(x, (rows, columns), (high, wide))
    across, down = -(-columns // wide), -(-rows // high)
    assert_partition(reduced, rows * columns, down * across)
    for slot in range(down * across):
        top, left = slot // across * high, slot % across * wide
        window = x.view(batch, rows, columns, 3)[:, top : top + high, left : left + wide]
        torch.testing.assert_close(reduced.tokens[:, slot], window.mean(dim=(1, 2)))
        assert (reduced.source[:, slot] == top * columns + left).all()
        assert (reduced.sizes[:, slot] == window.shape[1] * window.shape[2]).all()
    assert_fp32_inside(lambda x: pool(x, (rows, columns), (high, wide)), x)
    assert_nothing_read(lambda x: pool(x, (rows, columns), (high, wide)), x)


def test_a_grid_may_have_no_whole_number_of_windows() -> None:
    with pytest.raises(ValueError, match="24 x 27 tokens has no whole number of 2 x 2"):
        windows(torch.ones(1, 24 * 27, 1), (24, 27), (2, 2))


@few
@given(st.integers(2, 300), st.data(), st.integers(0, 2**63 - 1))
def test_random_keeps_tokens_as_they_are(n: int, data: st.DataObject, seed: int) -> None:
    kept = data.draw(st.integers(1, n))
    (x,) = draw(0, (2, n, 3), dtype=torch.bfloat16)
    index = draw_indices(n, kept, seed)
    tokens, sizes, source, group = keep(x, index)
    assert torch.equal(tokens, x[:, index])
    assert torch.equal(source, index.expand(2, kept))
    assert (index.diff() > 0).all()
    assert (sizes == 1).all()
    assert torch.equal(group[0, index], torch.arange(kept))
    assert (group[0] >= 0).sum() == kept
    assert torch.equal(index, draw_indices(n, kept, seed))


def test_random_draws_are_uniform_and_differ() -> None:
    draws = torch.stack([draw_indices(8, 4, seed) for seed in range(400)])
    counts = draws.flatten().bincount()
    assert len({tuple(row.tolist()) for row in draws}) > 60  # of 70 possible ones
    assert counts.min() > 150  # of 200 expected: five standard deviations
    assert counts.max() < 250


def test_random_draw_is_the_same_on_every_machine() -> None:
    assert draw_indices(16, 5, 2026).tolist() == [0, 1, 8, 10, 13]


@few
@given(st.integers(1, 30), st.integers(1, 900))
def test_grid_of_a_square_is_the_largest_that_fits(side: int, wanted: int) -> None:
    found = grid_for(wanted, (side, side))
    possible = [(r, c) for r in range(1, side + 1) for c in range(r, side + 1) if c <= 1.5 * r and r * c <= wanted]
    assert found in possible
    largest = max(r * c for r, c in possible)
    assert found == max((r, c) for r, c in possible if r * c == largest)


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.02, 1))
def test_grid_of_any_image(rows: int, columns: int, share: float) -> None:
    """Inside the image's own, most of the tokens that may stay, in about its proportion, and the same once more."""
    wanted = max(1, int(rows * columns * share))
    less, fewer = grid_for(wanted, (rows, columns))
    assert 1 <= less <= rows and 1 <= fewer <= columns and less * fewer <= wanted
    assert grid_for(less * fewer, (rows, columns)) == (less, fewer)
    if min(rows, columns) >= 8 and wanted >= 30:
        assert less * fewer >= 0.75 * wanted
        assert 0.5 < fewer / less * rows / columns < 2


def test_grids_by_hand() -> None:
    assert [grid_for(n, (26, 46)) for n in (1196, 598, 299, 100, 10)] == [(26, 46), (18, 33), (13, 23), (7, 14), (2, 5)]
    wanted = (576, 575, 288, 196, 144, 57, 6, 5, 3, 2, 1)
    grids = [(24, 24), (23, 24), (16, 18), (14, 14), (12, 12), (7, 8), (2, 3), (2, 2), (1, 1), (1, 1), (1, 1)]
    assert [grid_for(n, (24, 24)) for n in wanted] == grids
    with pytest.raises(ValueError, match="no image has 0 tokens"):
        grid_for(0, (24, 24))


def test_resize_is_pillows_antialiased_bicubic() -> None:
    (pixels,) = draw(0, (2, 3, 70, 84))
    ours = resize(pixels, 2, 3, patch=14)
    theirs = torch.stack([torch.stack([_by_pillow(channel, 28, 42) for channel in image]) for image in pixels])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert resize(pixels.bfloat16(), 2, 3, patch=14).dtype == torch.bfloat16


def _by_pillow(channel: Tensor, rows: int, columns: int) -> Tensor:
    image = Image.fromarray(channel.numpy())
    resized = image.resize((columns, rows), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized))


def test_positions_are_those_of_transformers() -> None:
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=84, patch_size=14
    )
    model = CLIPVisionModel(config)
    embeddings = getattr(model, "vision_model", model).embeddings
    weight = embeddings.position_embedding.weight.detach()
    (patches,) = draw(0, (1, 1 + 4 * 5, 16))
    theirs = embeddings.interpolate_pos_encoding(patches, 4 * 14, 5 * 14)[0]
    torch.testing.assert_close(interpolate_positions(weight, (6, 6), 4, 5), theirs)
    torch.testing.assert_close(interpolate_positions(weight[1:], (6, 6), 4, 5), theirs[1:])  # no class token
    torch.testing.assert_close(interpolate_positions(weight, (6, 6), 6, 6), weight)
    assert interpolate_positions(weight.bfloat16(), (6, 6), 4, 5).dtype == torch.bfloat16
