"""Scores and choice on one batch, against loops over tokens; nothing is read from the device to the host."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foldserve.server.engine.withdrawal.batch import ImageSelection, PromptSelection
from foldserve.server.engine.withdrawal.token_selection import last_token_scores, select_tokens
from tests.engine.withdrawal.reference import chosen

ROWS, WIDTH, HEADS, KV_HEADS, SIZE = 40, 6, 4, 2, 8
PROMPTS = (
    PromptSelection(3, 20, (ImageSelection("fastv", 5, 9, 4, 5), ImageSelection("illava_decoder", 16, 5, 3, 11))),
    PromptSelection(28, 12, (ImageSelection("illava_decoder", 29, 10, 1, 22),)),
)
"""Three rows of others, 20 rows with two images, five rows of others, 12 rows with one; 24 of the 40 rows go deep."""


def batch(device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, hidden states, residual stream, rows that go deep with the last of each image as stand-ins."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(ROWS, HEADS, SIZE, generator=generator)
    key = torch.randn(ROWS, KV_HEADS, SIZE, generator=generator)
    hidden, residual = torch.randn(2, ROWS, WIDTH, generator=generator)
    gone = {*range(5, 10), *range(16, 18), *range(29, 38)}
    rows = torch.tensor([row for row in range(ROWS) if row not in gone])
    return tuple(tensor.to(device) for tensor in (query, key, hidden, residual, rows))  # type: ignore[return-value]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_scores_equal_a_loop_over_heads(prompt: PromptSelection) -> None:
    query, key, *_ = batch()
    last = prompt.row + prompt.tokens - 1
    expected = torch.zeros(prompt.tokens)
    for head in range(HEADS):
        keys = key[prompt.row : last + 1, head * KV_HEADS // HEADS]
        expected += (keys @ query[last, head] * 0.3).softmax(0) / HEADS
    torch.testing.assert_close(last_token_scores(query, key, prompt, 0.3), expected)


def test_choice_equals_a_loop_over_tokens() -> None:
    query, key, hidden, residual, rows = batch()
    scores = [last_token_scores(query, key, prompt, 0.3) for prompt in PROMPTS]
    expected, gone = hidden + residual, set()
    for prompt, of_prompt in zip(PROMPTS, scores, strict=True):
        for image in prompt.images:
            own = range(image.row, image.row + image.tokens)
            of_image = of_prompt[image.row - prompt.row :][: image.tokens].tolist()
            less, merges = chosen(image.method, list(own), of_image, image.tokens - image.kept)
            gone |= set(less)
            for merge in merges:
                expected[merge.at] = merge.weights @ (hidden + residual)[merge.rows]
    select_tokens(PROMPTS, scores, rows, hidden, residual)
    kept = [row for row in range(ROWS) if row not in gone]
    assert rows.tolist() == kept
    torch.testing.assert_close((hidden + residual)[rows], expected[kept])


def test_shapes_depend_on_no_data() -> None:
    """On the meta device there is none: whatever needed a value on the host would fail."""
    query, key, hidden, residual, rows = batch("meta")
    select_tokens(PROMPTS, [last_token_scores(query, key, prompt, 0.3) for prompt in PROMPTS], rows, hidden, residual)
