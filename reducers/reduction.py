"""What a request asks for: the strict validator of its JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from reprlib import repr as _short
from typing import Any, Literal

from foldserve.reducers import METHODS
from foldserve.reducers.method import Decoder, Method
from foldserve.reducers.options import Value, parse_options
from foldserve.reducers.refusal import InvalidReduction

__all__ = ["FIELDS", "MIN_KEPT", "InvalidReduction", "Positions", "Reduction"]

Positions = Literal["renumber", "keep"]

MIN_KEPT = 2  # a fold needs two sides
_DEFAULT_METHOD = "folder"

FIELDS: Mapping[str, Mapping[str, Any]] = {
    "method": {
        "type": "string",
        "default": _DEFAULT_METHOD,
        "description": "a method, or one before the decoder and one in it, joined by `+`: " + ", ".join(METHODS),
    },
    "ratio": {"type": "number", "minimum": 0, "exclusiveMaximum": 1, "description": "share of tokens removed"},
    "keep_tokens": {"type": "integer", "minimum": MIN_KEPT, "description": "tokens kept per image; instead of `ratio`"},
    "positions": {
        "type": "string",
        "enum": ["renumber", "keep"],
        "description": "rotary positions of the tokens that stay: counted anew, or those that they had in the image",
    },
    "withdraw": {"type": "boolean", "default": False, "description": "short for `+withdraw` in `method`"},
    "decoder": {"type": "boolean", "default": False, "description": "add the method's own half in the decoder"},
    "decoder_ratio": {
        "type": "number",
        "minimum": 0,
        "exclusiveMaximum": 1,
        "description": "share of an image's remaining tokens that the method in the decoder removes",
    },
}
"""JSON Schema of the fields that are no option of a single method."""


@dataclass(frozen=True)
class Reduction:
    """The reduction asked for one image; the values are checked however it is made.

    Attributes:
        method: the method that works before the decoder.
        ratio: share of the vision tokens that it removes, in [0, 1); 0 is kept as None.
        keep_tokens: tokens to keep per image instead, at least 2; neither of the two: it removes nothing.
        decoder: the method that works in the decoder, or None.
        decoder_ratio: share that it removes of the tokens that are left, in (0, 1); None if it can't be chosen.
        positions: of the tokens that stay: "renumber" counts them anew, "keep" leaves each where it was; None: the
            server's default.
        options: (name, value) of the methods' own fields that differ from their defaults.

    Raises:
        InvalidReduction: a field is wrong, or two of them contradict each other.
    """

    method: str = _DEFAULT_METHOD
    ratio: float | None = None
    keep_tokens: int | None = None
    decoder: str | None = None
    decoder_ratio: float | None = None
    positions: Positions | None = None
    options: tuple[tuple[str, Value], ...] = ()

    def __post_init__(self) -> None:
        if isinstance(_known(self.method), Decoder):
            raise InvalidReduction(f"method {self.method!r} works in the decoder: it goes into `decoder`", "method")
        _check_ratio(self.ratio, "ratio")
        _check_keep_tokens(self.keep_tokens)
        if self.ratio is not None and self.keep_tokens is not None:
            raise InvalidReduction("ratio and keep_tokens came together: give one of them", "ratio")
        if self.positions not in (None, "renumber", "keep"):
            raise InvalidReduction(f"positions must be 'renumber' or 'keep', not {_short(self.positions)}", "positions")
        object.__setattr__(self, "ratio", float(self.ratio) if self.ratio else None)
        self._settle_decoder()
        given: dict[str, object] = dict(self.options)
        for name in given:
            if name not in {option.name for option in METHODS[self.method].options}:
                takes = ", ".join([*FIELDS, *(option.name for option in METHODS[self.method].options)])
                raise InvalidReduction(f"method {self.method!r} takes no {name}, only {takes}", name)
        object.__setattr__(self, "options", parse_options(METHODS[self.method].options, given))

    def _settle_decoder(self) -> None:
        """Fills in the share that the decoder's method removes; a share of 0 is no method."""
        _check_ratio(self.decoder_ratio, "decoder_ratio")
        if self.decoder is None:
            if self.decoder_ratio is not None:
                raise InvalidReduction("decoder_ratio needs a method that works in the decoder", "decoder_ratio")
            return
        method = _known(self.decoder)
        if not isinstance(method, Decoder):
            raise InvalidReduction(_not_together(self.method, self.decoder), "method")
        if method.default_ratio is None:
            if self.decoder_ratio is not None:
                raise InvalidReduction(f"{self.decoder!r} removes all vision tokens: leave the share out", "ratio")
        elif self.decoder_ratio is None:
            object.__setattr__(self, "decoder_ratio", method.default_ratio)
        elif self.decoder_ratio == 0:
            object.__setattr__(self, "decoder", None)
            object.__setattr__(self, "decoder_ratio", None)

    @property
    def withdraw(self) -> bool:
        """All vision tokens leave the decoder at layer K."""
        return self.decoder == "withdraw"

    @cached_property
    def option_values(self) -> tuple[Value, ...]:
        """A value for each option of `method`, in its order."""
        given = dict(self.options)
        return tuple(given.get(option.name, option.default) for option in METHODS[self.method].options)

    @classmethod
    def parse(cls, value: object) -> Reduction:
        """Validate the JSON form: an object with any of `FIELDS` and the methods' options, null being no value.

        Raises:
            InvalidReduction: with the field at fault.
        """
        if not isinstance(value, Mapping):
            raise InvalidReduction(f"a reduction must be an object such as {{'ratio': 0.5}}, not {_short(value)}")
        options = {option.name for method in METHODS.values() for option in method.options}
        for name, given in value.items():
            if name not in FIELDS and name not in options:
                known = ", ".join([*FIELDS, *sorted(options)])
                raise InvalidReduction(f"unknown field {_short(name)}: the fields are {known}", str(name))
            if given is None:
                raise InvalidReduction(f"{name} must have a value: leave it out for the default", name)
        amounts = {name: value[name] for name in ("ratio", "keep_tokens", "decoder_ratio") if name in value}
        method, decoder = _methods(value.get("method", _DEFAULT_METHOD))
        if decoder and not method:
            _move_ratio(decoder, amounts)
        method = method or _DEFAULT_METHOD
        decoder = _added(method, decoder, "withdraw", _flag(value, "withdraw"))
        decoder = _added(method, decoder, METHODS[method].decoder_half, _flag(value, "decoder"))
        own = tuple((name, given) for name, given in value.items() if name in options)
        positions: Any = value.get("positions")
        return cls(method, decoder=decoder, positions=positions, options=own, **amounts)

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their defaults; equal reductions give equal dicts, and `parse` inverts it."""
        fields: dict[str, Any] = {"method": self.method, "ratio": self.ratio, "keep_tokens": self.keep_tokens}
        fields["positions"] = self.positions
        fields |= {name: list(value) if isinstance(value, tuple) else value for name, value in self.options}
        if self.withdraw:
            fields["withdraw"] = True
        elif self.decoder:
            fields |= {"method": f"{self.method}+{self.decoder}", "decoder_ratio": self.decoder_ratio}
        if fields["method"] == _DEFAULT_METHOD:
            del fields["method"]
        return {name: value for name, value in fields.items() if value is not None}


def _known(method: object) -> Method:
    if not isinstance(method, str) or method not in METHODS:
        raise InvalidReduction(f"unknown method {_short(method)}: the methods are {', '.join(METHODS)}", "method")
    return METHODS[method]


def _methods(name: object) -> tuple[str | None, str | None]:
    """`a`, or `a+b` with b in the decoder -> (method before the decoder, method in it)."""
    names = name.split("+") if isinstance(name, str) else [name]
    methods = [_known(part) for part in names]
    in_decoder = [isinstance(method, Decoder) for method in methods]
    if in_decoder == [False]:
        return methods[0].name, None
    if in_decoder == [True]:
        return None, methods[0].name
    if in_decoder == [False, True]:
        return methods[0].name, methods[1].name
    raise InvalidReduction(_not_together(*(method.name for method in methods)), "method")


def _not_together(*names: str) -> str:
    stages = " and ".join(f"{name!r} ({METHODS[name].stage.value.replace('_', ' ')})" for name in names)
    return f"{stages} can't be combined: only one method before the decoder goes with one in it, in this order"


def _move_ratio(decoder: str, amounts: dict[str, Any]) -> None:
    """With a decoder's method alone, `ratio` is that method's."""
    if "keep_tokens" in amounts:
        raise InvalidReduction(f"method {decoder!r} takes a ratio, not keep_tokens", "keep_tokens")
    if "ratio" in amounts:
        if "decoder_ratio" in amounts:
            raise InvalidReduction(f"ratio and decoder_ratio mean the same for {decoder!r}: give one", "ratio")
        _check_ratio(amounts["ratio"], "ratio")
        amounts["decoder_ratio"] = amounts.pop("ratio")


def _flag(value: Mapping[str, object], name: str) -> bool:
    flag = value.get(name, False)
    if not isinstance(flag, bool):
        raise InvalidReduction(f"{name} must be true or false, not {_short(flag)}", name)
    return flag


def _added(method: str, decoder: str | None, more: str | None, flag: bool) -> str | None:
    """The decoder's method once `flag` has asked for `more`."""
    if not flag:
        return decoder
    if more is None:
        raise InvalidReduction(f"method {method!r} has no half in the decoder: leave `decoder` out", "decoder")
    if decoder not in (None, more):
        raise InvalidReduction(f"{decoder!r} and {more!r} both work in the decoder: ask for one", "withdraw")
    return more


def _check_ratio(ratio: object, name: str) -> None:
    if ratio is None:
        return
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise InvalidReduction(f"{name} must be a number in [0, 1), not {_short(ratio)}", name)
    if not 0 <= ratio < 1:
        raise InvalidReduction(f"{name} is the share of vision tokens to remove, in [0, 1), not {_short(ratio)}", name)


def _check_keep_tokens(keep_tokens: object) -> None:
    if keep_tokens is None:
        return
    if isinstance(keep_tokens, bool) or not isinstance(keep_tokens, int):
        raise InvalidReduction(f"keep_tokens must be an integer, not {_short(keep_tokens)}", "keep_tokens")
    if keep_tokens < MIN_KEPT:
        raise InvalidReduction(f"keep_tokens must be at least {MIN_KEPT}, not {keep_tokens}", "keep_tokens")
