"""Batches without an engine: the format of a line, the two files, kills at any moment, what is in flight."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foldserve.server.api.batch import lines, results, run, survey
from foldserve.server.api.batch.files import LocalFiles
from foldserve.server.api.batch.front import Reply
from foldserve.server.api.batch.lines import BatchLine, read_lines, read_request
from foldserve.server.api.batch.results import LineResult, OutputFile
from foldserve.server.api.batch.run import BatchRun, EngineEnded, LineAnswerer, ProgressBar
from foldserve.server.api.batch.survey import Survey
from foldserve.server.api.errors import FoldserveError
from foldserve.server.limits import Limits

URL = "/v1/chat/completions"
LONGEST = 1000


def entry(custom_id: str, **changes: object) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": URL, "body": {"messages": []}} | changes


def write(path: Path, *requests: object) -> Path:
    path.write_text("".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in requests))
    return path


def test_lines_are_numbered_and_long_ones_cut(tmp_path: Path) -> None:
    """A line that is too long is still known by its id, and the next one begins where it should."""
    long = json.dumps(entry("long", body={"messages": ["x" * 5000]}))
    file = tmp_path / "in"
    file.write_text(f"\n{json.dumps(entry('a'))}\n  \n{long}\n{json.dumps(entry('last'))}")
    with file.open("rb") as content:
        found = list(read_lines(content, LONGEST))
    assert [(line.number, line.custom_id, line.is_whole) for line in found] == [
        (2, "a", True),
        (4, "long", False),
        (5, "last", True),
    ]


@pytest.mark.parametrize(
    ("content", "param", "says"),
    [
        ("{", None, "the line is not valid JSON"),
        ("[]", None, "the line must be a JSON object"),
        ('{"custom_id": "a", "custom_id": "b"}', "custom_id", "twice"),
        ({"custom_id": "a", "url": URL, "body": {}}, "method", "is missing"),
        (entry("a", reduction_ratio=0.5), "reduction_ratio", "go(es)? into `body`"),
        (entry(""), "custom_id", "1 to 512 characters"),
        ({**entry("a"), "custom_id": 7}, "custom_id", "must be a string"),
        (entry("a", method="GET"), "method", "must be POST"),
        (entry("a", url="/v1/embeddings"), "url", f"must be {URL}"),
        (entry("a", body=[]), "body", "must be a JSON object"),
        (entry("a", body={"stream": True}), "body.stream", "leave `stream` out"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_no_request(content: object, param: str | None, says: str) -> None:
    line = BatchLine(1, (content if isinstance(content, str) else json.dumps(content)).encode())
    with pytest.raises(FoldserveError, match=says) as refusal:
        read_request(line, [URL], Limits())
    assert refusal.value.param == param


def test_an_id_that_comes_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "in", entry("a"), entry("b"), "{broken", entry("a"))
    with pytest.raises(ValueError, match="lines 1 and 4 have the same custom_id 'a'"):
        Survey(path, LONGEST)


def test_ids_of_one_digest_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "id_digest", lambda custom_id: 0 if custom_id is None else 1)
    assert len(Survey(write(tmp_path / "in", entry("a"), entry("b")), LONGEST)) == 2


@pytest.fixture
def asked(tmp_path: Path) -> Survey:
    return Survey(write(tmp_path / "in", entry("a"), entry("b"), "{broken", entry("c")), LONGEST)


def add(found: OutputFile, number: int, custom_id: str | None) -> None:
    body = b'{"usage":{"vision_tokens":{"encoded":10,"kept":4}}}'
    found.add(LineResult(results.answer(number, custom_id, 200, "", body), is_answer=True, encoded=10, kept=4))


def test_a_line_cut_off_anywhere_is_answered_again(asked: Survey, tmp_path: Path) -> None:
    """And zeros, which a file system may leave behind where a machine lost power."""
    path = tmp_path / "out"
    with OutputFile(path, asked, "refuse") as found:
        add(found, 1, "a")
        found.add(LineResult(results.failure(3, None, {"code": "x", "message": "y", "param": None})))
        whole = path.stat().st_size
        add(found, 2, "b")
    content = path.read_bytes()
    for end in [content[:cut] for cut in range(whole, len(content))] + [content[:whole] + bytes(100)]:
        path.write_bytes(end)
        with OutputFile(path, asked, "resume") as found:
            assert [number in found for number in (1, 2, 3, 4)] == [True, False, True, False]
            assert (found.totals.lines, found.totals.refused, found.totals.encoded, found.totals.kept) == (2, 1, 10, 4)
        assert path.read_bytes() == content[:whole]


def test_results_that_are_there(asked: Survey, tmp_path: Path) -> None:
    path = tmp_path / "out"
    with OutputFile(path, asked, "resume") as found:
        add(found, 1, "a")
        with pytest.raises(ValueError, match="another run writes there"):
            OutputFile(path, asked, "resume")
    with pytest.raises(ValueError, match="--resume answers the missing lines, --overwrite begins anew"):
        OutputFile(path, asked, "refuse")
    other = Survey(write(tmp_path / "other", entry("z")), LONGEST)
    with pytest.raises(ValueError, match="answers 'a', which is not what line 1 of the input asks"):
        OutputFile(path, other, "resume")
    with path.open("ab") as file:
        file.write(path.read_bytes())
    with pytest.raises(ValueError, match="line 2, answers 'a', which has been answered before"):
        OutputFile(path, asked, "resume")
    write(path, '{"no": "result"}')
    with pytest.raises(ValueError, match="line 1, is no result of a batch"):
        OutputFile(path, asked, "resume")
    with OutputFile(path, asked, "overwrite") as found:
        assert 1 not in found
    assert path.read_bytes() == b""


class Slow:
    """Stands for the application: answers each request after a random time, and counts."""

    urls = (URL,)
    has_failed = False
    failure = "it hangs"

    def __init__(self, seconds: float = 0.002) -> None:
        self._seconds = seconds
        self.in_flight = self.most = self.asked = 0
        self.statuses: Iterator[int] = iter(())

    async def post(self, path: str, body: bytes) -> Reply:
        self.asked += 1
        self.in_flight += len(body)
        self.most = max(self.most, self.in_flight)
        await asyncio.sleep(random.random() * self._seconds)
        self.in_flight -= len(body)
        answer = json.dumps({"said": json.loads(body)["messages"]}).encode()
        headers = {"x-request-id": "r", "x-foldserve-vision-tokens": "encoded=10, kept=4, withdrawn=0"}
        return Reply(next(self.statuses, 200), headers, bytearray(answer))


def answer_all(path: Path, output: Path, front: Any, at_once: int = 8, limits: Limits = Limits()) -> None:  # noqa: B008
    seen = Survey(path, lines.longest_line(limits))
    with OutputFile(output, seen, "resume") as found, path.open("rb") as file, ProgressBar(len(seen), found) as bar:
        missing = (line for line in read_lines(file, lines.longest_line(limits)) if line.number not in found)
        asyncio.run(BatchRun(LineAnswerer(front, limits), missing, limits.max_unread_bytes, found, bar).answer(at_once))


def test_killed_at_random_each_line_is_answered_once(tmp_path: Path) -> None:
    """A child is killed again and again, until one comes to the end."""
    requests = [entry(f"r{i}", body={"messages": ["x" * random.randrange(2000), i]}) for i in range(300)]
    path, output = write(tmp_path / "in", *requests, "{broken"), tmp_path / "out"
    kills = 0
    while True:
        child = os.fork()
        if child == 0:
            os.close(2)  # the bar
            answer_all(path, output, Slow())
            os._exit(0)
        if kills < 12:
            time.sleep(random.uniform(0.005, 0.03))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        kills += 1
    assert kills > 2
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(each["id"] for each in found) == sorted(f"batch_req_{n}" for n in range(1, 302))
    said = {each["custom_id"]: each["response"]["body"]["said"] for each in found if each["response"]}
    assert said == {each["custom_id"]: each["body"]["messages"] for each in requests}


@pytest.mark.parametrize(("at_once", "megabytes", "most"), [(4, 1000.0, 4), (50, 0.06, 3)], ids=["lines", "bytes"])
def test_what_is_in_flight_is_bounded(at_once: int, megabytes: float, most: int, tmp_path: Path) -> None:
    """By lines, and by the bytes that a server holds of bodies: 20 kB each here."""
    size = 20_000
    path = write(tmp_path / "in", *(entry(f"r{i}", body={"messages": ["x" * size]}) for i in range(100)))
    front = Slow()
    answer_all(path, tmp_path / "out", front, at_once, Limits(max_body_mb=0.03, max_unread_mb=megabytes))
    assert front.asked == 100
    assert (most - 1) * size < front.most < most * (size + 200)


def test_a_server_without_room_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(seconds: float) -> None:
        await sleep(0 if seconds < 60 else seconds)

    sleep = asyncio.sleep
    monkeypatch.setattr(run, "_SYNC_S", 3600.0)
    monkeypatch.setattr(asyncio, "sleep", at_once)
    path, front = write(tmp_path / "in", entry("a"), entry("b")), Slow()
    front.statuses = iter([503, 503, 200, *[503] * run._TRIES])
    answer_all(path, tmp_path / "out", front, at_once=1)
    statuses = [json.loads(line)["response"]["status_code"] for line in (tmp_path / "out").read_text().splitlines()]
    assert statuses == [200, 503]
    assert front.asked == 3 + run._TRIES


def test_the_end_of_the_engine_ends_the_run(tmp_path: Path) -> None:
    """Its lines get no result: they are answered when the run is resumed."""
    path, front = write(tmp_path / "in", entry("a"), entry("b"), entry("c")), Slow()
    front.statuses, front.has_failed = iter([200, 503]), True
    with pytest.raises(EngineEnded, match=r"^it hangs: .* --resume answers the rest$"):
        answer_all(path, tmp_path / "out", front, at_once=1)
    assert len((tmp_path / "out").read_text().splitlines()) == 1


@pytest.fixture
def media(tmp_path: Path) -> LocalFiles:
    (tmp_path / "media" / "below").mkdir(parents=True)
    (tmp_path / "media" / "below" / "a b.png").write_bytes(b"png")
    (tmp_path / "media" / "large").write_bytes(b"x" * 1001)
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "media" / "link").symlink_to(tmp_path / "secret")
    return LocalFiles(tmp_path / "media", Limits(max_image_mb=0.001))


def with_url(url: object) -> dict[str, Any]:
    return {"messages": [{"content": "hi"}, {"content": [{"type": "image_url", "image_url": url}]}]}


def test_a_file_becomes_a_data_url(media: LocalFiles, tmp_path: Path) -> None:
    for url in (f"file://{tmp_path}/media/below/a%20b.png", f"file://localhost{tmp_path}/media/below/a b.png"):
        body = with_url({"url": url, "detail": "low"})
        media.put_into(body)
        assert body == with_url({"url": "data:image/png;base64,cG5n", "detail": "low"})


@pytest.mark.parametrize("body", [{}, {"messages": 1}, {"messages": [1, {"content": [1, {"image_url": 3}]}]}], ids=str)
def test_other_bodies_are_left_to_validation(body: dict[str, Any], media: LocalFiles) -> None:
    before = json.dumps(body)
    media.put_into(body)
    assert json.dumps(body) == before


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("file://{}/secret", "refused_image_url"),
        ("file://{}/media/../secret", "refused_image_url"),
        ("file://{}/media/%2e%2e/secret", "refused_image_url"),
        ("file://{}/media/link", "refused_image_url"),
        ("file://elsewhere{}/media/large", "refused_image_url"),
        ("file://{}/media/large", "limit_exceeded"),
        ("file://{}/media/missing", "image_unavailable"),
        ("file://{}/media/below", "image_unavailable"),
        ("file://{}/media/%00", "image_unavailable"),
    ],
)
def test_a_file_that_is_not_read(url: str, code: str, media: LocalFiles, tmp_path: Path) -> None:
    with pytest.raises(FoldserveError) as refusal:
        media.put_into(with_url(url.format(tmp_path)))
    assert (refusal.value.code, refusal.value.param) == (code, "messages[1].content[0].image_url")
    assert "secret" not in str(refusal.value)
