"""Hostile clients of all kinds at once, in their own process so that they don't slow down the user's client."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from foldserve.loadtest.images import data_url
from foldserve.loadtest.soak.mix import chat
from foldserve.loadtest.soak.wire import Address, ask, connect, encode, read_status

_CHAT = "/v1/chat/completions"
_SIDE = 6300  # about 40 megapixels, the largest image that the server takes
_PATIENCE_S = 60
_PAUSE_S = 0.05
_rng = random.Random(0)


@dataclass(frozen=True, slots=True)
class Attack:
    """One kind of attack.

    Attributes:
        clients: number of clients that repeat it.
        run: runs it once and returns the outcome in a word.
    """

    clients: int
    run: Callable[[Address, str], Awaitable[str]]


def _asking(make: Callable[[], object]) -> Callable[[Address, str], Awaitable[str]]:
    """An attack that sends a new chat each time; its outcome is the status and the field blamed."""

    async def run(address: Address, key: str) -> str:
        answer = await ask(address, encode("POST", _CHAT, make(), key))
        blamed = re.search(rb'"param": ?"([^"]*)"', answer.body)
        return f"{answer.status} {blamed[1].decode()}" if blamed else str(answer.status)

    return run


def _encode_once(body: object) -> Callable[[], bytes]:
    """Encodes a body once, since it takes long."""
    made = json.dumps(body).encode()
    return lambda: made


def _text(length: int, piece: str) -> dict[str, object]:
    return chat(piece * (length // len(piece)), [], 4)


def _picture(kind: str, bits: int, **options: Any) -> str:
    noise = np.random.default_rng(0).integers(0, 1 << bits, (64, 64)).astype(f"uint{bits}")
    pixels = np.tile(noise, (_SIDE // 64, _SIDE // 64))
    return data_url(Image.fromarray(pixels), kind, **options)


def _structured(regex: str) -> dict[str, object]:
    return chat("say a", [], 400) | {"structured_outputs": {"regex": regex}, "min_tokens": 300}


def _names() -> dict[str, object]:
    return chat("what is it", [f"http://{_rng.randbytes(6).hex()}.example.invalid/a.png" for _ in range(16)], 4)


async def _hang_up_behind(address: Address, key: str) -> str:
    """Disconnects in the middle of an answer, with another request pipelined behind."""
    async with connect(address) as (_, writer):
        body = chat(f"go on {_rng.random()}", [], 2000)
        first = encode("POST", _CHAT, body, key).replace(b"Connection: close", b"Connection: keep-alive")
        writer.write(first + encode("GET", "/health"))
        await writer.drain()
        await asyncio.sleep(1)
    return "hung up"


async def _never_read(address: Address, key: str) -> str:
    async with connect(address) as (_, writer):
        body = chat(f"tell all {_rng.random()}", [], 2000) | {"stream": True, "logprobs": True, "top_logprobs": 20}
        writer.write(encode("POST", _CHAT, body, key))
        await writer.drain()
        await asyncio.sleep(10)
    return "hung up"


async def _endless_head(address: Address, key: str) -> str:
    async with connect(address) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: soak\r\n")
        while not reader.at_eof() and not writer.is_closing():
            writer.write(b"a: b\r\n" * 10_000)
            await writer.drain()
            await asyncio.sleep(0.01)
    return "closed"


async def _half_a_body(address: Address, key: str) -> str:
    async with connect(address) as (reader, writer):
        writer.write(encode("POST", _CHAT, chat("unfinished", [], 4), key)[:-5])
        return str(await read_status(reader))


async def _garbage(address: Address, key: str) -> str:
    async with connect(address) as (reader, writer):
        writer.write(_rng.randbytes(2000))
        return str(await read_status(reader))


def make_attacks() -> dict[str, Attack]:
    """All attacks; making their bodies takes seconds."""
    progressive = [_picture("JPEG", 8, progressive=True, quality=20)] * 2
    deep = [_picture("PNG", 16)]
    return {
        "eight answers a request": Attack(
            24, _asking(lambda: chat(f"flood {_rng.random()}", [], 200) | {"n": 8, "temperature": 1})
        ),
        "hang-ups behind another request": Attack(8, _hang_up_behind),
        "streams that nobody reads": Attack(8, _never_read),
        "a grammar that is dear to follow": Attack(4, _asking(lambda: _structured("(((a*b?)*c?)*d?)*"))),
        "nested repetition": Attack(1, _asking(lambda: _structured("((a{0,200}){0,200}){0,200}"))),
        "special tokens": Attack(2, _asking(_encode_once(_text(3_000_000, "<s>")))),
        "the longest text": Attack(1, _asking(_encode_once(_text(30_000_000, "<imag")))),
        "many keys": Attack(1, _asking(_encode_once(chat("x", [], 4) | {f"key-{i}": 1 for i in range(190_000)}))),
        "large progressive JPEGs": Attack(2, _asking(_encode_once(chat("what", progressive, 4)))),
        "large PNGs of 16 bits": Attack(1, _asking(_encode_once(chat("what", deep, 4)))),
        "names that nobody knows": Attack(4, _asking(_names)),
        "tokens that nobody knows": Attack(
            2, _asking(lambda: chat("x", [], 4) | {"logit_bias": {"447": 100, "999999": 100}, "logprobs": True})
        ),
        "heads without an end": Attack(4, _endless_head),
        "half a body": Attack(200, _half_a_body),
        "garbage": Attack(2, _garbage),
    }


async def attack(address: Address, key: str, attacks: Mapping[str, Attack]) -> dict[str, dict[str, int]]:
    """Runs all attacks until standard input ends; returns the outcomes of each with their counts."""
    came: dict[str, Counter[str]] = {name: Counter() for name in attacks}

    async def client(name: str) -> None:
        while True:
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    came[name][await attacks[name].run(address, key)] += 1
            except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                came[name][type(error).__name__] += 1
            await asyncio.sleep(_PAUSE_S)

    clients = [asyncio.create_task(client(name)) for name in attacks for _ in range(attacks[name].clients)]
    await asyncio.to_thread(sys.stdin.read)
    for task in clients:
        task.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    return {name: dict(counts) for name, counts in came.items()}


def main() -> None:
    """Arguments HOST PORT. Prints "prepared", reads a key from standard input, and attacks until that ends."""
    os.nice(10)  # they would not be on the server's machine
    address, attacks = Address(sys.argv[1], int(sys.argv[2])), make_attacks()
    print("prepared", flush=True)
    key = sys.stdin.readline().strip()
    print(json.dumps(asyncio.run(attack(address, key, attacks))))


if __name__ == "__main__":
    main()
