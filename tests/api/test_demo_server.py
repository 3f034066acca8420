"""The server that `foldserve serve` starts where no model is named: what the README shows, answers as JSON, and
log-probabilities of ids that its tokenizer, as Llama's, does not know.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.api.live import Live, chat

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 414  # that the tokenizer knows; the model has 448 rows


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    server = Live(None, tmp_path_factory.mktemp("demo"), worker=True)
    yield server
    server.end()


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        yield client


def readme(start: str, end: str) -> str:
    """What stands between two texts."""
    return (ROOT / "README.md").read_text().partition(start)[2].partition(end)[0]


def example() -> dict[str, Any]:
    """The body of the README's first request."""
    body = readme("-d @- <<EOF\n", "\nEOF")
    scene = base64.b64encode((ROOT / "docs/images/scene.png").read_bytes()).decode()
    filled: dict[str, Any] = json.loads(body.replace("$(base64 -w0 docs/images/scene.png)", scene))
    return filled


def test_the_example_is_answered_as_the_readme_says(server: Live) -> None:
    answer = server.ask("POST", "/v1/chat/completions", example()).json
    assert answer["choices"][0]["message"]["content"] == readme("The answer is OpenAI's (`", "`)")
    usage = json.loads(readme('```json\n"usage": ', "\n```"))
    assert usage.items() <= answer["usage"].items()


def test_a_stream_begins_with_the_first_word(server: Live) -> None:
    events = server.ask("POST", "/v1/chat/completions", example() | {"stream": True, "logprobs": True}).events
    assert events.pop() == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    assert [choice["delta"]["content"] for choice in choices] == ["", "a", " cyan", " star", ""]
    tokens = [token["token"] for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
    assert tokens == [" a", " cyan", " star", "</s>"]


def test_the_script_prints_what_the_readme_says(
    client: openai.OpenAI, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, _, printed = readme("```python\n", "\n## Request fields").partition("```\n```\n")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(openai, "OpenAI", lambda **options: client)
    exec(compile(script, "README.md", "exec"), {})
    assert capsys.readouterr().out == printed.strip().removesuffix("```")


CHOICES = {"color": {"enum": ["cyan", "red", "blue"]}, "shape": {"enum": ["circle", "star"]}}
SCHEMAS: dict[str, dict[str, Any]] = {
    "choices": {"type": "object", "properties": CHOICES, "required": ["color", "shape"]},
    "booleans": {"type": "object", "properties": {"star": {"type": "boolean"}}, "required": ["star"]},
    "list": {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 1, "maxItems": 3},
    "nested": {
        "type": "object",
        "properties": {"a": {"type": "object", "properties": CHOICES, "required": ["shape"]}, "b": {"const": 1}},
        "required": ["a", "b"],
    },
}
FORMS = {"object": {"type": "json_object"}} | {
    name: {"type": "json_schema", "json_schema": {"name": name, "schema": schema}} for name, schema in SCHEMAS.items()
}


@pytest.mark.parametrize("name", FORMS)
def test_answers_as_json_end(name: str, server: Live) -> None:
    """White space between values is what this model would go on with."""
    body = example() | {"max_tokens": 200, "response_format": FORMS[name]}
    choice = server.ask("POST", "/v1/chat/completions", body).json["choices"][0]
    assert choice["finish_reason"] == "stop"
    text = choice["message"]["content"]
    assert json.dumps(json.loads(text), separators=(",", ":")) == text
    assert not re.search(r"\s", text)


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
def test_ordinary_requests_end_nothing(server: Live, fields: dict[str, Any], stream: bool) -> None:
    """The first of them did, sooner or later."""
    answer = server.ask("POST", "/v1/chat/completions", chat("say something") | fields | {"stream": stream})
    if stream and "prompt_logprobs" in fields:
        assert answer.status == 400
        return
    assert answer.status == 200, answer.body
    assert not stream or (answer.events[-1] == "[DONE]" and '"error"' not in answer.events[-2])
    assert server.ask("GET", "/health/ready").status == 200


def test_no_unknown_token_is_an_answer(server: Live) -> None:
    answer = server.chat(logprobs=True, top_logprobs=20, max_tokens=200, temperature=2, return_token_ids=True)
    (choice,) = answer.json["choices"]
    assert len(choice["token_ids"]) == 200 and max(choice["token_ids"]) < TOKENS
    assert all(isinstance(top["token"], str) for step in choice["logprobs"]["content"] for top in step["top_logprobs"])
