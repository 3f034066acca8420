"""The real openai client against the real server."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from foldserve.reducers import METHODS
from tests.api.apis import APIS
from tests.images import data_uri, photo

ENCODED = 144
TEXT = {"type": "text", "text": "What is in the picture?"}


def image_part(seed: int = 1, detail: str | None = None) -> dict[str, Any]:
    source = {"url": data_uri(photo(seed))} | ({"detail": detail} if detail else {})
    return {"type": "image_url", "image_url": source}


def ask(client: openai.OpenAI, *parts: dict[str, Any], extra: Mapping[str, object] = {}, **options: Any) -> Any:
    messages: list[Any] = [{"role": "user", "content": [*parts, TEXT]}]
    defaults: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "temperature": 0, "logprobs": True}
    return client.chat.completions.create(messages=messages, extra_body=dict(extra), **(defaults | options))


def vision_tokens(answer: Any) -> dict[str, Any]:
    return dict(answer.usage.model_extra["vision_tokens"])


def expected(removed: int, method: str = "folder") -> dict[str, object]:
    kept = ENCODED - removed
    ratio = round(removed / ENCODED, 4)
    return {"encoded": ENCODED, "kept": kept, "withdrawn": 0, "method": method if removed else "none", "ratio": ratio}


def test_without_reduction(client: openai.OpenAI) -> None:
    answer = ask(client, image_part())
    assert vision_tokens(answer) == expected(0)
    assert answer.choices[0].message.content


@pytest.mark.parametrize(
    ("extra", "removed", "method"),
    [
        ({"reduction_ratio": 0.5}, 72, "folder"),
        ({"reduction_ratio": 0}, 0, "folder"),
        ({"reduction": {"ratio": 0.66}}, 95, "folder"),
        ({"reduction": {"method": "folder_cls", "ratio": 0.9}}, 129, "folder_cls"),
        ({"reduction": {"keep_tokens": 20}}, 124, "folder"),
    ],
)
def test_usage_tells_what_was_applied(
    client: openai.OpenAI, extra: dict[str, object], removed: int, method: str
) -> None:
    full = ask(client, image_part()).usage.prompt_tokens
    answer = ask(client, image_part(), extra=extra)
    assert vision_tokens(answer) == expected(removed, method)
    assert full - answer.usage.prompt_tokens == removed


def test_withdrawal(client: openai.OpenAI) -> None:
    """Withdrawn tokens are in the prompt, and counted apart; with a ratio on top, and beside a request without."""
    plain = ask(client, image_part())
    answer = ask(client, image_part(), extra={"reduction": {"withdraw": True}})
    assert vision_tokens(answer) == expected(0) | {"withdrawn": ENCODED, "withdraw_layer": 2, "decoder": "withdraw"}
    assert answer.usage.prompt_tokens == plain.usage.prompt_tokens
    assert answer.choices[0].logprobs != plain.choices[0].logprobs
    both = ask(client, image_part(), extra={"reduction": {"ratio": 0.5, "withdraw": True}})
    assert vision_tokens(both) == expected(72) | {"withdrawn": 72, "withdraw_layer": 2, "decoder": "withdraw"}
    again = ask(client, image_part())
    assert again.choices[0].message.content == plain.choices[0].message.content


@pytest.mark.parametrize("method", ["fastv", "illava_decoder"])
def test_tokens_chosen_in_the_decoder(client: openai.OpenAI, method: str) -> None:
    plain = ask(client, image_part())
    answer = ask(client, image_part(), extra={"reduction": {"method": method, "ratio": 0.75}})
    assert vision_tokens(answer) == expected(0) | {"withdrawn": 108, "withdraw_layer": 2, "decoder": method}
    assert answer.usage.prompt_tokens == plain.usage.prompt_tokens
    assert answer.choices[0].logprobs != plain.choices[0].logprobs


def test_stream_is_the_same_answer_and_ends_with_usage(client: openai.OpenAI) -> None:
    whole = ask(client, image_part(2), extra={"reduction_ratio": 0.5})
    stream = ask(
        client, image_part(2), extra={"reduction_ratio": 0.5}, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk for chunk in chunks if chunk.usage] == chunks[-1:]
    assert vision_tokens(chunks[-1]) == expected(72)
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_stream_without_usage_carries_none(client: openai.OpenAI) -> None:
    chunks = list(ask(client, image_part(2), extra={"reduction_ratio": 0.5}, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def written(url: str, max_tokens: int) -> list[list[dict[str, Any]]]:
    """The events of each piece that the server wrote of a stream: uvicorn makes an HTTP chunk of each."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": [image_part(2), TEXT]}], "max_tokens": max_tokens}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    raw = connection.getresponse().fp
    pieces = []
    while size := int(raw.readline(), 16):
        pieces.append(raw.read(size).decode().removesuffix("\n\n").split("\n\n"))
        raw.readline()
    connection.close()
    assert pieces[-1].pop() == "data: [DONE]"
    return [[json.loads(event.removeprefix("data: ")) for event in piece] for piece in pieces]


def test_what_comes_together_is_written_together(server_url: str) -> None:
    """The role with the first token, the last token with usage and end; each token at once."""
    (only,) = written(server_url, 1)
    assert [len(event["choices"]) for event in only] == [1, 1, 0]
    *others, last = written(server_url, 3)  # as many as the event loop saw the engine's outputs one by one
    assert [event["choices"][0]["finish_reason"] for event in last[-2:-1]] == ["length"]
    assert last[-1]["usage"]["vision_tokens"] == expected(0)
    for number, piece in enumerate([*others, last[:-1]]):
        roles = [event["choices"][0]["delta"].get("role") for event in piece]
        assert roles == (["assistant", None] if number == 0 else [None])


def test_image_over_http(client: openai.OpenAI, image_url: str) -> None:
    answer = ask(client, {"type": "image_url", "image_url": {"url": image_url}}, extra={"reduction_ratio": 0.75})
    assert vision_tokens(answer) == expected(108)


def test_detail_chooses_per_image(client: openai.OpenAI) -> None:
    answer = ask(client, image_part(1, "high"), image_part(2, "low"), image_part(3, "auto"))
    assert vision_tokens(answer) == {
        "encoded": 3 * ENCODED,
        "kept": 2 * ENCODED + 36,
        "withdrawn": 0,
        "method": "mixed",
        "ratio": 0.25,
        "images": [expected(0), expected(108), expected(0)],
    }
    explicit = ask(client, image_part(1, "high"), image_part(2, "low"), extra={"reduction_ratio": 0.5})
    assert vision_tokens(explicit)["kept"] == ENCODED


def test_images_of_earlier_turns_count(client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "user", "content": [image_part(1), TEXT]},
        {"role": "assistant", "content": "A shape."},
        {"role": "user", "content": [image_part(2), TEXT]},
    ]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=4, extra_body={"reduction_ratio": 0.5}
    )
    assert vision_tokens(answer)["encoded"] == 2 * ENCODED


def test_a_query_is_the_text_beside_the_image_or_the_requests(client: openai.OpenAI) -> None:
    """Of all images of a message, and in later turns too."""
    first = [image_part(3), image_part(4), {"type": "text", "text": "Where is the red car?"}]
    turns: list[Any] = [{"role": "user", "content": first}]
    later = [*turns, {"role": "assistant", "content": "Left."}, {"role": "user", "content": "Which animal is on it?"}]

    def chosen(messages: list[Any], **query: str) -> list[float]:
        """The answer's log-probabilities, which show which vision tokens were kept."""
        answer: Any = client.chat.completions.create(
            model="tiny",
            messages=messages,
            max_tokens=4,
            temperature=0,
            logprobs=True,
            extra_body={"reduction": {"method": "mmtok", "ratio": 0.9, **query}},
        )
        assert vision_tokens(answer) == expected(129, "mmtok") | {"encoded": 2 * ENCODED, "kept": 30}
        return [token.logprob for token in answer.choices[0].logprobs.content]

    for messages in (turns, later):
        of_the_message = chosen(messages, query="Where is the red car?")
        assert chosen(messages) == pytest.approx(of_the_message, abs=1e-5)
        for other in ("Which animal is on it?", ""):
            assert chosen(messages, query=other) != pytest.approx(of_the_message, abs=1e-4)


def test_text_only(client: openai.OpenAI) -> None:
    answer = ask(client, extra={"reduction_ratio": 0.5})
    assert "vision_tokens" not in answer.usage.model_extra
    assert answer.choices[0].message.content


BAD_REDUCTIONS: list[tuple[dict[str, Any], str]] = [
    ({"reduction_ratio": -0.1}, "reduction_ratio"),
    ({"reduction_ratio": 1}, "reduction_ratio"),
    ({"reduction_ratio": 1.5}, "reduction_ratio"),
    ({"reduction_ratio": float("nan")}, "reduction_ratio"),
    ({"reduction_ratio": float("inf")}, "reduction_ratio"),
    ({"reduction_ratio": "0.5"}, "reduction_ratio"),
    ({"reduction_ratio": True}, "reduction_ratio"),
    ({"reduction_ratio": []}, "reduction_ratio"),
    ({"reduction_ratio": {}}, "reduction_ratio"),
    ({"reduction_ratio": 0.999}, "reduction_ratio"),
    ({"reduction": {"ratio": -0.1}}, "reduction.ratio"),
    ({"reduction": {"ratio": float("nan")}}, "reduction.ratio"),
    ({"reduction": {"ratio": "0.5"}}, "reduction.ratio"),
    ({"reduction": {"ratio": 0.999}}, "reduction.ratio"),
    ({"reduction": {"keep_tokens": 145}}, "reduction.keep_tokens"),
    ({"reduction": {"keep_tokens": 1}}, "reduction.keep_tokens"),
    ({"reduction": {"keep_tokens": 3.0}}, "reduction.keep_tokens"),
    ({"reduction": {"ratio": 0.5, "keep_tokens": 3}}, "reduction.ratio"),
    ({"reduction": {"method": "magic"}}, "reduction.method"),
    ({"reduction": {"ratios": 0.5}}, "reduction.ratios"),
    (
        {"reduction": {"method": "visionzip", "ratio": 0.5, "class_token": True, "positions": "keep"}},
        "reduction.class_token",
    ),
    ({"reduction": {"ratio": 0.5, "query": "where?"}}, "reduction.query"),
    ({"reduction": {"method": "mmtok", "query": "x" * 4097}}, "reduction.query"),
    ({"reduction": []}, "reduction"),
    ({"reduction": 0.5}, "reduction"),
    ({"reduction": {"withdraw": 1}}, "reduction.withdraw"),
    ({"reduction": {"withdraw": True}, "prompt_logprobs": 1}, "prompt_logprobs"),
    ({"reduction": {"ratio": 0.5}, "reduction_ratio": 0.5}, "reduction_ratio"),
    ({"mm_processor_kwargs": {"foldserve": {"ratio": 0.5}}}, "mm_processor_kwargs"),
]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(("extra", "param"), BAD_REDUCTIONS, ids=lambda value: str(value)[:60])
def test_bad_reduction_is_a_400_with_its_param(server_url: str, extra: dict[str, object], param: str, api: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": [image_part(), TEXT]}], "max_tokens": 2, **extra}
    answer = httpx.post(
        f"{server_url}{APIS[api].path}",
        content=json.dumps(APIS[api].body(body)),  # NaN and all, which httpx' own encoder refuses
        headers={"Content-Type": "application/json"},
        timeout=60,
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "invalid_value"
    assert error["message"]


def test_the_client_sees_openai_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, image_part(), extra={"reduction_ratio": 1.5})
    assert caught.value.param == "reduction_ratio"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, image_part(1, "huge"))
    assert caught.value.param == "messages[0].content[0].image_url.detail"
    with pytest.raises(openai.NotFoundError):
        ask(client, image_part(), model="another")
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, image_part(), max_tokens=10**6)
    assert caught.value.body["type"] == "invalid_request_error"  # type: ignore[index]


def test_bad_requests_leave_the_engine_as_it_was(client: openai.OpenAI) -> None:
    before = ask(client, image_part(5), extra={"reduction_ratio": 0.5})
    for extra, _ in BAD_REDUCTIONS:
        if "nan" not in str(extra) and "inf" not in str(extra):
            with pytest.raises(openai.BadRequestError):
                ask(client, image_part(5), extra=extra)
    after = ask(client, image_part(5), extra={"reduction_ratio": 0.5})
    assert after.choices[0].message.content == before.choices[0].message.content
    assert after.choices[0].logprobs == before.choices[0].logprobs


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/messages/count_tokens", "/v1/chat/completions/batch", "/invocations"]
)
def test_routes_that_would_ignore_the_reduction_are_refused(server_url: str, path: str) -> None:
    answer = httpx.post(f"{server_url}{path}", json={"model": "tiny", "prompt": "x", "reduction_ratio": 0.5})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unsupported_route"


def test_catalog(server_url: str) -> None:
    catalog = httpx.get(f"{server_url}/v1/reducers").json()
    elsewhere = ("stf", "base_only", "vidcom2", "evs")
    assert [method["id"] for method in catalog["data"]] == [name for name in METHODS if name not in elsewhere]
    assert {method["stage"] for method in catalog["data"]} == {"before_tower", "in_tower", "after_tower", "decoder"}
    assert {modality for method in catalog["data"] for modality in method["modalities"]} == {"image"}
    assert catalog["positions"] == {"default": "renumber", "can_keep": True}
    assert catalog["vision_tokens_per_image"] == ENCODED
    assert catalog["low_detail"] == {"ratio": 0.75}
    assert catalog["default_reduction"] == {}
    assert catalog["withdraw_layer"] == 2
    fields = {method["id"]: method["options"] for method in catalog["data"]}
    assert fields["mmtok"]["query"]["maxLength"] == 4096 and "query" not in fields["folder"]
    assert catalog["calibration"] is None  # K was given by number


def test_openapi_documents_the_fields(server_url: str) -> None:
    schema = httpx.get(f"{server_url}/openapi.json").json()
    fields = schema["components"]["schemas"]["FoldChatRequest"]["properties"]
    assert all(name in fields["reduction"]["properties"]["method"]["description"] for name in METHODS)
    assert "by default [5, 6, 7, 8]" in fields["reduction"]["properties"]["layers"]["description"]
    assert fields["reduction_ratio"]["anyOf"][0]["exclusiveMaximum"] == 1


def scrape(url: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_metrics_sum_over_api_servers(server_url: str) -> None:
    """Fresh connections spread over both API processes; the page adds them up."""
    before = scrape(server_url)
    half: dict[str, object] = {"reduction_ratio": 0.5}
    withdrawn: dict[str, object] = {"reduction": {"withdraw": True}}
    for i, extra in enumerate((half, half, half, half, withdrawn, withdrawn)):
        with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none") as fresh:
            list(ask(fresh, image_part(i), extra=extra, stream=i % 2 == 0))
    after = scrape(server_url)

    def rise(name: str, **labels: str) -> float:
        if name == "foldserve_vision_tokens_total":
            labels |= {"modality": "image"}
        key = (name, tuple(sorted(labels.items())))
        return after[key] - before.get(key, 0.0)

    assert rise("foldserve_vision_tokens_total", stage="encoded", method="folder") == 4 * ENCODED
    assert rise("foldserve_vision_tokens_total", stage="kept", method="folder") == 4 * ENCODED / 2
    assert rise("foldserve_vision_tokens_total", stage="withdrawn", method="folder") == 0
    assert rise("foldserve_vision_tokens_total", stage="withdrawn", method="none") == 2 * ENCODED
    assert rise("foldserve_time_to_first_token_seconds_count", ratio_bucket="<=0.5") == 4
    assert rise("foldserve_time_to_first_token_seconds_count", ratio_bucket="0") == 2
    assert rise("foldserve_time_to_first_token_seconds_sum", ratio_bucket="<=0.5") > 0
    assert after["foldserve_resident_capacity_sequences", (("engine", "0"),)] > 1
    token_layer_bytes = 2 * 4 * 32 * 4  # keys and values, heads, head size, fp32
    layers, deep_layers = 4, 2
    saved = 4 * ENCODED / 2 * layers + 2 * ENCODED * deep_layers
    assert rise("foldserve_kv_bytes_saved_total") == saved * token_layer_bytes
