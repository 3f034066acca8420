"""The soak test's hostile clients do what their names say, and their outcomes are reported."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from foldserve.loadtest.soak.hostile import make_attacks
from foldserve.loadtest.soak.load import LoadOutcome
from foldserve.loadtest.soak.server import HeldResources, SoakServer
from foldserve.loadtest.soak.siege import Siege, make_keys

EXPECTED = {
    "eight answers a request": {"200"},
    "hang-ups behind another request": {"hung up"},
    "streams that nobody reads": {"hung up"},
    "a grammar that is dear to follow": {"200", "400 structured_outputs"},
    "nested repetition": {"400 structured_outputs.regex"},
    "special tokens": {"400 messages"},
    "the longest text": {"400 messages"},
    "many keys": {"200"},
    "large progressive JPEGs": {"200"},
    "large PNGs of 16 bits": {"200"},
    "names that nobody knows": {f"400 messages[0].content[{i}].image_url.url" for i in range(16)},
    "tokens that nobody knows": {"400 logit_bias"},
    "heads without an end": {"closed", "ConnectionResetError"},
    "half a body": {"408"},
    "garbage": {"400", "408"},
}


def test_each_attack_meets_its_answer(tiny_llava: Path, tmp_path: Path) -> None:
    """All at once, on a server of which nothing is left over then."""
    user, stranger = make_keys(tmp_path / "keys.toml")
    options = [str(tiny_llava), "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    options += ["--kv-cache-memory-bytes", str(64 << 20), "--api-keys", str(tmp_path / "keys.toml")]
    attacks = make_attacks()
    server = SoakServer(options, tmp_path / "log", user)

    async def outcome(name: str) -> str:
        try:
            return await attacks[name].run(server.address, stranger)
        except OSError as error:
            return type(error).__name__

    async def run() -> tuple[list[str], HeldResources]:
        return await asyncio.gather(*map(outcome, attacks)), await server.held_when_idle()

    try:
        outcomes, held = asyncio.run(run())
    finally:
        server.stop()
    assert attacks.keys() == EXPECTED.keys()
    for name, came in zip(attacks, outcomes, strict=True):
        assert came in EXPECTED[name], name
    assert (held.requests, held.kv_share) == (0, 0)


HELD = HeldResources(0, 0, 100, {"engine": 600, "api": 400})
GOOD = Siege(LoadOutcome(took_s=[1.0]), LoadOutcome(took_s=[2.0]), {"half a body": {"408": 3}}, HELD, HELD, 1.0)


@pytest.mark.parametrize(
    ("siege", "failure"),
    [
        (replace(GOOD, beside=LoadOutcome(wrong=["200 was expected: 503"])), "200 was expected: 503"),
        (replace(GOOD, beside=LoadOutcome(ready_s=1.2)), "took 1.20 s, beside hostile clients"),
        (replace(GOOD, alone=LoadOutcome(ready_s=1.2)), "took 1.20 s, alone"),
        (replace(GOOD, attacks={"half a body": {}}), "never tried to its end: half a body"),
        (replace(GOOD, attacks={"half a body": {"500": 1}}), "half a body: {'500': 1}"),
        (replace(GOOD, after=replace(HELD, requests=2)), "left in the engine: 2 requests"),
        (replace(GOOD, after=replace(HELD, files=101)), "100 before, 101 after"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_siege_says_of_a_bad_server(siege: Siege, failure: str) -> None:
    assert list(GOOD.failures()) == []
    (said,) = siege.failures()
    assert failure in said
    assert siege.to_json()["failures"] == [said]


def test_figures_of_the_user() -> None:
    report = replace(GOOD, beside=LoadOutcome(took_s=[0.1] * 99 + [5.0])).to_json()
    assert report["beside"]["p50_s"] == 0.1
    assert 0.1 < report["beside"]["p99_s"] <= 5.0
    assert (report["alone"]["p50_s"], replace(GOOD, alone=LoadOutcome()).to_json()["alone"]["p50_s"]) == (1.0, None)
