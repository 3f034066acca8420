"""API keys, the key file, and the counters that processes share, without a server."""

from __future__ import annotations

import multiprocessing
import re
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits import parse
from limits.strategies import FixedWindowRateLimiter

from foldserve.server import cli
from foldserve.server.api.auth.counters import SharedCounters
from foldserve.server.api.auth.keyring import Keyring
from foldserve.server.api.auth.keys import MOST_KEYS, Key, entry, key_digest, new_key, read_keys

HASH = "ab" * 32


def key_file(folder: Path, text: str) -> Path:
    file = folder / "keys.toml"
    file.write_text(text)
    return file


def test_hash_key_writes_what_serve_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["hash-key", "alice", "--rate", "5/second", "--concurrent", "2", "--scope", "api", "--scope", "metrics"])
    alice = capsys.readouterr()
    cli.main(["hash-key", "bob"])
    bob = capsys.readouterr()
    keys = read_keys(key_file(tmp_path, alice.out + bob.out))
    secret = alice.err.split()[-1]
    assert re.fullmatch(r"fsk-[A-Za-z0-9_-]{43}", secret)
    assert secret not in alice.out
    assert keys[0] == Key("alice", key_digest(secret), parse("5/second"), 2, frozenset({"api", "metrics"}))
    assert keys[1] == Key("bob", key_digest(bob.err.split()[-1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a b"], "name"),
        (["a", "--rate", "often"], "600/minute"),
        (["a", "--concurrent", "0"], "concurrent"),
    ],
)
def test_hash_key_refuses(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["hash-key", *options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "key: Field required"),
        ("key = []", "1 to 1000 keys, not 0"),
        ("[[key]]\n", "key.0.name"),
        (f'[[key]]\nname = "a"\nsha256 = "{HASH[1:]}"', "key.0.sha256"),
        (f'[[key]]\nname = "a"\nsha256 = "{HASH.upper()}"', "key.0.sha256"),
        (f'[[key]]\nname = "a/b"\nsha256 = "{HASH}"', "key.0.name"),
        (f'[[key]]\nname = "a"\nsha256 = "{HASH}"\nrate = "60 per fortnight"', "key.0.rate"),
        (f'[[key]]\nname = "a"\nsha256 = "{HASH}"\nrate = 60', "key.0.rate"),
        (f'[[key]]\nname = "a"\nsha256 = "{HASH}"\nconcurrent = true', "key.0.concurrent"),
        (f'[[key]]\nname = "a"\nsha256 = "{HASH}"\nscopes = ["root"]', "key.0.scopes"),
        (f'[[key]]\nname = "a"\nsha256 = "{HASH}"\nadmin = true', "key.0.admin"),
        (f'[[key]]\nname = "a"\nsha256 = "{HASH}"\n' * 2, "same name"),
        (f'[[key]]\nname = "a"\nsha256 = "{HASH}"\n[[key]]\nname = "b"\nsha256 = "{HASH}"', "same sha256"),
        ("[[key]", "not TOML"),
    ],
)
def test_a_key_file_that_cannot_be_meant(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_keys(key_file(tmp_path, text))


def test_a_key_where_its_hash_belongs_is_not_repeated(tmp_path: Path) -> None:
    secret = new_key()
    with pytest.raises(ValueError, match="sha256") as caught:
        read_keys(key_file(tmp_path, f'[[key]]\nname = "a"\nsha256 = "{secret}"'))
    assert secret not in str(caught.value)


def test_too_many_keys(tmp_path: Path) -> None:
    text = "".join(entry(f"k{i}", str(i), rate=None, concurrent=None, scopes=["api"]) for i in range(MOST_KEYS + 1))
    with pytest.raises(ValueError, match="1001"):
        read_keys(key_file(tmp_path, text))


def test_no_key_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--api-keys", str(tmp_path / "none.toml")])
    assert "No such file" in capsys.readouterr().err


SALTS = st.none() | st.text(string.ascii_letters + string.digits + "._~-", min_size=1, max_size=128)


@given(SALTS, SALTS)
def test_salts_differ_between_keys_and_between_the_salts_of_one(one: str | None, other: str | None) -> None:
    alice, bob = Key("alice", key_digest("a")), Key("bob", key_digest("b"))
    assert alice.cache_salt(one) != bob.cache_salt(other)
    assert (alice.cache_salt(one) == alice.cache_salt(other)) == (one == other)
    assert re.fullmatch("[0-9a-f]{64}", alice.cache_salt(one))
    # Not even the salt that another key really uses, sent as one's own, opens its cache.
    assert bob.cache_salt(alice.cache_salt(one)) != alice.cache_salt(one)


def test_the_ring_follows_its_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def text(name: str) -> str:
        return entry(name, f"key of {name}", rate=None, concurrent=None, scopes=["api"])

    now = 0.0
    file = key_file(tmp_path, text("alice"))
    ring = Keyring(file, lambda: now)

    def names() -> list[str]:
        found = [ring.find(f"key of {name}") for name in ("alice", "bob", "carol")]
        return [key.name for key in found if key]

    assert names() == ["alice"]
    file.write_text(text("alice") + text("bob"))
    assert names() == ["alice"], "not looked at more than once a second"
    now = 2
    assert names() == ["alice", "bob"]
    file.write_text("nonsense")
    now = 4
    assert names() == ["alice", "bob"]
    assert "stay as they were" in caplog.text
    file.unlink()
    now = 6
    assert names() == ["alice", "bob"]
    file.write_text(text("carol"))
    now = 8
    assert names() == ["carol"]


def test_counters_take_and_give() -> None:
    counters = SharedCounters()
    assert [counters.take("a", 2) for _ in range(3)] == [True, True, False]
    assert counters.take("b", 2)
    counters.give("a")
    assert [counters.take("a", 2) for _ in range(2)] == [True, False]


def test_a_rate_is_counted_in_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    counters = SharedCounters(lambda: now)
    rates, rate = FixedWindowRateLimiter(counters), parse("3/minute")
    assert [rates.hit(rate, "alice") for _ in range(4)] == [True, True, True, False]
    assert rates.hit(rate, "bob")
    assert rates.get_window_stats(rate, "alice") == (1060.0, 0)
    now = 1059.9
    assert not rates.hit(rate, "alice")
    now = 1060.1
    assert rates.hit(rate, "alice")
    rates.clear(rate, "alice")
    assert counters.get(rate.key_for("alice")) == 0


def test_slots_of_what_is_over_are_used_again() -> None:
    now = 0.0
    counters = SharedCounters(lambda: now)
    for i in range(3000):
        counters.incr(f"rate {i}", expiry=60)
    for i in range(1096):
        assert counters.take(f"place {i}", 1)
    with pytest.raises(OverflowError):
        counters.incr("one more", expiry=60)
    now = 61
    for i in range(3000):
        assert counters.incr(f"another {i}", expiry=60) == 1
    assert not counters.take("place 1095", 1), "those in use were kept"
    counters.reset()
    assert counters.take("place 1095", 1)


def take_many(counters: SharedCounters, times: int) -> None:
    for _ in range(times):
        counters.incr("together", expiry=3600)


def test_processes_count_together() -> None:
    counters = SharedCounters()
    spawned = multiprocessing.get_context("spawn").Process(target=take_many, args=(counters, 2000))
    spawned.start()
    take_many(counters, 2000)
    spawned.join()
    assert spawned.exitcode == 0
    assert counters.get("together") == 4000
