"""`reduction.positions` over HTTP: the context counts tokens, the model's positions end where its training did.

The server's context has 1024 tokens, and its model was trained for 1200 positions (see `server_url`).
"""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.images import data_uri, photo

CONTEXT, TRAINED = 1024, 1200
ENCODED = 144  # tokens of an image
TENTH: dict[str, Any] = {"keep_tokens": 15}


def ask(
    client: openai.OpenAI, max_tokens: int | None = 4, images: int = 1, text: str = "What is it?", **reduction: Any
) -> Any:
    photos = [{"type": "image_url", "image_url": {"url": data_uri(photo(31 + i))}} for i in range(images)]
    return client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": [*photos, {"type": "text", "text": text}]}],  # type: ignore[misc,list-item]
        max_tokens=max_tokens,
        temperature=0,
        logprobs=True,
        extra_body={"reduction": reduction, "ignore_eos": True},
    )


def test_kept_positions_are_reported_and_change_the_answer(client: openai.OpenAI) -> None:
    kept, renumbered = (ask(client, ratio=0.5, positions=kind) for kind in ("keep", "renumber"))
    assert kept.usage.vision_tokens["positions"] == "keep"
    assert "positions" not in renumbered.usage.vision_tokens
    assert kept.usage.prompt_tokens == renumbered.usage.prompt_tokens
    first, second = (answer.choices[0].logprobs.content[0].logprob for answer in (kept, renumbered))
    assert abs(first - second) > 1e-4


def test_kept_positions_go_with_withdrawal(client: openai.OpenAI) -> None:
    usage = ask(client, ratio=0.5, positions="keep", withdraw=True).usage.vision_tokens
    assert (usage["positions"], usage["kept"], usage["withdrawn"]) == ("keep", 72, 72)


def test_usage_counts_tokens_where_positions_go_beyond_the_context(client: openai.OpenAI) -> None:
    kept, renumbered = (ask(client, images=8, positions=kind, **TENTH) for kind in ("keep", "renumber"))
    assert kept.usage.prompt_tokens == renumbered.usage.prompt_tokens < 8 * 15 + 60
    assert CONTEXT < kept.usage.prompt_tokens + 8 * (ENCODED - 15) <= TRAINED
    assert (kept.usage.vision_tokens["encoded"], kept.usage.vision_tokens["kept"]) == (8 * ENCODED, 8 * 15)


def test_the_context_limit_counts_tokens(client: openai.OpenAI) -> None:
    """A prompt may fill the context up to the answer's first token, and no further, whatever its positions are."""

    def tokens(words: int, kind: str) -> int:
        usage = ask(client, 1, text="what " * words, ratio=0.5, positions=kind).usage
        assert usage.vision_tokens["kept"] == ENCODED // 2
        return int(usage.prompt_tokens)

    few = tokens(100, "keep")
    each = tokens(101, "keep") - few
    most = 100 + (CONTEXT - 1 - few) // each
    for kind in ("keep", "renumber"):
        assert CONTEXT - each <= tokens(most, kind) < CONTEXT
        with pytest.raises(openai.BadRequestError, match=f"prompt .*{CONTEXT} tokens") as refused:
            tokens(most + 1, kind)
        assert refused.value.param == "messages"


def test_positions_that_the_model_was_not_trained_for_are_refused(client: openai.OpenAI) -> None:
    """Nine images are 1296 positions and more, and 135 tokens."""
    assert ask(client, images=9, positions="renumber", **TENTH).usage.vision_tokens["kept"] == 9 * 15
    with pytest.raises(openai.BadRequestError, match=f"of the model's {TRAINED} positions") as refused:
        ask(client, images=9, positions="keep", **TENTH)
    assert refused.value.param == "reduction.positions"
    prompt = ask(client, images=8, positions="keep", **TENTH).usage.prompt_tokens + 8 * (ENCODED - 15)
    with pytest.raises(openai.BadRequestError, match=f"takes {prompt} of .*and {TRAINED - prompt + 1} more are asked"):
        ask(client, TRAINED - prompt + 1, images=8, positions="keep", **TENTH)


def test_an_open_answer_ends_where_the_positions_do(client: openai.OpenAI) -> None:
    answer = ask(client, None, images=8, positions="keep", **TENTH)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens + 8 * (ENCODED - 15) == TRAINED


def test_a_value_of_another_kind(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, ratio=0.5, positions="stay")
    assert refused.value.param == "reduction.positions"
