"""Fields of `reduction`: a field's declaration gives its check, JSON Schema and error messages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import repr as _short
from typing import Any, Generic, TypeVar

from foldserve.reducers.refusal import InvalidReduction

_T = TypeVar("_T")

Value = str | bool | int | tuple[int, ...] | None


@dataclass(frozen=True)
class Field(ABC, Generic[_T]):
    name: str
    default: Any  # None: the server or another field decides
    summary: str  # half a sentence for users

    @abstractmethod
    def parse(self, value: object) -> _T:
        """Check a JSON value; raises InvalidReduction with the field's name."""

    @abstractmethod
    def values(self) -> dict[str, Any]:
        """JSON Schema of the values, without default and description."""

    def schema(self) -> dict[str, Any]:
        default = {} if self.default is None else {"default": to_json(self.default)}
        return self.values() | default | {"description": self.summary}

    def refusal(self, expected: str, value: object) -> InvalidReduction:
        return InvalidReduction(f"{self.name} must be {expected}, not {_short(value)}", self.name)


class ShareField(Field[float]):
    """A share of an image's vision tokens."""

    def parse(self, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise self.refusal("the share of vision tokens to remove, a number in [0, 1)", value)
        return float(value)

    def values(self) -> dict[str, Any]:
        return {"type": "number", "minimum": 0, "exclusiveMaximum": 1}


@dataclass(frozen=True)
class CountField(Field[int]):
    least: int

    def parse(self, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < self.least:
            raise self.refusal(f"an integer of at least {self.least}", value)
        return value

    def values(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.least}


class FlagField(Field[bool]):
    def parse(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise self.refusal("true or false", value)
        return value

    def values(self) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclass(frozen=True)
class TextField(Field[str]):
    longest: int

    def parse(self, value: object) -> str:
        if not isinstance(value, str):
            raise self.refusal("a text", value)
        if len(value) > self.longest:
            raise InvalidReduction(
                f"{self.name} has {len(value)} characters, and may have {self.longest}: send the part that matters",
                self.name,
            )
        return value

    def values(self) -> dict[str, Any]:
        return {"type": "string", "maxLength": self.longest}


class Option(Field[_T]):
    """A field that only some methods take. Plans carry its value as an integer."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of possible values; the product over a method's options must not exceed 2**63."""

    @abstractmethod
    def to_int(self, value: _T) -> int:
        """An integer in [0, count)."""

    @abstractmethod
    def from_int(self, code: int) -> _T:
        """Inverse of `to_int`."""


@dataclass(frozen=True)
class ChoiceOption(Option[str]):
    allowed: tuple[str, ...]

    def parse(self, value: object) -> str:
        if not isinstance(value, str) or value not in self.allowed:
            raise self.refusal(" or ".join(repr(word) for word in self.allowed), value)
        return value

    @property
    def count(self) -> int:
        return len(self.allowed)

    def to_int(self, value: str) -> int:
        return self.allowed.index(value)

    def from_int(self, code: int) -> str:
        return self.allowed[code]

    def values(self) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.allowed)}


class FlagOption(FlagField, Option[bool]):
    @property
    def count(self) -> int:
        return 2

    def to_int(self, value: bool) -> int:
        return int(value)

    def from_int(self, code: int) -> bool:
        return bool(code)


@dataclass(frozen=True)
class NumberOption(Option[int]):
    least: int
    most: int

    def parse(self, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not self.least <= value <= self.most:
            raise self.refusal(f"an integer of {self.least} to {self.most}", value)
        return value

    @property
    def count(self) -> int:
        return self.most - self.least + 1

    def to_int(self, value: int) -> int:
        return value - self.least

    def from_int(self, code: int) -> int:
        return code + self.least

    def values(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.least, "maximum": self.most}


class LayersOption(Option[tuple[int, ...]]):
    """Numbers of tower layers, the first being 0; kept in ascending order."""

    def parse(self, value: object) -> tuple[int, ...]:
        if (
            not isinstance(value, Sequence)
            or isinstance(value, str)
            or not value
            or any(isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < 63 for layer in value)
            or len(set(value)) < len(value)
        ):
            raise self.refusal("a list of different layer numbers from 0 on, such as [5, 6, 7, 8]", value)
        return tuple(sorted(value))

    @property
    def count(self) -> int:
        return 1 << 63

    def to_int(self, value: tuple[int, ...]) -> int:
        return sum(1 << layer for layer in value)

    def from_int(self, code: int) -> tuple[int, ...]:
        return tuple(layer for layer in range(63) if code >> layer & 1)

    def values(self) -> dict[str, Any]:
        number = {"type": "integer", "minimum": 0, "maximum": 62}
        return {"type": "array", "items": number, "minItems": 1, "uniqueItems": True}


def pack(options: Sequence[Option[Any]], values: Sequence[Value]) -> int:
    """The values of all options as one integer; `unpack` is the inverse."""
    code = 0
    for option, value in reversed([*zip(options, values, strict=True)]):
        code = code * option.count + option.to_int(value)
    return code


def unpack(options: Sequence[Option[Any]], code: int) -> tuple[Value, ...]:
    values: list[Value] = []
    for option in options:
        code, own = divmod(code, option.count)
        values.append(option.from_int(own))
    return tuple(values)


def to_json(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def parse_options(options: Sequence[Option[Any]], given: dict[str, object]) -> tuple[tuple[str, Value], ...]:
    """Check the given fields; returns those that differ from their defaults, in the order of `options`."""
    parsed = [(option, option.parse(given[option.name])) for option in options if option.name in given]
    return tuple((option.name, value) for option, value in parsed if value != option.default)
