"""The server that `foldserve serve` starts where no model is named: what the README shows, answers as JSON, and
log-probabilities of ids that its tokenizer, as Llama's, does not know.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from foldserve.server.quality.auto.file import AutoCalibration, Group
from foldserve.server.quality.calibration_file import model_hash
from foldserve.server.quality.demo.checkpoint import CHECKPOINT
from tests.api.live import Live, chat
from tests.clients.page import examples

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 414  # that the tokenizer knows; the model has 448 rows


def write_calibration(file: Path) -> None:
    """As `foldserve calibrate --auto` would."""

    def group(step: int) -> Group:
        return Group(samples=100, step=step, changed=(0.03,) * 15, bound=(0.04,) * 15)

    AutoCalibration(
        model="demo",
        model_hash=model_hash(CHECKPOINT),
        reduction={},
        target=0.05,
        answer_tokens=32,
        data="scenes",
        data_hash="sha256:0",
        tokens=144,
        steps=tuple(range(1, 16)),
        groups={"ocr": group(9), "color_at": group(1)},
        together=group(8),
    ).write(file)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("demo")
    write_calibration(folder / "auto.json")
    groups = json.dumps({"models": {"reader": "ocr"}})
    options = ["--auto", str(folder / "auto.json"), "--auto-groups", groups, "--served-model-name", "demo", "reader"]
    options += ["--check-answers", "1"]
    server = Live(None, folder, *options, worker=True)
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


def test_the_openai_client_prints_what_its_page_says(
    client: openai.OpenAI, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = [example for example in examples() if example.name == "openai-python"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(openai, "OpenAI", lambda **options: client)
    exec(compile(example.code, "clients.md", "exec", dont_inherit=True), {})
    assert capsys.readouterr().out == example.output


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


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"reduction": {"ratio": "auto", "group": "ocr"}}, (81, "ocr", 9, 0.05)),
        ({"reduction": {"ratio": "auto", "group": "color_at"}}, (36, "color_at", 4, 0.05)),  # the server's bounds
        ({"reduction": {"ratio": "auto", "group": "color_at", "bounds": [0, 0.95]}}, (9, "color_at", 1, 0.05)),
        ({"reduction": {"ratio": "auto", "group": "ocr", "bounds": [0.5, 0.9]}}, (72, "ocr", 8, None)),
        ({"reduction_ratio": "auto"}, (81, "default", 9, None)),  # as the group that needs most
        ({"reduction_ratio": "auto", "model": "reader"}, (81, "ocr", 9, 0.05)),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_auto_keeps_what_was_calibrated(
    server: Live, fields: dict[str, Any], expected: tuple[int, str, int, float | None]
) -> None:
    body = {name: value for name, value in example().items() if not name.startswith("reduction")}
    answer = server.ask("POST", "/v1/chat/completions", body | fields).json
    vision = answer["usage"]["vision_tokens"]
    assert tuple(vision[name] for name in ("kept", "group", "step", "target")) == expected
    assert (vision["policy"], vision["encoded"]) == ("auto", 144)
    label = expected[1] if expected[1] in ("ocr", "color_at") else "other"
    assert server.metrics("foldserve_auto_requests_total", group=label, pressure="0") > 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"reduction": {"ratio": "auto", "method": "pool"}}, "reduction.method"),
        ({"reduction": {"ratio": "auto", "bounds": [0.26, 0.3]}}, "reduction.bounds"),
        ({"reduction": {"group": "ocr"}}, "reduction.group"),
        ({"reduction_ratio": "automatic"}, "reduction_ratio"),
    ],
    ids=str,
)
def test_auto_that_can_not_be_is_refused(server: Live, fields: dict[str, Any], param: str) -> None:
    body = {name: value for name, value in example().items() if not name.startswith("reduction")}
    answer = server.ask("POST", "/v1/chat/completions", body | fields)
    assert (answer.status, answer.json["error"]["param"]) == (400, param)


def test_the_calibration_is_shown(server: Live) -> None:
    shown = server.ask("GET", "/v1/reducers").json["auto"]
    assert (shown["groups"], shown["target"], shown["bounds"]) == ({"ocr": 9, "color_at": 1}, 0.05, [0, 0.75])


def settle(server: Live) -> None:
    """Until all answers of earlier tests are checked."""

    def is_settled() -> bool:
        before = server.metrics("foldserve_checked_answers_total")
        time.sleep(0.5)
        return server.metrics("foldserve_checked_answers_total") == before

    server.wait(is_settled)


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({"reduction_ratio": 0.3}, {"method": "folder", "ratio_bucket": "<=0.5", "group": ""}),
        ({"reduction_ratio": 0.98, "stream": True}, {"method": "folder", "ratio_bucket": "<=1.0", "group": ""}),
        ({"reduction": {"ratio": "auto", "group": "ocr"}}, {"method": "folder", "group": "ocr"}),
    ],
    ids=["same answer", "another, streamed", "auto"],
)
def test_reduced_answers_are_checked_against_those_with_all_tokens(
    server: Live, fields: dict[str, Any], labels: dict[str, str]
) -> None:
    body = {name: value for name, value in example().items() if not name.startswith("reduction")}
    body["messages"][0]["content"][1]["text"] = "How many objects are there?"
    full = server.ask("POST", "/v1/chat/completions", body).json["choices"][0]["message"]["content"]
    whole = body | fields | {"stream": False}
    reduced = server.ask("POST", "/v1/chat/completions", whole).json["choices"][0]["message"]["content"]

    def checked(changed: bool) -> float:
        return server.metrics("foldserve_checked_answers_total", changed="yes" if changed else "no", **labels)

    changed = reduced != full
    server.wait(lambda: checked(changed) > 0)
    settle(server)
    before, other = checked(changed), checked(not changed)
    nats = server.metrics("foldserve_checked_kl_nats_count", **labels)
    server.ask("POST", "/v1/chat/completions", body | fields)
    server.wait(lambda: checked(changed) == before + 1)
    assert checked(not changed) == other
    assert server.metrics("foldserve_checked_kl_nats_count", **labels) == nats + 1
    assert server.metrics("foldserve_checks_skipped_total") == 0
    assert changed == (labels.get("ratio_bucket") == "<=1.0")


def test_answers_with_all_tokens_are_not_checked_and_drawn_ones_tell_nothing_of_a_change(server: Live) -> None:
    body = {name: value for name, value in example().items() if not name.startswith("reduction")}
    settle(server)
    total = server.metrics("foldserve_checked_answers_total")
    server.ask("POST", "/v1/chat/completions", body)
    drawn = server.metrics("foldserve_checked_answers_total", changed="sampled")
    server.ask("POST", "/v1/chat/completions", body | {"reduction_ratio": 0.5, "temperature": 1})
    server.wait(lambda: server.metrics("foldserve_checked_answers_total", changed="sampled") == drawn + 1)
    assert server.metrics("foldserve_checked_answers_total") == total + 1
