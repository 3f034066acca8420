"""A request of another API as the body of a chat request, with the origin of each of its fields."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any

from foldserve.server.api.errors import FoldserveError, InvalidRequest, LimitExceeded
from foldserve.server.api.limits.strict_json import to_text
from foldserve.server.limits import Limits

SHARED = frozenset(
    {
        "allowed_token_ids",
        "bad_words",
        "cache_salt",
        "chat_template_kwargs",
        "frequency_penalty",
        "ignore_eos",
        "include_reasoning",
        "logit_bias",
        "min_p",
        "min_tokens",
        "model",
        "presence_penalty",
        "priority",
        "reduction",
        "reduction_ratio",
        "repetition_penalty",
        "seed",
        "skip_special_tokens",
        "stop_token_ids",
        "stream",
        "structured_outputs",
        "temperature",
        "top_k",
        "top_p",
    }
)
"""Fields at the top of the body that mean the same in a chat; most are vLLM's or ours."""


@dataclass(slots=True)
class Translation:
    """One translated request.

    Attributes:
        chat: the body of the chat request.
        echo: fields that the answer repeats; never the input, which is dropped while the answer is generated.
        paths: JSON paths in `chat` -> those that the client sent, where they differ.
    """

    limits: InitVar[Limits]
    chat: dict[str, Any] = field(default_factory=dict)
    echo: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)

    _room: int = 0

    def __post_init__(self, limits: Limits) -> None:
        self._room = limits.max_messages + limits.max_parts + limits.max_tools

    def entries(self, value: object, path: str) -> list[Any]:
        """Checks a list of messages, parts or tools coarsely, before each is translated; a chat's own checks are exact.

        Raises InvalidRequest unless it is a list, and LimitExceeded if all lists together have more entries than any
        chat may.
        """
        if not isinstance(value, list):
            raise InvalidRequest(f"{path} must be a list", path)
        self._room -= len(value)
        if self._room < 0:
            raise LimitExceeded("the body has more messages, parts and tools than a chat may have", path)
        return value

    def add_message(self, message: dict[str, Any], path: str) -> str:
        """Appends a message to the chat, and returns its path there."""
        messages = self.chat.setdefault("messages", [])
        messages.append(message)
        own = f"messages[{len(messages) - 1}]"
        self.paths[own] = path
        return own

    def as_sent(self, param: str | None) -> str | None:
        """The client's path of a field of `chat`."""
        if param is None:
            return None
        head = param
        while head not in self.paths:
            end = max(head.rfind("."), head.rfind("["))
            if end <= 0:
                return param
            head = head[:end]
        return self.paths[head] + param[len(head) :]

    def explain(self, error: FoldserveError) -> FoldserveError:
        """A chat request's error, with the field as the client named it."""
        sent = self.as_sent(error.param)
        if sent != error.param:
            error.args = (self.with_client_names(str(error), error.param),)
            error.param = sent
        return error

    def with_client_names(self, message: str, param: str | None) -> str:
        """A message with the client's name of the field. `messages` stays, since it is also an ordinary word."""
        if param is None or param == "messages":
            return message
        return message.replace(param, str(self.as_sent(param)))


def check_fields(body: Mapping[str, Any], known: Collection[str], path: str = "") -> None:
    """Raises InvalidRequest for the first field that would be ignored: neither `known` nor null."""
    for name, value in body.items():
        if value is not None and name not in known:
            raise InvalidRequest(f"{name:.40} is not a field of this API that is served: leave it out", at(path, name))


def check_values(body: Mapping[str, Any], only: Mapping[str, tuple[Collection[Any], str]], path: str = "") -> None:
    """Raises InvalidRequest for the first value that is not served.

    `only`: field -> the values that it may have besides null, and why no others.
    """
    for name, (values, reason) in only.items():
        value = body.get(name)
        if value is not None and not any(type(value) is type(one) and value == one for one in values):
            allowed = " or ".join(str(one).lower() if isinstance(one, bool) else repr(one) for one in values)
            raise InvalidRequest(
                f"{reason}; leave {name} out{f', or send {allowed}' if allowed else ''}", at(path, name)
            )


def image_part(part: Mapping[str, Any], url: object, own: Collection[str]) -> dict[str, Any]:
    """A chat's part for an image of another API, with the fields that only the chat checks.

    `own` are the API's fields that hold the image.
    """
    source = {"url": url} | ({} if part.get("detail") is None else {"detail": part["detail"]})
    others = {name: value for name, value in part.items() if name not in ("detail", "type", *own)}
    return others | {"type": "image_url", "image_url": source}


def object_of(value: object, path: str) -> dict[str, Any]:
    """`value`, if it is a JSON object; raises InvalidRequest if not."""
    if not isinstance(value, dict):
        raise InvalidRequest(f"{path} must be an object", path)
    return value


def at(path: str, name: str) -> str:
    key = to_text((None, name)) or ""
    return key if not path else f"{path}{'' if key.startswith('[') else '.'}{key}"
