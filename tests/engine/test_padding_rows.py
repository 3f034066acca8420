"""Ids of padding rows: they have no text, end nothing, and are not sampled where the server says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.logprobs import Logprob

from foldserve.server.engine.padding_rows import unknown_rows
from foldserve.server.quality.demo.checkpoint import CHECKPOINT
from foldserve.server.settings import Settings
from tests.engine.conftest import start_engine

MASKING: dict[str, Any] = {"additional_config": {"foldserve": Settings().to_config()}}
TOKENS, ROWS = 414, 448
"""Of the demo model, whose tokenizer is Metaspace's, as Llama's: its texts of single tokens are where vLLM failed."""

PADDING = ROWS - 1
FLAT = dict.fromkeys([*range(5, 25), *range(TOKENS, ROWS)], 100)
"""A bias with which most of what is sampled would be padding."""


@pytest.fixture(scope="module")
def demo() -> Any:
    """Stock sampling: `vllm.LLM` may sample a padding row."""
    return start_engine(CHECKPOINT, max_logprobs=-1)


@pytest.fixture(scope="module")
def masking() -> Any:
    return start_engine(CHECKPOINT, max_logprobs=-1, **MASKING)


def ask(llm: Any, n: int = 1, **params: Any) -> Any:
    (output,) = llm.generate(
        ["USER: What is it? ASSISTANT:"],
        SamplingParams(**({"max_tokens": 4, "ignore_eos": True} | params), n=n),
        use_tqdm=False,
    )
    return output


def texts(listed: dict[int, Logprob]) -> dict[int, str | None]:
    return {token: entry.decoded_token for token, entry in listed.items() if token >= TOKENS}


def test_the_demo_model_has_padding_rows(demo: Any) -> None:
    assert unknown_rows(demo.model_config) == list(range(TOKENS, ROWS))


PATHS: dict[str, dict[str, Any]] = {
    "sampled": {"logit_bias": {PADDING: 100}, "logprobs": 0},
    "sampled, greedy": {"logit_bias": {PADDING: 100}, "logprobs": 0, "temperature": 0},
    "allowed": {"allowed_token_ids": [PADDING], "logprobs": 0},
    "top": {"logprobs": ROWS},
    "named": {"logprob_token_ids": [PADDING, TOKENS], "logprobs": 2},
    "prompt": {"prompt_logprobs": ROWS},
    "flat": {"logprobs": ROWS, "prompt_logprobs": ROWS, "flat_logprobs": True},
    "slow words": {"logit_bias": {PADDING: 100}, "logprobs": 20, "skip_special_tokens": False},
}


@pytest.mark.parametrize("path", PATHS)
def test_an_unknown_token_has_no_text(demo: Any, path: str) -> None:
    """On every way to where single tokens get their texts; vLLM raised TypeError there."""
    params = PATHS[path]
    output = ask(demo, **params)
    answer = output.outputs[0]
    assert len(answer.token_ids) == 4
    listed = [*(answer.logprobs or []), *[entry for entry in output.prompt_logprobs or [] if entry]]
    found = [text for entry in listed for text in texts(entry).values()]
    assert found and set(found) == {""}
    if "logit_bias" in params or "allowed_token_ids" in params:
        assert set(answer.token_ids) == {PADDING} and answer.text == ""


def test_known_tokens_keep_their_leading_spaces(demo: Any) -> None:
    """What the patched function is for; beside the unknown ones."""
    (listed,) = ask(demo, max_tokens=1, logprobs=ROWS).outputs[0].logprobs
    tokenizer = demo.get_tokenizer()
    pieces = tokenizer.convert_ids_to_tokens(list(range(TOKENS)))
    spaced = [token for token, piece in enumerate(pieces) if piece.startswith("▁")]
    assert len(spaced) > 20
    assert all(listed[token].decoded_token.startswith(" ") for token in spaced)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 1, "seed": 1},
        {"logit_bias": FLAT, "temperature": 0},
        {"logit_bias": FLAT, "temperature": 2, "seed": 3},
        {"logit_bias": FLAT, "temperature": 2, "top_k": 40, "top_p": 0.99, "min_p": 0.001},
        {"logit_bias": FLAT, "temperature": 2, "presence_penalty": 2, "repetition_penalty": 0.5},
        {"logit_bias": FLAT, "temperature": 2, "min_tokens": 50},
    ],
    ids=str,
)
def test_padding_rows_are_not_sampled(masking: Any, params: dict[str, Any]) -> None:
    output = ask(masking, n=8 if params.get("temperature") else 1, max_tokens=50, **params)
    sampled = [token for answer in output.outputs for token in answer.token_ids]
    assert len(sampled) >= 50 and max(sampled) < TOKENS


def test_without_the_setting_they_are(demo: Any) -> None:
    """Guards the test above."""
    output = ask(demo, n=8, max_tokens=50, temperature=2, seed=3, logit_bias=FLAT)
    assert max(token for answer in output.outputs for token in answer.token_ids) >= TOKENS


def test_nothing_but_padding_rows_allowed(masking: Any) -> None:
    """The API refuses it; the engine lives, and gives a token that there is."""
    for temperature in (0, 1):
        answer = ask(masking, allowed_token_ids=[PADDING], logprobs=0, temperature=temperature).outputs[0]
        assert len(answer.token_ids) == 4 and max(answer.token_ids) < TOKENS
    assert ask(masking, temperature=0).outputs[0].token_ids


@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 1, "seed": 7}], ids=str)
def test_answers_and_log_probabilities_stay_vllms(demo: Any, masking: Any, params: dict[str, Any]) -> None:
    """Bit for bit, as long as vLLM itself samples no padding row; the padding rows' own log-probabilities too."""
    stock, ours = (ask(llm, max_tokens=40, logprobs=ROWS, **params).outputs[0] for llm in (demo, masking))
    assert max(stock.token_ids) < TOKENS
    assert ours.token_ids == stock.token_ids
    assert [{t: e.logprob for t, e in step.items()} for step in ours.logprobs] == [
        {t: e.logprob for t, e in step.items()} for step in stock.logprobs
    ]


def test_a_model_without_a_tokenizer(tiny_llava: Path) -> None:
    llm = start_engine(tiny_llava, **MASKING)
    assert unknown_rows(llm.model_config) == list(range(514, 576))
    config = llm.model_config
    config.skip_tokenizer_init = True
    assert unknown_rows(config) == []
