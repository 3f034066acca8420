"""`POST /v1/reductions/map` of a real server, and how it waits for the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, MultiModalKwargsItem

from foldserve.server.api.errors import EngineStopped, InvalidRequest
from foldserve.server.api.lifecycle.state import Phase
from foldserve.server.api.reduction_map import TokenGroupReader
from foldserve.server.engine.grid_map import seconds_of
from tests.api.live import CHAT, chat
from tests.images import data_uri, photo

MAP = "/v1/reductions/map"


def image(seed: int = 1, width: int = 320, height: int = 240) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_uri(photo(seed, width, height))}}


def ask(url: str, path: str, body: dict[str, Any]) -> Any:
    return httpx.post(f"{url}{path}", json=body, timeout=300)


def grid_of(url: str, reduction: dict[str, Any], part: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """The whole answer, and its only grid."""
    response = ask(url, MAP, chat("what?", part or image(), reduction=reduction))
    assert response.status_code == 200, response.text
    answer = response.json()
    (item,) = answer["items"]
    (grid,) = item["grids"]
    return answer, grid


@pytest.mark.parametrize(
    "reduction",
    [
        {},
        {"ratio": 0.66},
        {"method": "tome", "ratio": 0.5},
        {"method": "downsample", "ratio": 0.5},
        {"method": "random", "ratio": 0.75},
        {"method": "folder", "ratio": 0.5, "withdraw": True},
    ],
    ids=str,
)
def test_a_map_is_of_what_a_chat_does(server_url: str, reduction: dict[str, Any]) -> None:
    answer, grid = grid_of(server_url, reduction)
    usage = ask(server_url, CHAT, chat("what?", image(), reduction=reduction)).json()["usage"]["vision_tokens"]
    (item,) = answer["items"]
    assert item["vision_tokens"].items() <= usage.items()
    assert (item["method"], item["modality"]) == (usage["method"], "image")
    assert len(grid["sizes"]) == len(grid["source"]) == usage["kept"]
    assert len(grid["group"]) == grid["rows"] * grid["columns"] == usage["encoded"]
    for group, (size, source) in enumerate(zip(grid["sizes"], grid["source"], strict=True)):
        assert grid["group"].count(group) == size and grid["group"][source] == group
    dropped = grid["group"].count(-1)
    assert dropped == (usage["encoded"] - usage["kept"] if reduction.get("method") == "random" else 0)
    assert (answer["object"], answer["model"]) == ("reduction.map", "tiny")
    withdraws = "withdraw" in reduction
    assert (answer["withdraw_layer"], answer["decoder"]) == ((2, "withdraw") if withdraws else (None, None))
    assert answer["layers"] > 2


def test_a_map_knows_what_the_tower_sees(server_url: str) -> None:
    """The tower sees the square in the middle."""
    answer, grid = grid_of(server_url, {"ratio": 0.5}, image(2, 320, 240))
    assert (answer["items"][0]["width"], answer["items"][0]["height"]) == (320, 240)
    assert grid["box"] == pytest.approx([0.125, 0, 0.875, 1])
    assert grid_of(server_url, {"ratio": 0.5}, image(2, 200, 400))[1]["box"] == pytest.approx([0, 0.25, 1, 0.75])


def test_a_map_of_an_image_that_the_engine_holds_is_the_same(server_url: str) -> None:
    """And the chat after it finds the image, which a map does not leave with the engine."""
    part = image(3)
    first = grid_of(server_url, {"ratio": 0.66}, part)
    body = chat("what?", part, reduction={"ratio": 0.66}, temperature=0)
    answers = {ask(server_url, CHAT, body).json()["choices"][0]["message"]["content"] for _ in range(3)}
    assert len(answers) == 1
    assert grid_of(server_url, {"ratio": 0.66}, part) == first


def test_several_images_and_several_maps_at_once_among_chats(server_url: str) -> None:
    body = chat("what?", image(4), image(5), reduction={"ratio": 0.5})
    with ThreadPoolExecutor(8) as pool:
        maps = [pool.submit(ask, server_url, MAP, body) for _ in range(6)]
        chats = [pool.submit(ask, server_url, CHAT, body) for _ in range(6)]
        answers = [one.result().json() for one in maps]
        assert all(one.result().status_code == 200 for one in chats)
    assert all(answer == answers[0] for answer in answers)
    first, second = (item["grids"][0]["group"] for item in answers[0]["items"])
    assert first != second
    assert grid_of(server_url, {"ratio": 0.5}, image(5))[1]["group"] == second


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (chat("what?", image(), stream=True), "stream", "invalid_value"),
        (chat("what?", image(), n=2), "n", "invalid_value"),
        (chat("no image"), "messages", "invalid_value"),
        (chat("what?", image(), reduction={"ratio": 2}), "reduction.ratio", "invalid_value"),
        (chat("what?", image(), reduction={"method": "nothing"}), "reduction.method", "invalid_value"),
        (
            chat("what?", {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}),
            "messages[0].content[0].image_url.url",
            "invalid_image",
        ),
    ],
    ids=["stream", "n", "no image", "ratio", "method", "bad image"],
)
def test_what_is_refused(server_url: str, body: dict[str, Any], param: str, code: str) -> None:
    response = ask(server_url, MAP, body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize(
    ("times", "grids", "seconds"),
    [((0, 0.5, 1.0), 3, [0, 0.5, 1.0]), ((0, 0.5, 1.0, 1.5, 2.00049), 3, [0, 1.0, 2.0]), ((0,), 1, [0])],
    ids=["a grid a frame", "two frames a grid, of an odd number", "one frame"],
)
def test_when_each_grid_of_a_video_is_shown(times: Sequence[float], grids: int, seconds: Sequence[float]) -> None:
    assert seconds_of(times, grids) == seconds


class FakeEngine:
    """Answers when it is told to."""

    def __init__(self, worker_cls: str = "foldserve.server.engine.worker_cpu.FoldWorker") -> None:
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(worker_cls=worker_cls))
        self.answers: list[asyncio.Future[list[Any]]] = []

    async def collective_rpc(self, method: str, args: Sequence[Any]) -> list[Any]:
        assert method == "token_groups"
        self.answers.append(asyncio.get_running_loop().create_future())
        return await self.answers[-1]


class FakeLifecycle:
    phase = Phase.SERVING

    @contextmanager
    def engine_call(self) -> Any:
        yield


ITEM = MultiModalKwargsItem({"x": MultiModalFieldElem(torch.zeros(2), MultiModalBatchedField())})


def asked(engine: FakeEngine, lifecycle: FakeLifecycle | None = None) -> TokenGroupReader:
    client: Any = engine
    life: Any = lifecycle or FakeLifecycle()
    return TokenGroupReader(client, life)


def test_one_at_a_time_also_when_the_first_client_has_gone() -> None:
    async def run() -> None:
        engine = FakeEngine()
        groups = asked(engine)
        first, second = asyncio.create_task(groups.of(ITEM)), asyncio.create_task(groups.of(ITEM))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.sleep(0.01)
        assert first.cancelled() and len(engine.answers) == 1  # the engine still works on it
        engine.answers[0].set_exception(RuntimeError("of the first"))
        await asyncio.sleep(0.01)
        assert len(engine.answers) == 2
        engine.answers[1].set_result([None, [([0], [0])]])  # the second rank answers
        assert await second == [([0], [0])]

    asyncio.run(run())


def test_an_engine_that_ends_ends_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldserve.server.api.reduction_map._LOOK_S", 0.01)

    async def run() -> None:
        lifecycle = FakeLifecycle()
        waiting = asyncio.create_task(asked(FakeEngine(), lifecycle).of(ITEM))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        lifecycle.phase = Phase.STOPPED
        with pytest.raises(EngineStopped):
            await waiting

    with suppress(asyncio.CancelledError):
        asyncio.run(run())


def test_an_engine_with_another_worker_has_no_map() -> None:
    with pytest.raises(InvalidRequest, match="foldserve's worker"):
        asyncio.run(asked(FakeEngine("auto")).of(ITEM))
