"""Requests that conflict with withdrawal. Pure functions, which the API calls before the engine does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from foldserve.server.engine.withdrawal.core import Feature, TokenMap


class StepCapacity(NamedTuple):
    """Tokens that one request can have in a step, and the setting that limits them."""

    tokens: int
    setting: str


class PromptItem(NamedTuple):
    """A `Feature` of a rendered prompt."""

    identifier: str
    mm_position: Any


def prompt_items(prompt: Mapping[str, Any]) -> list[PromptItem]:
    """Images and videos of a rendered prompt, in prompt order."""
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
    capacity: StepCapacity,
    *,
    prompt_logprobs: int | None = None,
    resumable: bool = False,
) -> TokenMap:
    """The tokens that a request withdraws, if the engine can serve it.

    Call it before a request reaches the scheduler, where the exception would end the engine.

    Raises:
        ValueError: the request combines withdrawal with something that excludes it, or does not fit into a step.
    """
    token_map = TokenMap.of(features, prompt_tokens)
    refuse_request(withdraws=token_map.total > 0, prompt_logprobs=prompt_logprobs, resumable=resumable)
    refuse_prompt(token_map, prompt_tokens, capacity)
    return token_map


def refuse_request(*, withdraws: bool, prompt_logprobs: int | None = None, resumable: bool = False) -> None:
    """Raises ValueError if a request that withdraws tokens asks for prompt logprobs or streams its input."""
    if not withdraws:
        return
    if prompt_logprobs is not None:
        raise ValueError(
            f"prompt_logprobs={prompt_logprobs} does not go with withdrawn images: their tokens have no output at the "
            "last layer; ask for one of the two"
        )
    if resumable:
        raise ValueError("a streaming-input session does not go with withdrawn images: send a complete prompt")


def refuse_prompt(token_map: TokenMap, prompt_tokens: int, capacity: StepCapacity) -> None:
    """Raises ValueError if a prompt with a choice ends in an image or does not fit into one step."""
    if not token_map.selections:
        return
    last = token_map.selections[-1]
    if last.start + last.tokens == prompt_tokens:
        raise ValueError(
            f"{last.method} chooses image tokens by the attention of the prompt's last token, which has to be text: "
            "put the image before the text"
        )
    if token_map.whole > capacity.tokens:
        raise ValueError(
            f"{last.method} needs the whole prompt in one step: it has {token_map.whole} tokens, and a step has room "
            f"for {capacity.tokens} ({capacity.setting}); shorten the prompt, remove more tokens before the decoder, "
            "or start the server with a higher limit"
        )
