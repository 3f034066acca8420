"""Idefics3, whose images lie in pieces, and Gemma-3, whose image tokens attend both ways, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests import gemma3_checkpoint, idefics3_checkpoint
from tests.api.live import Live
from tests.images import data_uri, photo

WIDE = (640, 130)
TOKENS = {"gemma3": 36, "idefics3": 4 * 36}
"""Of the image: Gemma-3 makes it a square; the other has three tiles and the whole image."""

OPTIONS = {"gemma3": [], "idefics3": ["--withdraw-layer", "3"]}


@pytest.fixture(scope="module", params=TOKENS)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def server(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp(kind)
    if kind == "gemma3":
        checkpoint = gemma3_checkpoint.write(folder / "gemma3")
    else:
        checkpoint = idefics3_checkpoint.write(folder / "idefics3", "idefics3")
    live = Live(checkpoint, folder, "--max-model-len", "2048", *OPTIONS[kind])
    yield live
    live.end()


@pytest.fixture(scope="module")
def client(server: Live) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)


def ask(client: OpenAI, text: str = "What is it?", **fields: Any) -> Any:
    """The usage of an answer about one image."""
    image = {"type": "image_url", "image_url": {"url": data_uri(photo(1, *WIDE))}}
    messages: Any = [{"role": "user", "content": [image, {"type": "text", "text": text}]}]
    model = client.models.list().data[0].id
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=4, extra_body=fields)
    assert answer.usage is not None
    return answer.usage.to_dict()


def test_a_prompt_is_as_long_as_the_plan_says(kind: str, client: OpenAI) -> None:
    tokens = TOKENS[kind]
    whole, half = ask(client), ask(client, reduction_ratio=0.5)
    assert whole["vision_tokens"]["encoded"] == tokens == 2 * half["vision_tokens"]["kept"]
    assert whole["prompt_tokens"] - half["prompt_tokens"] == tokens // 2
    kept = ask(client, reduction={"ratio": 0.5, "positions": "keep"})["vision_tokens"]
    assert (kept["kept"], kept["positions"]) == (tokens // 2, "keep")


@pytest.mark.parametrize("mark", ["<start_of_image>", "<image_soft_token>", "<image>", "<row_1_col_1>"])
def test_a_mark_in_a_text_is_text(client: OpenAI, mark: str) -> None:
    plain, marked = ask(client), ask(client, text=f"What is {mark} it?")
    assert marked["vision_tokens"] == plain["vision_tokens"]
    assert marked["prompt_tokens"] > plain["prompt_tokens"] + len(mark)


def test_methods_in_the_decoder(kind: str, server: Live, client: OpenAI) -> None:
    """What no option of the server would change is told before what one would."""
    offered = {method["id"] for method in server.ask("GET", "/v1/reducers").json["data"]}
    before_the_decoder = {"folder", "random", "pool", "divprune", "cdpruner"}
    if kind == "idefics3":
        assert offered == before_the_decoder | {"withdraw"}
        vision = ask(client, reduction={"ratio": 0.5, "withdraw": True})["vision_tokens"]
        assert vision["withdrawn"] == vision["kept"] == TOKENS["idefics3"] // 2
    else:
        assert offered == before_the_decoder
        with pytest.raises(BadRequestError, match="attend to each other in both directions") as caught:
            ask(client, reduction={"withdraw": True})
        assert caught.value.param == "reduction.withdraw"
    reason = (
        "chooses among tokens that lie in one piece" if kind == "idefics3" else "choose a method before the decoder"
    )
    with pytest.raises(BadRequestError, match=reason) as caught:
        ask(client, reduction={"method": "fastv", "ratio": 0.5})
    assert caught.value.param == "reduction.method"
