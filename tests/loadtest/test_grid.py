"""The grid, its order, and the options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from foldserve.loadtest.bench import arguments, parse
from foldserve.loadtest.grid import CONTROL, RATIO_0, Load, Variant, schedule, variants
from foldserve.loadtest.options import LoadTestOptions


def test_variants() -> None:
    found = variants(["folder", "pool"], [0, 0.5], [False, True], control=True)
    assert [v.label for v in found] == [
        "plain vLLM",
        "ratio 0",
        "folder 0.5",
        "pool 0.5",
        "withdraw",
        "folder + withdraw 0.5",
        "pool + withdraw 0.5",
    ]
    assert CONTROL.body() == RATIO_0.body() == {}
    assert found[4].body() == {"reduction": {"withdraw": True}}
    assert found[5].body() == {"reduction": {"method": "folder", "ratio": 0.5, "withdraw": True}}
    assert variants(["folder"], [0.5], [False], control=False) == [RATIO_0, Variant("foldserve", "folder", 0.5)]


def test_rounds_alternate_and_servers_take_turns() -> None:
    all_ = variants(["folder"], [0.5], [False], control=True)
    loads = [Load(concurrency=1), Load(rate=2)]
    alone = [(b.round, b.point.variant.label, str(b.point.load)) for b in schedule(all_, loads, 3, beside=False)]
    first = alone[:6]
    assert first[:2] == [(0, "plain vLLM", "1 at once"), (0, "plain vLLM", "2 requests/s")]
    assert [a[1:] for a in alone[6:12]] == [a[1:] for a in first[::-1]]
    assert [a[1:] for a in alone[12:]] == [a[1:] for a in first]
    beside = [b.point.variant.label for b in schedule(all_, loads, 1, beside=True)]
    assert beside == ["plain vLLM", "ratio 0", "folder 0.5"] * 2
    assert len({b.key for b in schedule(all_, loads, 3, beside=True)}) == 18


def test_blocks_of_a_round_alternate_too() -> None:
    """The variants of one load take turns, servers that run one after the other do not."""
    both = variants([], [], [False], control=True)
    loads = [Load(concurrency=1, blocks=3), Load(concurrency=8)]

    def order(beside: bool) -> list[str]:
        blocks = schedule(both, loads, 2, beside=beside)
        assert len({b.key for b in blocks}) == len(blocks)
        names = [("v" if b.point.variant == CONTROL else "0") + str(b.point.load.concurrency) for b in blocks]
        return [" ".join(names[:8]), " ".join(names[8:])]

    assert order(beside=True) == ["v1 01 01 v1 v1 01 v8 08", "08 v8 01 v1 v1 01 01 v1"]
    assert order(beside=False) == ["v1 v1 v1 v8 01 01 01 08", "08 01 01 01 v8 v1 v1 v1"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ratios": (1.0,)}, r"each in \[0, 1\), not 1.0"),
        ({"concurrency": (0,)}, "--concurrency must be above 0, not 0"),
        ({"rounds": 0}, "--rounds must be at least 1, not 0"),
        ({"workload": "chess"}, "not 'chess'"),
        ({"workload": "bursts"}, "give --rate"),
        ({"workload": "video", "image_size": 335}, "even --image-size"),
        ({"requests": (63,)}, "63 requests can't be 64 at once"),
        ({"requests": (8, 7, 64)}, "7 requests can't be 8 at once"),
        ({"requests": (64, 64)}, "takes one number, or one a load, 3: not 2"),
        ({"blocks": (1, 1)}, "--blocks takes one number, or one a load, 3: not 2"),
        ({"requests": (0,)}, "--requests must be above 0, not 0"),
        ({"model": "m"}, "one of them"),
        ({"url": None}, "one of them"),
        ({"url": None, "model": "m", "withdraw": "on"}, "--withdraw-layer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_measured_is_refused(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    good: dict[str, Any] = {"output": tmp_path, "url": "http://somewhere"}
    LoadTestOptions(**good)
    with pytest.raises(ValueError, match=said):
        LoadTestOptions(**(good | changed))


def test_options_of_servers_and_loads(tmp_path: Path) -> None:
    options = LoadTestOptions(tmp_path, model="m", withdraw_layer=3, workload="bursts", rate=(2.0,))
    assert options.server_options(["--x"]) == {"foldserve": ["m", "--x", "--withdraw-layer", "3"], "vllm": ["m", "--x"]}
    assert options.grid()[1] == [Load(rate=2.0, requests=128)]
    each = LoadTestOptions(
        tmp_path, url="http://a", concurrency=(1, 8), rate=(2.0,), requests=(4, 16, 32), blocks=(3, 2, 1)
    )
    assert [(str(load), load.requests, load.blocks) for load in each.grid()[1]] == [
        ("1 at once", 4, 3), ("8 at once", 16, 2), ("2 requests/s", 32, 1),
    ]  # fmt: skip
    running = LoadTestOptions(tmp_path, url="http://a/", control_url="http://b")
    assert running.urls() == {"foldserve": "http://a", "vllm": "http://b"}
    assert running.has_control and not LoadTestOptions(tmp_path, url="http://a").has_control


def test_arguments_of_the_client() -> None:
    at_once = arguments("http://a", "m", 5, {"x": 1}, Load(concurrency=2), 1.0, 7)
    assert at_once[-2:] == ["--max-concurrency", "2"]
    assert '{"x": 1}' in at_once
    assert arguments("http://a", "m", 5, {}, Load(rate=2.5), 0.1, 7)[-4:] == [
        "--request-rate",
        "2.5",
        "--burstiness",
        "0.1",
    ]


def test_result_of_the_client() -> None:
    result: dict[str, list[Any]] = {
        "errors": ["", " boom\n", ""],
        "start_times": [1.0, 2.0, 3.0],
        "ttfts": [0.1, 0.0, 0.3],
        "latencies": [1.0, 0.0, 2.0],
        "itls": [[0.9], [], [0.8, 0.9]],
        "input_lens": [10, 1, 12],
        "output_lens": [2, 0, 3],
    }
    sent = parse(result)
    assert (sent.start_s, sent.ttft_s, sent.itl_s) == ([1.0, 3.0], [0.1, 0.3], [[0.9], [0.8, 0.9]])
    assert (sent.prompt_tokens, sent.output_tokens, sent.errors) == ([10, 12], [2, 3], ["boom"])
    with pytest.raises(RuntimeError, match="the first error was: boom"):
        parse({name: values[1:2] for name, values in result.items()})
