"""Parameters of single methods: checked on the way in, integers on the way to the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import repr as _short
from typing import Any, Generic, TypeVar

from foldserve.reducers.refusal import InvalidReduction

_T = TypeVar("_T", str, bool, tuple[int, ...])

Value = str | bool | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Option(ABC, Generic[_T]):
    """A field of `reduction` that some methods take.

    Attributes:
        name: of the field.
        default: its value where it is left out.
        summary: half a sentence for users.
    """

    name: str
    default: _T
    summary: str

    @abstractmethod
    def parse(self, value: object) -> _T:
        """The checked value of a JSON value; raises InvalidReduction with the option's name."""

    @abstractmethod
    def to_int(self, value: _T) -> int:
        """The value as an integer of at most 63 bits."""

    @abstractmethod
    def from_int(self, code: int) -> _T:
        """Inverse of `to_int`."""

    @abstractmethod
    def schema(self) -> dict[str, Any]:
        """JSON Schema of the field."""


@dataclass(frozen=True, slots=True)
class Choice(Option[str]):
    """One of several words."""

    words: tuple[str, ...]

    def parse(self, value: object) -> str:
        if not isinstance(value, str) or value not in self.words:
            expected = " or ".join(repr(word) for word in self.words)
            raise InvalidReduction(f"{self.name} must be {expected}, not {_short(value)}", self.name)
        return value

    def to_int(self, value: str) -> int:
        return self.words.index(value)

    def from_int(self, code: int) -> str:
        return self.words[code]

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.words), "default": self.default, "description": self.summary}


@dataclass(frozen=True, slots=True)
class Layers(Option[tuple[int, ...]]):
    """Numbers of tower layers, the first being 0; kept in ascending order."""

    def parse(self, value: object) -> tuple[int, ...]:
        if (
            not isinstance(value, Sequence)
            or isinstance(value, str)
            or not value
            or any(isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < 63 for layer in value)
            or len(set(value)) < len(value)
        ):
            raise InvalidReduction(
                f"{self.name} must be a list of different layer numbers from 0 on, such as {list(self.default)}, "
                f"not {_short(value)}",
                self.name,
            )
        return tuple(sorted(value))

    def to_int(self, value: tuple[int, ...]) -> int:
        return sum(1 << layer for layer in value)

    def from_int(self, code: int) -> tuple[int, ...]:
        return tuple(layer for layer in range(63) if code >> layer & 1)

    def schema(self) -> dict[str, Any]:
        number = {"type": "integer", "minimum": 0, "maximum": 62}
        return {
            "type": "array",
            "items": number,
            "minItems": 1,
            "uniqueItems": True,
            "default": list(self.default),
            "description": self.summary,
        }


def parse_options(options: Sequence[Option[Any]], given: dict[str, object]) -> tuple[tuple[str, Value], ...]:
    """The given fields that differ from their defaults, checked, in the order of `options`."""
    parsed = [(option.name, option.parse(given[option.name])) for option in options if option.name in given]
    defaults = {option.name: option.default for option in options}
    return tuple((name, value) for name, value in parsed if value != defaults[name])
