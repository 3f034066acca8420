"""What a request asks for: the fields of `reduction`, and the value that they make together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from reprlib import repr as _short
from typing import Any, Literal, get_args

from foldserve.reducers import METHODS
from foldserve.reducers.base_only import BaseOnly
from foldserve.reducers.method import AfterTower, Decoder, Method
from foldserve.reducers.options import Choice, Count, Field, Flag, Share, Value, parse_options, to_json
from foldserve.reducers.refusal import InvalidReduction

__all__ = ["FIELDS", "MIN_KEPT", "InvalidReduction", "Positions", "Reduction"]

Positions = Literal["renumber", "keep"]

MIN_KEPT = 2  # a fold needs two sides
_DEFAULT_METHOD = "folder"


class _Methods(Field[Any]):
    """`a`, or `a+b` with b in the decoder; either behind `base_only+` too."""

    def parse(self, value: object) -> tuple[bool, str | None, str | None]:
        """(the base tile alone, method before the decoder, method in it)"""
        names = value.split("+") if isinstance(value, str) else [value]
        methods = [_known(name) for name in names]
        base_only = methods[0].name == BaseOnly.name
        others = methods[1:] if base_only else methods
        before = [method.name for method in others if not isinstance(method, Decoder)]
        in_decoder = [method.name for method in others if isinstance(method, Decoder)]
        in_order = [*before, *in_decoder] == [method.name for method in others]
        if not in_order or len(before) > 1 or len(in_decoder) > 1 or BaseOnly.name in before:
            raise InvalidReduction(_not_together(*(method.name for method in methods)), "method")
        return base_only, next(iter(before), None), next(iter(in_decoder), None)

    def values(self) -> dict[str, Any]:
        return {"type": "string"}


_METHOD = _Methods(
    "method",
    _DEFAULT_METHOD,
    "a method, or one before the decoder and one in it, joined by `+` (also behind `base_only+`): "
    + ", ".join(METHODS),
)
_RATIO = Share("ratio", None, "share of tokens removed")
_VALUES: tuple[Field[Any], ...] = (
    _RATIO,
    Count("keep_tokens", None, "tokens kept per image; instead of `ratio`", MIN_KEPT),
    Choice(
        "positions",
        None,
        "rotary positions of the tokens that stay: counted anew, or those that they had in the image",
        get_args(Positions),
    ),
    Share("decoder_ratio", None, "share of an image's remaining tokens that the method in the decoder removes"),
)
"""Fields that are attributes of `Reduction`, None where they are left out."""
_WITHDRAW = Flag("withdraw", False, "short for `+withdraw` in `method`")
_DECODER = Flag("decoder", False, "add the method's own half in the decoder")
_COMMON = {field.name: field for field in (_METHOD, *_VALUES, _WITHDRAW, _DECODER)}

FIELDS: Mapping[str, Field[Any]] = _COMMON | {
    option.name: option for method in METHODS.values() for option in method.options
}
"""All that `reduction` may hold: fields common to all methods, then the methods' own."""


@dataclass(frozen=True)
class Reduction:
    """The reduction asked for one image; the values are checked however it is made.

    Attributes:
        method: the method before the decoder, other than `base_only`.
        decoder: the method in the decoder, or None.
        options: (name, value) of the methods' own fields that differ from their defaults.
        ratio: as in `FIELDS`, like those below; 0 is kept as None.
        decoder_ratio: None also if the decoder's method leaves no choice.
        base_only: of an image laid out in tiles the base tile alone, which `method` may reduce further.

    Raises:
        InvalidReduction: a field is wrong, or two of them contradict each other.
    """

    method: str = _DEFAULT_METHOD
    decoder: str | None = None
    options: tuple[tuple[str, Value], ...] = ()
    ratio: float | None = None
    keep_tokens: int | None = None
    positions: Positions | None = None
    decoder_ratio: float | None = None
    base_only: bool = False

    def __post_init__(self) -> None:
        if isinstance(_known(self.method), Decoder):
            raise InvalidReduction(f"method {self.method!r} works in the decoder: it goes into `decoder`", "method")
        if self.method == BaseOnly.name:
            raise InvalidReduction(
                f"method {self.method!r} decides what is encoded: it goes into `base_only`", "method"
            )
        if self.base_only and not isinstance(METHODS[self.method], AfterTower):
            raise InvalidReduction(_not_together(BaseOnly.name, self.method), "method")
        for field in _VALUES:
            if (value := getattr(self, field.name)) is not None:
                object.__setattr__(self, field.name, field.parse(value))
        if self.ratio is not None and self.keep_tokens is not None:
            raise InvalidReduction("ratio and keep_tokens came together: give one of them", "ratio")
        object.__setattr__(self, "ratio", self.ratio or None)
        self._settle_decoder()
        given: dict[str, object] = dict(self.options)
        for name in given:
            if name not in {option.name for option in METHODS[self.method].options}:
                takes = ", ".join([*_COMMON, *(option.name for option in METHODS[self.method].options)])
                raise InvalidReduction(f"method {self.method!r} takes no {name}, only {takes}", name)
        object.__setattr__(self, "options", parse_options(METHODS[self.method].options, given))

    def _settle_decoder(self) -> None:
        """Fills in the share that the decoder's method removes; a share of 0 is no method."""
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

    @property
    def acts_before_decoder(self) -> bool:
        """Tokens are to go before the decoder."""
        return bool(self.base_only or self.ratio or self.keep_tokens)

    @cached_property
    def option_values(self) -> tuple[Value, ...]:
        """A value for each option of `method`, in its order."""
        given = dict(self.options)
        return tuple(given.get(option.name, option.default) for option in METHODS[self.method].options)

    @classmethod
    def parse(cls, value: object) -> Reduction:
        """Validates the JSON form, an object with any of `FIELDS`; null is not a value.

        Raises:
            InvalidReduction: with the field at fault.
        """
        if not isinstance(value, Mapping):
            raise InvalidReduction(f"a reduction must be an object such as {{'ratio': 0.5}}, not {_short(value)}")
        for name, given in value.items():
            if name not in FIELDS:
                raise InvalidReduction(f"unknown field {_short(name)}: the fields are {', '.join(FIELDS)}", str(name))
            if given is None:
                raise InvalidReduction(f"{name} must have a value: leave it out for the default", name)
        values = {field.name: value[field.name] for field in _VALUES if field.name in value}
        base_only, method, decoder = _METHOD.parse(value.get("method", _DEFAULT_METHOD))
        own = tuple((name, given) for name, given in value.items() if name not in _COMMON)
        if base_only and not method:
            _refuse_amount([*values, *dict(own)])
        elif decoder and not method:
            _move_ratio(decoder, values)
        method = method or _DEFAULT_METHOD
        decoder = _added(method, decoder, "withdraw", _WITHDRAW.parse(value.get("withdraw", False)))
        decoder = _added(method, decoder, METHODS[method].decoder_half, _DECODER.parse(value.get("decoder", False)))
        return cls(method, decoder, own, base_only=base_only, **values)

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their defaults; equal reductions give equal dicts, and `parse` inverts it."""
        methods = [BaseOnly.name] if self.base_only else []
        if not self.base_only or self.method != _DEFAULT_METHOD or self.options or self.ratio or self.keep_tokens:
            methods.append(self.method)
        if self.decoder and not self.withdraw:
            methods.append(self.decoder)
        fields: dict[str, Any] = {} if methods == [_DEFAULT_METHOD] else {"method": "+".join(methods)}
        fields |= {field.name: value for field in _VALUES if (value := getattr(self, field.name)) is not None}
        fields |= {name: to_json(value) for name, value in self.options}
        return fields | ({"withdraw": True} if self.withdraw else {})


def _known(method: object) -> Method:
    if not isinstance(method, str) or method not in METHODS:
        raise InvalidReduction(f"unknown method {_short(method)}: the methods are {', '.join(METHODS)}", "method")
    return METHODS[method]


def _not_together(*names: str) -> str:
    stages = " and ".join(f"{name!r} ({METHODS[name].stage.value.replace('_', ' ')})" for name in names)
    return (
        f"{stages} can't be combined: only one method before the decoder goes with one in it, in this order, and "
        f"{BaseOnly.name!r} only before one that works after the tower"
    )


def _refuse_amount(given: Sequence[str]) -> None:
    """The base tile alone leaves nothing to choose."""
    if amount := [name for name in given if name not in ("positions", "decoder_ratio")]:
        raise InvalidReduction(
            f"method {BaseOnly.name!r} takes no {amount[0]}: leave it out, or name the method that reduces the base "
            f"tile, as in '{BaseOnly.name}+{_DEFAULT_METHOD}'",
            amount[0],
        )


def _move_ratio(decoder: str, values: dict[str, Any]) -> None:
    """With a decoder's method alone, `ratio` is that method's."""
    if "keep_tokens" in values:
        raise InvalidReduction(f"method {decoder!r} takes a ratio, not keep_tokens", "keep_tokens")
    if "ratio" in values:
        if "decoder_ratio" in values:
            raise InvalidReduction(f"ratio and decoder_ratio mean the same for {decoder!r}: give one", "ratio")
        values["decoder_ratio"] = _RATIO.parse(values.pop("ratio"))


def _added(method: str, decoder: str | None, more: str | None, flag: bool) -> str | None:
    """The decoder's method once `flag` has asked for `more`."""
    if not flag:
        return decoder
    if more is None:
        raise InvalidReduction(f"method {method!r} has no half in the decoder: leave `decoder` out", "decoder")
    if decoder not in (None, more):
        raise InvalidReduction(f"{decoder!r} and {more!r} both work in the decoder: ask for one", "withdraw")
    return more
