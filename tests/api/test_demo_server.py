"""The server that `foldserve serve` starts where no model is named: what the README shows, and answers as JSON."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.api.live import Live

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    server = Live(None, tmp_path_factory.mktemp("demo"))
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
