"""What a request asks for: the strict validator of its JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from reprlib import repr as _short
from typing import Any, Literal

from foldserve.reducers import METHODS

MIN_KEPT = 2  # a fold needs two sides


class InvalidReduction(ValueError):
    """A reduction that cannot be done. The message says what came and what to do.

    Attributes:
        param: the field at fault, such as "ratio"; "" if it is the whole.
    """

    def __init__(self, message: str, param: str = "") -> None:
        super().__init__(message, param)  # both, so that pickle can rebuild it
        self.param = param

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, slots=True)
class Reduction:
    """The reduction asked for one image; the values are checked however it is made.

    Attributes:
        method: a name in `METHODS`.
        ratio: share of the vision tokens to remove, in [0, 1); 0 is kept as None.
        keep_tokens: tokens to keep per image instead, at least 2; neither of the two: nothing is removed.
        scale: "official" multiplies tokens by 1 + ln(size) as FOLDER's authors do (`folder` only).
        withdraw: drop the vision tokens from the decoder's later layers.

    Raises:
        InvalidReduction: a field is wrong, or two of them contradict each other.
    """

    method: str = "folder"
    ratio: float | None = None
    keep_tokens: int | None = None
    scale: Literal["none", "official"] = "none"
    withdraw: bool = False

    def __post_init__(self) -> None:
        _check_method(self.method)
        _check_ratio(self.ratio)
        _check_keep_tokens(self.keep_tokens)
        if self.ratio is not None and self.keep_tokens is not None:
            raise InvalidReduction("ratio and keep_tokens came together: give one of them", "ratio")
        if self.scale not in ("none", "official"):
            raise InvalidReduction(f"scale must be 'none' or 'official', not {_short(self.scale)}", "scale")
        if not isinstance(self.withdraw, bool):
            raise InvalidReduction(f"withdraw must be true or false, not {_short(self.withdraw)}", "withdraw")
        object.__setattr__(self, "ratio", float(self.ratio) if self.ratio else None)
        for name in self.to_json():
            if name != "method" and name not in METHODS[self.method].parameters:
                takes = ", ".join(METHODS[self.method].parameters)
                raise InvalidReduction(f"method {self.method!r} takes no {name}, only {takes}", name)

    @classmethod
    def parse(cls, value: object) -> Reduction:
        """Validate the JSON form: an object with any of the fields above, null being no value of any of them.

        Raises:
            InvalidReduction: with the field at fault.
        """
        if not isinstance(value, Mapping):
            raise InvalidReduction(f"a reduction must be an object such as {{'ratio': 0.5}}, not {_short(value)}")
        known = [field.name for field in fields(cls)]
        for name, given in value.items():
            if name not in known:
                raise InvalidReduction(f"unknown field {_short(name)}: the fields are {', '.join(known)}", str(name))
            if given is None:
                raise InvalidReduction(f"{name} must have a value: leave it out for the default", name)
        return cls(**value)

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their defaults; equal reductions give equal dicts, and `parse` inverts it."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}


def _check_method(method: object) -> None:
    if not isinstance(method, str) or method not in METHODS:
        raise InvalidReduction(f"unknown method {_short(method)}: the methods are {', '.join(METHODS)}", "method")


def _check_ratio(ratio: object) -> None:
    if ratio is None:
        return
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise InvalidReduction(f"ratio must be a number in [0, 1), not {_short(ratio)}", "ratio")
    if not 0 <= ratio < 1:
        raise InvalidReduction(
            f"ratio is the share of vision tokens to remove, in [0, 1), not {_short(ratio)}", "ratio"
        )


def _check_keep_tokens(keep_tokens: object) -> None:
    if keep_tokens is None:
        return
    if isinstance(keep_tokens, bool) or not isinstance(keep_tokens, int):
        raise InvalidReduction(f"keep_tokens must be an integer, not {_short(keep_tokens)}", "keep_tokens")
    if keep_tokens < MIN_KEPT:
        raise InvalidReduction(f"keep_tokens must be at least {MIN_KEPT}, not {keep_tokens}", "keep_tokens")
