"""What a single request may not combine with withdrawal. Pure, for the API to ask before the engine does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from foldserve.server.engine.withdrawal.core import Feature, TokenMap


class Room(NamedTuple):
    """Tokens that one request can have in a step, and the setting that says so."""

    tokens: int
    setting: str


class PromptItem(NamedTuple):
    """An image in a prompt, as `TokenMap` reads it."""

    identifier: str
    mm_position: Any


def prompt_items(prompt: Mapping[str, Any]) -> list[PromptItem]:
    """The images and videos of a prompt as vLLM's renderer gives it, in its order."""
    places = prompt["mm_placeholders"]
    items = [
        PromptItem(*item)
        for modality, hashes in prompt["mm_hashes"].items()
        for item in zip(hashes, places[modality], strict=True)
    ]
    return sorted(items, key=lambda item: item.mm_position.offset)


def admit(
    features: Iterable[Feature],
    prompt_tokens: int,
    room: Room,
    *,
    prompt_logprobs: int | None = None,
    resumable: bool = False,
) -> TokenMap:
    """The tokens that a request withdraws, if the engine can serve it.

    The scheduler asks, but there an exception ends the engine: whoever accepts requests has to ask first.

    Args:
        features: of the request's images.
        room: that a prompt has in one step of the engine.

    Raises:
        ValueError: it asks for what does not go together.
    """
    token_map = TokenMap.of(features, prompt_tokens)
    refuse_request(withdraws=token_map.total > 0, prompt_logprobs=prompt_logprobs, resumable=resumable)
    refuse_prompt(token_map, prompt_tokens, room)
    return token_map


def refuse_request(*, withdraws: bool, prompt_logprobs: int | None = None, resumable: bool = False) -> None:
    """Raises ValueError if a request that withdraws tokens asks for what it cannot have."""
    if not withdraws:
        return
    if prompt_logprobs is not None:
        raise ValueError(
            f"prompt_logprobs={prompt_logprobs} does not go with withdrawn images: their tokens have no output at the "
            "last layer; ask for one of the two"
        )
    if resumable:
        raise ValueError("a streaming-input session does not go with withdrawn images: send a complete prompt")


def refuse_prompt(token_map: TokenMap, prompt_tokens: int, room: Room) -> None:
    """Raises ValueError if image tokens are to be chosen of a prompt that does not allow it."""
    if not token_map.choices:
        return
    last = token_map.choices[-1]
    if last.start + last.tokens == prompt_tokens:
        raise ValueError(
            f"{last.method} chooses image tokens by the attention of the prompt's last token, which has to be text: "
            "put the image before the text"
        )
    if token_map.whole > room.tokens:
        raise ValueError(
            f"{last.method} needs the whole prompt in one step: it has {token_map.whole} tokens, and a step has room "
            f"for {room.tokens} ({room.setting}); shorten the prompt, remove more tokens before the decoder, or start "
            "the server with a higher limit"
        )
