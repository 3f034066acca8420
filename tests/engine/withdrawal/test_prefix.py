"""Prefix caching of the deep layers: what is reused, and that what is reused is right."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.conftest import LAYERS
from tests.engine.withdrawal.conftest import Expected
from tests.engine.withdrawal.harness import BLOCK, PHOTOS, Case, Engine

K = LAYERS // 2
TOKENS = 8
VISION = 144


def text(seed: int, tokens: int) -> str:
    """About `tokens` tokens, one letter each."""
    return "".join(" " + "abcdefghijklm"[(seed * 5 + i * (seed + 3)) % 13] for i in range(tokens))


def cached(output: Any) -> int:
    tokens: int = output.num_cached_tokens
    return tokens


def test_what_later_prompts_reuse(small_chunks: Engine, expected: Expected) -> None:
    def ask(case: Case) -> int:
        return cached(expected.generate(small_chunks, K, [case], TOKENS)[0])

    begin = text(1, 40) + "<image>"
    first = Case(begin + text(2, 50), (0,))
    (output,) = expected.generate(small_chunks, K, [first], TOKENS)
    image, length = image_range(output), len(output.prompt_token_ids)
    last_in_image, last = (image.stop - 1) // BLOCK * BLOCK, (length - 1) // BLOCK * BLOCK
    assert cached(output) == 0 and BLOCK < image.start < last_in_image < image.stop < last
    assert ask(first) == last
    assert ask(Case(begin + text(3, 45), (0,))) == last_in_image
    turn = Case(first.prompt, (0,), tail=(*output.outputs[0].token_ids, *range(100, 140)))
    assert ask(turn) == (length + TOKENS - 1) // BLOCK * BLOCK
    assert ask(Case(first.prompt, (0,), withdraw=False)) == image.start // BLOCK * BLOCK
    assert ask(first) == last
    assert ask(Case(first.prompt, (1,))) == image.start // BLOCK * BLOCK


def image_range(output: Any) -> range:
    """Token numbers of the first image of a prompt."""
    start = output.prompt_token_ids.index(max(output.prompt_token_ids, key=output.prompt_token_ids.count))
    return range(start, start + VISION)


def test_tail_of_one_boundary_after_the_other(small_chunks: Engine, expected: Expected) -> None:
    """Three images leave so little text between them that one deep block ends several prefixes."""
    parts = [text(i + 5, 6) + "<image>" for i in range(3)]
    whole = Case("".join(parts) + text(9, 40), (3, 4, 5))
    expected.generate(small_chunks, K, [whole], TOKENS)
    for count in (1, 2, 3):
        other = Case("".join(parts[:count]) + text(10 + count, 30), (3, 4, 5)[:count])
        (output,) = expected.generate(small_chunks, K, [other], TOKENS)
        assert cached(output) >= (count * VISION) // BLOCK * BLOCK
    (again,) = expected.generate(small_chunks, K, [whole], TOKENS)
    assert cached(again) == (len(again.prompt_token_ids) - 1) // BLOCK * BLOCK


@pytest.mark.parametrize("same", [True, False], ids=["identical prompts", "same image, other questions"])
def test_requests_of_one_step_do_not_copy_what_is_not_written_yet(
    small_pool: Engine, expected: Expected, same: bool
) -> None:
    begin = text(20 + same, 40) + "<image>"
    cases = [Case(begin + text(22 if same else 23 + i, 20), (1,)) for i in range(3)]
    outputs = expected.generate(small_pool, K, cases, TOKENS)
    assert cached(outputs[0]) == 0 and cached(outputs[1]) > 40 + VISION // 2


def test_a_prompt_that_ends_in_an_image_shares_only_what_others_have(small_chunks: Engine, expected: Expected) -> None:
    """It keeps one vision token more than the same tokens followed by text."""
    ends = Case(text(30, 26) + "<image>", (2,))
    tokens = 2 * BLOCK
    (output,) = expected.generate(small_chunks, K, [ends], tokens)
    length = len(output.prompt_token_ids)
    follows = Case(ends.prompt, (2,), tail=tuple(output.outputs[0].token_ids[: tokens - 5]))
    (output,) = expected.generate(small_chunks, K, [follows], tokens)
    assert 0 < cached(output) < length
    (output,) = expected.generate(small_chunks, K, [ends], tokens)
    assert 0 < cached(output) < length


def test_photos_differ() -> None:
    assert len({photo.tobytes() for photo in PHOTOS}) == len(PHOTOS)
