"""A chat template's error names the message that caused it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import safe_apply_chat_template

from foldserve.server.api.errors import InvalidRequest
from foldserve.server.api.limits import template
from tests.api.test_bad_inputs import LEAKS
from tools.demo_model.tokenizer import CHAT_TEMPLATE

USER = {"role": "user", "content": "Hello"}
ASSISTANT = {"role": "assistant", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief"}
ODD = {"role": "critic", "content": "No"}
TOOL = {"role": "tool", "content": [{"type": "text", "text": "done"}], "tool_call_id": "a"}
VIDEO = {"role": "user", "content": [{"type": "video"}]}

ALTERNATING = """\
{%- if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif -%}
{%- for turn in rest %}{% if (turn.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}{% endif %}
{{- turn.content }}{% endfor -%}
"""
FIRST = "{% if messages[0].role != 'system' %}{{ raise_exception('a system message comes first') }}{% endif %}"
IN_A_MACRO = (
    "{% macro show(m) %}{{ m.content.parts.first }}{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tiny_llava: Path) -> ModelConfig:
    return EngineArgs(model=str(tiny_llava)).create_model_config()  # with the plugins, as a server has it


def refusal(model: ModelConfig, source: str, messages: list[dict[str, Any]]) -> InvalidRequest | None:
    tokenizer: Any = AutoTokenizer.from_pretrained(model.model)
    conversation: Any = [dict(message) for message in messages]
    try:
        safe_apply_chat_template(model, tokenizer, conversation, chat_template=source, tokenize=False)
    except VLLMValidationError as error:
        return template.refusal(error, len(messages))
    raise AssertionError("the template took the messages")


@pytest.mark.parametrize(
    ("source", "messages", "param", "words"),
    [
        (CHAT_TEMPLATE, [USER, ASSISTANT, TOOL], "messages[2]", "role: tool): unsupported role tool"),
        (CHAT_TEMPLATE, [ODD, USER], "messages[0]", "role: critic): unsupported role critic"),
        (CHAT_TEMPLATE, [SYSTEM, USER, VIDEO, ASSISTANT], "messages[2]", "role: user): unsupported content type video"),
        (ALTERNATING, [USER, ASSISTANT, ASSISTANT, USER], "messages[2]", "role: assistant): roles must alternate"),
        (ALTERNATING, [SYSTEM, ASSISTANT], "messages[1]", "role: assistant): roles must alternate"),
        (ALTERNATING, [SYSTEM, USER, USER], "messages[2]", "role: user): roles must alternate"),
        (FIRST, [USER, ASSISTANT], "messages", "refuses these messages: a system message comes first"),
        (IN_A_MACRO, [USER], "messages[0]", "(role: user)"),  # no text of the library
    ],
)
def test_the_message_is_named(
    model: ModelConfig, source: str, messages: list[dict[str, Any]], param: str, words: str
) -> None:
    error = refusal(model, source, messages)
    assert error is not None
    assert error.param == param
    assert "chat template" in str(error)
    assert str(error).endswith(words)
    assert not LEAKS.search(str(error))


def test_messages_that_were_put_together_are_not_counted(model: ModelConfig) -> None:
    """vLLM makes one system message of several where a template does not know developers."""
    error = refusal(model, ALTERNATING, [SYSTEM, {"role": "developer", "content": "x"}, USER, USER])
    assert error is not None
    assert error.param == "messages"


def test_long_reasons_are_cut(model: ModelConfig) -> None:
    error = refusal(model, "{{ raise_exception('x' * 5000) }}", [USER])
    assert error is not None
    assert len(str(error)) < 300


def test_other_errors_are_none_of_a_template() -> None:
    assert template.refusal(VLLMValidationError("too long", parameter="input_tokens"), 1) is None
    wrapped = VLLMValidationError("x")
    wrapped.__cause__ = ValueError("y")
    assert template.refusal(wrapped, 1) is None
