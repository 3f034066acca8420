"""`reduction.positions` over HTTP."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.images import data_uri, photo


def ask(client: openai.OpenAI, max_tokens: int | None = 4, **reduction: Any) -> Any:
    return client.chat.completions.create(
        model="tiny",
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": data_uri(photo(31))}},
                    {"type": "text", "text": "What is it?"},
                ],
            }
        ],
        max_tokens=max_tokens,
        temperature=0,
        logprobs=True,
        extra_body={"reduction": reduction},
    )


def test_kept_positions_are_reported_and_change_the_answer(client: openai.OpenAI) -> None:
    kept, renumbered = (ask(client, ratio=0.5, positions=positions) for positions in ("keep", "renumber"))
    assert kept.usage.vision_tokens["positions"] == "keep"
    assert "positions" not in renumbered.usage.vision_tokens
    assert kept.usage.prompt_tokens == renumbered.usage.prompt_tokens
    first, second = (answer.choices[0].logprobs.content[0].logprob for answer in (kept, renumbered))
    assert abs(first - second) > 1e-4


def test_kept_positions_go_with_withdrawal(client: openai.OpenAI) -> None:
    usage = ask(client, ratio=0.5, positions="keep", withdraw=True).usage.vision_tokens
    assert (usage["positions"], usage["kept"], usage["withdrawn"]) == ("keep", 72, 72)


def test_an_open_answer_ends_where_the_positions_do(client: openai.OpenAI) -> None:
    answer = ask(client, max_tokens=None, ratio=0.9, positions="keep")
    assert answer.usage.completion_tokens + answer.usage.prompt_tokens <= 1024


def test_a_value_of_another_kind(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, ratio=0.5, positions="stay")
    assert refused.value.param == "reduction.positions"
