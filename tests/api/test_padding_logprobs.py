"""Log-probabilities of ids that the tokenizer does not know, on a server whose tokenizer is as Llama's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from foldserve.server.quality.demo.export import CHECKPOINT
from tests.api.live import Live, chat

TOKENS = 414  # of the demo model, which has 448 rows


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    server = Live(CHECKPOINT, tmp_path_factory.mktemp("live"), "--max-logprobs", "20")
    yield server
    server.end()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": True, "top_logprobs": 20, "temperature": 2, "max_tokens": 300},
        {"prompt_logprobs": 20},
        {"logprobs": True, "top_logprobs": 20, "temperature": 2, "max_tokens": 60, "n": 4},
    ],
    ids=lambda fields: " ".join(fields),
)
def test_ordinary_requests_end_nothing(live: Live, fields: dict[str, Any], stream: bool) -> None:
    """The first of them did, sooner or later."""
    answer = live.ask("POST", "/v1/chat/completions", chat("say something") | fields | {"stream": stream})
    if stream and "prompt_logprobs" in fields:
        assert answer.status == 400
        return
    assert answer.status == 200, answer.body
    assert not stream or (answer.events[-1] == "[DONE]" and '"error"' not in answer.events[-2])
    assert live.ask("GET", "/health/ready").status == 200


def test_no_unknown_token_is_an_answer(live: Live) -> None:
    answer = live.chat(logprobs=True, top_logprobs=20, max_tokens=200, temperature=2, return_token_ids=True)
    (choice,) = answer.json["choices"]
    assert len(choice["token_ids"]) == 200 and max(choice["token_ids"]) < TOKENS
    assert all(isinstance(top["token"], str) for step in choice["logprobs"]["content"] for top in step["top_logprobs"])
