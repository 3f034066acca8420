"""Bad inputs of all kinds against a live server: each gets a clear error, and nothing is left behind.

The last test checks that the same processes run, no KV block is held, and an answer is the same bit for bit.
"""

from __future__ import annotations

import gzip
import http.client
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.api.apis import APIS, Api
from tests.api.hostile import Handler, hostile_server
from tests.api.test_limits import BAD_BODIES, BAD_FIELDS, BAD_JSON
from tests.api.test_media_address import PRIVATE, SPELLINGS
from tests.api.test_media_decode import REFUSED, SOUND, data, solid_png
from tests.api.test_media_metadata import CHUNKS, png_before
from tests.api.test_misplaced import ECHOES, FUNCTIONS, MEDIA, REDUCTIONS
from tests.images import data_uri, photo

LEAKS = re.compile(
    r"site-packages|\.(py|cc|h)\b|\b0x[0-9a-f]{6}|Traceback|PIL|aiohttp|BytesIO|Errno|127\.0\.0|/root|/home|/usr"
    # what the texts of pydantic, vLLM and its grammar backends begin or end with
    r"|(?i:pydantic|vllm(?!_xargs)|xgrammar|lark)|Input should|Value error|\(parameter=|context length is|--enable-"
)
PICTURE = data_uri(photo(1))


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(url: object) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def chat(*parts: object, **more: object) -> dict[str, Any]:
    body = {"model": "tiny", "max_tokens": 2, "temperature": 0}
    return body | {"messages": [{"role": "user", "content": list(parts) or [TEXT]}]} | more


TEXT = text("What is in the picture?")


class Client:
    """Sends bodies and judges answers.

    Args:
        api: that chats are sent through; bodies that are bytes, too, but as they are.
    """

    def __init__(self, url: str, api: Api = APIS["chat"]) -> None:
        self.url = url
        self.api = api
        self._http = httpx.Client(base_url=url, timeout=120)

    @property
    def endpoint(self) -> str:
        return f"{self.url}{self.api.path}"

    def content(self, body: dict[str, Any]) -> bytes:
        """A chat's body in the API's form."""
        return json.dumps(self.api.body(body)).encode()

    def post(self, body: dict[str, Any] | bytes) -> httpx.Response:
        content = body if isinstance(body, bytes) else self.content(body)
        return self._http.post(self.api.path, content=content, headers={"Content-Type": "application/json"})

    def answers(self, body: dict[str, Any] | bytes) -> dict[str, Any]:
        answer = self.post(body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def refuses(
        self, body: dict[str, Any] | bytes, param: str | None, code: str | None = None, status: int = 400
    ) -> str:
        """The message of a refusal; `param` is the chat's."""
        if param is not None and isinstance(body, dict):
            param = self.api.param(param, body)
        answer = self.post(body)
        assert answer.status_code == status, answer.text[:500]
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] in ("invalid_request_error", "not_found_error")
        assert (error["type"] == "not_found_error") == (status == 404 and self.api is APIS["messages"])
        assert error["param"] == param
        assert code is None or error["code"] == code
        assert not LEAKS.search(answer.text), answer.text
        return str(error["message"])

    def metric(self, name: str) -> float:
        families = text_string_to_metric_families(self._http.get("/metrics").text)
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)

    def close(self) -> None:
        self._http.close()


REFERENCE = chat(image(PICTURE), TEXT, max_tokens=8, logprobs=True, top_logprobs=5, reduction_ratio=0.5)


def processes(url: str) -> set[tuple[int, float]]:
    """Process id and start of the server's processes, the engine's among them."""
    port = str(urlsplit(url).port)
    server = next(p for p in psutil.process_iter(["cmdline"]) if port in (p.info["cmdline"] or ()))
    return {(p.pid, p.create_time()) for p in (server, *server.children(recursive=True))}


@pytest.fixture(scope="module")
def client(server_url: str) -> Iterator[Client]:
    client = Client(server_url)
    yield client
    client.close()


@pytest.fixture(scope="module")
def clients(server_url: str) -> Iterator[dict[str, Client]]:
    clients = {name: Client(server_url, api) for name, api in APIS.items()}
    yield clients
    for client in clients.values():
        client.close()


@pytest.fixture(params=APIS)
def any_client(clients: dict[str, Client], request: pytest.FixtureRequest) -> Client:
    """Of each API in turn."""
    return clients[request.param]


@pytest.fixture(scope="module", autouse=True)
def before(client: Client) -> tuple[set[tuple[int, float]], list[Any]]:
    client.answers(REFERENCE)  # from now on its prefix is cached
    choices = client.answers(REFERENCE)["choices"]
    return processes(client.url), choices


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    with hostile_server() as url:
        yield url


# 1. The body


@pytest.mark.parametrize(
    ("body", "param"), [(body, param) for body, _, _, param in BAD_JSON[:-3]], ids=lambda v: str(v)[:40]
)
def test_bad_json(body: bytes, param: str | None, any_client: Client) -> None:
    any_client.refuses(body, param)


@pytest.mark.parametrize("body", [b"[]", b"5", b'"x"', b"null", b"{}", b'{"messages": []}', b'{"messages": 5}'])
def test_json_of_another_shape(body: bytes, any_client: Client) -> None:
    answer = any_client.post(body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
    assert not LEAKS.search(answer.text)


def test_deep_json(any_client: Client) -> None:
    deep = b'{"messages": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"
    assert "nested" in any_client.refuses(deep, None, "limit_exceeded")


def test_a_flood_of_values(any_client: Client) -> None:
    any_client.refuses(b'{"messages": [' + b"0," * 300_000 + b"0]}", None, "limit_exceeded")


def test_a_body_of_200_mb_is_refused_by_its_header(client: Client) -> None:
    connection = http.client.HTTPConnection(urlsplit(client.url).netloc, timeout=30)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "200000000")
    connection.endheaders(b"{")
    answer = connection.getresponse()
    assert answer.status == 413
    assert json.loads(answer.read())["error"]["code"] == "body_too_large"
    assert connection.sock.recv(1) == b"", "the connection ends, whatever was announced"
    connection.close()


def test_a_body_without_a_length_is_counted(any_client: Client) -> None:
    connection = http.client.HTTPConnection(urlsplit(any_client.url).netloc, timeout=30)
    connection.putrequest("POST", any_client.api.path)
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    for _ in range(33):
        connection.send(b"f4240\r\n" + b" " * 1_000_000 + b"\r\n")
    answer = connection.getresponse()
    assert answer.status == 413
    connection.close()


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", "application/x-www-form-urlencoded", ""])
def test_bodies_that_are_not_declared_as_json(kind: str, any_client: Client) -> None:
    headers = {"Content-Type": kind} if kind else {}
    answer = httpx.post(any_client.endpoint, content=any_client.content(chat()), headers=headers)
    assert answer.status_code == 400
    assert "application/json" in answer.json()["error"]["message"]


# 2. Reductions are in test_chat.py; this one needs its own spelling


def test_a_ratio_too_small_for_a_float(client: Client) -> None:
    body = json.dumps(chat(image(PICTURE), TEXT)).encode()[:-1] + b', "reduction_ratio": 1e-400}'
    assert client.answers(body)["usage"]["vision_tokens"]["ratio"] == 0


# 3. data: URLs, 4. files, 5. sizes

URL = "messages[0].content[0].image_url.url"


@pytest.mark.parametrize(
    "url",
    [
        "data:",
        "data:image/png;base64",
        "data:image/png;base64,",
        "data:image/png;base64,AAA",
        "data:text/html,<b>",
        "data:text/html;base64,AAAA",
        "data:image/png,AAAA",
        "data:image/png;base64,AA%3D%3D",
        PICTURE + "\n",
    ],
    ids=lambda url: ascii(url)[:40],
)
def test_bad_data_urls(url: str, any_client: Client) -> None:
    any_client.refuses(chat(image(url), TEXT), URL, "invalid_image")


@pytest.mark.parametrize("name", REFUSED)
def test_bad_files(name: str, any_client: Client) -> None:
    any_client.refuses(chat(image(data(REFUSED[name])), TEXT), URL, "invalid_image")


@pytest.mark.parametrize("name", [name for name in CHUNKS if len(CHUNKS[name]) < 2_000_000])  # the server's limit
def test_metadata_that_are_damaged_or_too_large(name: str, client: Client) -> None:
    assert client.answers(chat(image(data(png_before(CHUNKS[name]))), TEXT))["usage"]["vision_tokens"]["encoded"] == 144


@pytest.mark.parametrize("name", SOUND)
def test_unusual_files(name: str, client: Client) -> None:
    assert client.answers(chat(image(data(SOUND[name])), TEXT))["usage"]["vision_tokens"]["encoded"] == 144


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (13_000, 13_000), (20_000, 20_000)], ids=str)
def test_bad_sizes(size: tuple[int, int], any_client: Client) -> None:
    any_client.refuses(chat(image(data(solid_png(*size))), TEXT), URL, "limit_exceeded")


def test_files_that_are_too_large(any_client: Client) -> None:
    any_client.refuses(chat(image(data(bytes(2_000_001)))), URL, "limit_exceeded")


# 6. Many images


@pytest.mark.parametrize(
    "url", [PICTURE[:200], "https://example.com/a.png", "http://127.0.0.1/a"], ids=["data", "public", "private"]
)
def test_999_images(url: str, any_client: Client, web: str) -> None:
    assert "16 images" in any_client.refuses(chat(*[image(url)] * 999), "messages", "limit_exceeded")


def test_more_images_than_the_context_holds(any_client: Client) -> None:
    message = any_client.refuses(chat(*[image(PICTURE)] * 8, TEXT), "messages", "limit_exceeded")
    assert "1024 tokens" in message


# 7. URLs


@pytest.mark.parametrize("url", SPELLINGS[:-1], ids=lambda url: ascii(url)[:60])
def test_bad_urls(url: str, any_client: Client) -> None:
    any_client.refuses(chat(TEXT, image(url)), "messages[0].content[1].image_url.url", "refused_image_url")


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(address: str, any_client: Client) -> None:
    host = f"[{address}]" if ":" in address else address
    any_client.refuses(chat(image(f"http://{host}:9/x"), TEXT), URL, "refused_image_url")


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:9/x", "http://[::1]/x", "http://169.254.169.254/", "file:///etc/passwd"]
)
def test_redirects_to_private_addresses(target: str, any_client: Client, web: str) -> None:
    any_client.refuses(chat(image(f"{web}/redirect/{target}"), TEXT), URL, "refused_image_url")


def test_the_server_never_asks_itself(any_client: Client, web: str) -> None:
    """Its own address, behind which it would answer."""
    any_client.refuses(chat(image(f"{any_client.url}/v1/models"), TEXT), URL, "refused_image_url")
    any_client.refuses(chat(image(f"{web}/redirect/{any_client.url}/v1/models"), TEXT), URL, "refused_image_url")


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("loop", "image_unavailable"),
        ("nowhere", "image_unavailable"),
        ("status/404", "image_unavailable"),
        ("status/500", "image_unavailable"),
        ("short", "image_unavailable"),
        ("garbage", "image_unavailable"),
        ("empty", "invalid_image"),
        ("text", "invalid_image"),
        ("gzip", "invalid_image"),
        ("announced", "limit_exceeded"),
        ("endless", "limit_exceeded"),
    ],
)
def test_bad_web_servers(path: str, code: str, any_client: Client, web: str) -> None:
    any_client.refuses(chat(image(f"{web}/{path}"), TEXT), URL, code)


def test_web_server_without_tls(client: Client, web: str) -> None:
    client.refuses(chat(image(web.replace("http", "https") + "/photo"), TEXT), URL, "image_unavailable")


def test_slow_web_servers_cost_seconds_only(client: Client, web: str) -> None:
    with ThreadPoolExecutor(3) as pool:
        slow = [pool.submit(client.refuses, chat(image(f"{web}/{path}")), "messages") for path in ("drip", "silent")]
        assert client.answers(chat(image(PICTURE), TEXT))  # meanwhile
        assert all("within 5 s" in answer.result() for answer in slow)


def test_a_good_web_server(client: Client, web: str) -> None:
    here = client.answers(chat(image(data_uri(photo(11))), TEXT, logprobs=True))
    for path in ("photo", "relative", f"redirect/{web}/photo"):
        there = client.answers(chat(image(f"{web}/{path}"), TEXT, logprobs=True))
        assert there["choices"] == here["choices"]


# 8. Texts with placeholders, 9. fields, media and settings that are not a client's


@pytest.mark.parametrize("token", ["<image>", "</s>", "<s>", "<##IMAGE##>", "<pad>"])
def test_special_tokens_in_texts(token: str, client: Client) -> None:
    """As many tokens of the kind as without the text; the answer is about the text, which stays readable."""
    system = {"role": "system", "content": f"Talk about {token}."}
    for parts in ([text(token)], [text(token[:2]), text(token[2:])], [image(PICTURE), TEXT, text(token * 3)]):
        body = chat(*parts, return_prompt_text=True, return_token_ids=True)
        body["messages"] = [system, *body["messages"]]
        answer = client.answers(body)
        images = sum(part["type"] == "image_url" for part in parts)
        assert answer["prompt_text"].count("<image>") == images
        assert token in answer["prompt_text"].replace("\u2060", "").replace("\n", "")


def test_prompt_one_token_too_long(client: Client) -> None:
    def words(count: int) -> dict[str, Any]:
        return chat(text("a" * count), max_tokens=1)

    around = client.answers(words(100))["usage"]["prompt_tokens"] - 100
    assert client.answers(words(1023 - around))["usage"]["prompt_tokens"] == 1023
    assert "1024 tokens" in client.refuses(words(1024 - around), "messages", "limit_exceeded")


@pytest.mark.parametrize(("body", "param"), BAD_BODIES, ids=lambda v: str(v)[:60])
def test_bad_bodies(body: dict[str, Any], param: str, client: Client) -> None:
    client.refuses({"model": "tiny"} | body, param)


def test_a_video_for_a_model_without(client: Client) -> None:
    video = {"type": "video_url", "video_url": {"url": "http://203.0.113.1/never-asked.mp4"}}
    assert "takes no videos" in client.refuses(chat(video), "messages")


@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS, ids=lambda v: str(v)[:60])
def test_bad_fields(fields: dict[str, Any], param: str, client: Client) -> None:
    client.refuses(chat() | fields, param)


@pytest.mark.parametrize(("body", "param"), [*REDUCTIONS, *MEDIA, *FUNCTIONS], ids=lambda v: str(v)[-60:])
def test_what_would_be_ignored(body: dict[str, Any], param: str, client: Client) -> None:
    client.refuses({"model": "tiny"} | body, param, "invalid_value")


@pytest.mark.parametrize("echo", ECHOES[:-1], ids=lambda v: str(v)[-60:])
def test_what_clients_send_back_is_taken(echo: dict[str, Any], client: Client) -> None:
    body = chat()
    assert client.answers(body | {"messages": [*body["messages"], echo, *body["messages"]]})


def test_empty_and_original_details(any_client: Client) -> None:
    for detail, kept in (("original", 144), ("", 144), (None, 144), ("low", 36)):
        part = image(PICTURE)
        part["image_url"]["detail"] = detail
        assert any_client.answers(chat(part, TEXT))["usage"]["vision_tokens"]["kept"] == kept


@pytest.mark.parametrize("content", ["done", [TEXT], [image(PICTURE)]], ids=["text", "parts", "image"])
def test_a_message_that_the_template_refuses(content: object, client: Client) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "screenshot", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": content},
    ]
    assert "template refuses messages[2] (role: tool)" in client.refuses(chat(messages=messages), "messages[2]")


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
def test_a_compressed_body(named: bool, any_client: Client) -> None:
    headers = {"Content-Type": "application/json"} | ({"Content-Encoding": "gzip"} if named else {})
    content = gzip.compress(any_client.content(chat()))
    answer = httpx.post(any_client.endpoint, content=content, headers=headers, timeout=60)
    assert (answer.status_code, answer.headers["accept-encoding"]) == (400, "identity")
    assert "compressed (gzip)" in answer.json()["error"]["message"]


@pytest.mark.parametrize("token", [514, 575])
@pytest.mark.parametrize("name", ["logit_bias", "allowed_token_ids", "stop_token_ids", "logprob_token_ids"])
def test_padding_of_the_vocabulary(name: str, token: int, client: Client) -> None:
    """The tokenizer knows 514 tokens; the model has 576 rows of embeddings."""
    value: object = {str(token): 100} if name == "logit_bias" else [token]
    assert "tokenizer" in client.refuses(chat(**{name: value}, logprobs=True), name, "invalid_value")
    last = {"513": 0} if name == "logit_bias" else [513]
    assert client.post(chat(**{name: last}, logprobs=True)).status_code == 200


@pytest.mark.parametrize("penalty", [-10, -1, 0, 10])
def test_penalties_of_beams(penalty: float, client: Client) -> None:
    assert client.answers(chat(use_beam_search=True, n=2, length_penalty=penalty, max_tokens=3))


def test_prompts_that_are_cut(client: Client) -> None:
    """The same tokens whether the side is named or not, and at no cost for what is cut."""

    def tokens(words: str, **side: str) -> list[int]:
        answer = client.answers(chat(text(words), truncate_prompt_tokens=9, return_token_ids=True, **side))
        return list(answer["prompt_token_ids"])

    words = "".join(f"word {i} " for i in range(30))
    first, last = tokens(words, truncation_side="right"), tokens(words, truncation_side="left")
    assert tokens(words) == last != first  # as vLLM sets its tokenizers
    assert len(first) == len(last) == 9
    assert len(tokens("word " * 2_000_000)) == 9


@pytest.mark.parametrize(
    "words", ["<s>" * 1_000_000, "<" * 9_000_000, "\u00e9" * 5_000_000], ids=["token", "first", "é"]
)
def test_long_texts_are_refused_by_their_length(words: str, any_client: Client) -> None:
    assert "characters" in any_client.refuses(chat(text(words)), "messages", "limit_exceeded")


SCHEMAS: dict[str, dict[str, Any]] = {
    "regex": {"structured_outputs": {"regex": "(("}},
    "regex-lookbehind": {"structured_outputs": {"regex": "(?<=a)b"}},
    "grammar": {"structured_outputs": {"grammar": "root ::= ("}},
    "choice-empty": {"structured_outputs": {"choice": []}},
    "json-type": {"structured_outputs": {"json": {"type": "nonsense"}}},
    "schema-type": {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "x"}}}},
    "schema-ref": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#/nowhere"}}}
    },
    "format": {"response_format": {"type": "yaml"}},
    "tag": {"response_format": {"type": "structural_tag", "structures": [], "triggers": ["("]}},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_bad_schemas(name: str, client: Client) -> None:
    answer = client.post(chat() | SCHEMAS[name])
    assert answer.status_code == 400, answer.text
    assert not LEAKS.search(answer.text), answer.text


@pytest.mark.parametrize("name", SCHEMAS)
def test_bad_schemas_in_streams(name: str, client: Client) -> None:
    """What is found out only after the stream has begun is an event of the same shape, and the stream is ended."""
    answer = client.post(chat(stream=True) | SCHEMAS[name])
    assert not LEAKS.search(answer.text), answer.text
    if answer.status_code == 200:
        *_, last, done = [line for line in answer.text.splitlines() if line]
        assert done == "data: [DONE]"
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_value")
        assert error["param"] in SCHEMAS[name]
    else:
        assert answer.status_code == 400


def test_tools_on_a_server_that_has_no_parser_for_them(client: Client) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    for choice in ("auto", "required", {"type": "function", "function": {"name": "f"}}):
        client.refuses(chat(tools=tools, tool_choice=choice), "tool_choice", "invalid_value")
    assert client.answers(chat(tools=tools, tool_choice="none"))


def test_another_model(any_client: Client) -> None:
    any_client.refuses(chat(model="zygote"), "model", "not_found", status=404)


@pytest.mark.parametrize(("header", "value"), [("x-data-parallel-rank", "99"), ("x-data-parallel-rank", "-1")])
def test_headers_that_are_not_a_clients(header: str, value: str, any_client: Client) -> None:
    """vLLM reads this one; a router may set it."""
    body = any_client.api.body(chat())
    answer = httpx.post(any_client.endpoint, json=body, headers={header: value}, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert not LEAKS.search(answer.text), answer.text


def test_references_of_a_schema_are_not_fetched(client: Client, web: str) -> None:
    Handler.asked.clear()
    schema = {"name": "a", "schema": {"$ref": f"{web}/photo"}}
    client.post(chat(response_format={"type": "json_schema", "json_schema": schema}))
    assert Handler.asked == []


# 10. Clients that hang up


def at_rest(client: Client) -> bool:
    running = client.metric("vllm:num_requests_running") + client.metric("vllm:num_requests_waiting")
    return running == 0 and client.metric("vllm:kv_cache_usage_perc") == 0


def wait_until_at_rest(client: Client) -> None:
    deadline = time.monotonic() + 60
    while not at_rest(client):
        assert time.monotonic() < deadline, "requests or KV blocks are still held"
        client.answers(chat(max_tokens=1))  # a step of the engine, after which it reports
        time.sleep(0.2)


@pytest.mark.parametrize("phase", ["fetching", "prefill", "decoding"])
def test_clients_that_hang_up(phase: str, any_client: Client, client: Client, web: str) -> None:
    if phase == "fetching":
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(any_client.endpoint, json=any_client.api.body(chat(image(f"{web}/silent"))), timeout=1)
    else:
        body = any_client.api.body(chat(image(PICTURE), TEXT, max_tokens=800, ignore_eos=True, stream=True))
        with httpx.stream("POST", any_client.endpoint, json=body, timeout=120) as answer:
            if phase == "decoding":
                assert answer.status_code == 200
                next(answer.iter_lines())
    wait_until_at_rest(client)


# 11. One image at two ratios at once


def test_one_image_at_several_ratios_at_once(client: Client) -> None:
    bodies = [chat(image(PICTURE), TEXT, reduction_ratio=ratio, max_tokens=6) for ratio in (0, 0.25, 0.5, 0.75)]
    alone = [client.answers(body)["choices"] for body in bodies]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(client.answers, bodies * 2))
    assert [answer["choices"] for answer in together] == alone * 2
    assert [answer["usage"]["vision_tokens"]["kept"] for answer in together] == [144, 108, 72, 36] * 2


def test_a_ratio_changed_between_turns(client: Client) -> None:
    """With the first turn in the prefix cache or without: another salt finds nothing there."""
    first = client.answers(chat(image(PICTURE), TEXT, reduction_ratio=0.5, max_tokens=6))
    said = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}

    def second(ratio: float, salt: str | None) -> tuple[Any, int]:
        body = chat(image(PICTURE), TEXT, reduction_ratio=ratio, max_tokens=6, cache_salt=salt)
        answer = client.answers(body | {"messages": [*body["messages"], said, {"role": "user", "content": "And now?"}]})
        return answer["choices"], answer["usage"]["vision_tokens"]["kept"]

    for ratio, kept in ((0.25, 108), (0.75, 36), (0.5, 72)):
        assert (
            second(ratio, None)
            == second(ratio, f"turns at {ratio}".replace(" ", "-"))
            == (second(ratio, None)[0], kept)
        )


# 14. Odd requests for other things


@pytest.mark.parametrize(
    "path", ["/tokenize", "/detokenize", "/pooling", "/v1/embeddings", "/v1/files", "/%2e%2e/x", "/"]
)
def test_other_paths(path: str, client: Client) -> None:
    answer = httpx.post(f"{client.url}{path}", json=chat(image("http://127.0.0.1/x")))
    assert answer.status_code in (404, 405)
    assert answer.json()["error"]["message"]
    assert not LEAKS.search(answer.text)


def test_nothing_is_left(client: Client, before: tuple[set[tuple[int, float]], list[Any]]) -> None:
    wait_until_at_rest(client)
    assert processes(client.url) == before[0]
    assert client.answers(REFERENCE)["choices"] == before[1]
