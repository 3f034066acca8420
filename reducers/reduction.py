"""The fields of `reduction` in a request, and the checked value `Reduction` that they form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from reprlib import repr as _short
from typing import Any, Literal, get_args

from foldserve.reducers import METHODS, method_with_options
from foldserve.reducers.base_only import BaseOnly
from foldserve.reducers.method import AfterTower, InDecoder, Method, Preselection
from foldserve.reducers.options import (
    ChoiceOption,
    CountField,
    Field,
    FlagField,
    Option,
    ShareField,
    TextField,
    Value,
    parse_options,
    to_json,
)
from foldserve.reducers.pixelprune import PixelPrune
from foldserve.reducers.refusal import InvalidReduction

__all__ = ["FIELDS", "MIN_KEPT", "InvalidReduction", "Positions", "Reduction"]

Positions = Literal["renumber", "keep"]

MAX_QUERY = 4096  # characters

MIN_KEPT = 2  # a fold needs two sides
_DEFAULT_METHOD = "folder"


class _Methods(Field[Any]):
    """`a`, or `a+b` with b in the decoder; both also after a preselection, as in `base_only+a`."""

    def parse(self, value: object) -> tuple[str | None, str | None, str | None]:
        """(preselection, method before the decoder, method in it)"""
        names = value.split("+") if isinstance(value, str) else [value]
        methods = [_known(name) for name in names]
        first = methods[0].name if isinstance(methods[0], Preselection) else None
        others = methods[1:] if first else methods
        before = [method.name for method in others if not isinstance(method, InDecoder)]
        in_decoder = [method.name for method in others if isinstance(method, InDecoder)]
        in_order = [*before, *in_decoder] == [method.name for method in others]
        twice = any(isinstance(METHODS[name], Preselection) for name in before)
        if not in_order or len(before) > 1 or len(in_decoder) > 1 or twice:
            raise InvalidReduction(_not_together(*(method.name for method in methods)), "method")
        return first, next(iter(before), None), next(iter(in_decoder), None)

    def values(self) -> dict[str, Any]:
        return {"type": "string"}


_METHOD = _Methods(
    "method",
    _DEFAULT_METHOD,
    "a method, or one before the decoder and one in it, joined by `+` (also behind `base_only+` or `pixelprune+`): "
    + ", ".join(METHODS),
)
_QUERY = TextField(
    "query",
    None,
    "what the tokens that stay are chosen by, of a method that asks for it; default: the text of the message that the "
    "image is in",
    MAX_QUERY,
)
_RATIO = ShareField("ratio", None, "share of tokens removed")
_VALUES: tuple[Field[Any], ...] = (
    _RATIO,
    CountField("keep_tokens", None, "tokens kept per image; instead of `ratio`", MIN_KEPT),
    ChoiceOption(
        "positions",
        None,
        "rotary positions of the tokens that stay: counted anew, or those that they had in the image",
        get_args(Positions),
    ),
    ShareField("decoder_ratio", None, "share of an image's remaining tokens that the method in the decoder removes"),
    _QUERY,
)
"""Fields that are attributes of `Reduction`; None if left out."""
_WITHDRAW = FlagField("withdraw", False, "short for `+withdraw` in `method`")
_DECODER = FlagField("decoder", False, "add the method's own half in the decoder")
_COMMON = {field.name: field for field in (_METHOD, *_VALUES, _WITHDRAW, _DECODER)}

FIELDS: Mapping[str, Field[Any]] = _COMMON | {
    option.name: option for method in METHODS.values() for option in method.options
}
"""All fields of `reduction`: those common to all methods, then the methods' own."""


@dataclass(frozen=True)
class Reduction:
    """The reduction requested for one image. The constructor checks all values; other attributes are as in `FIELDS`.

    Attributes:
        first: the preselection; `method` then works after the tower on what it leaves.
        method: the method before the decoder.
        decoder: the method in the decoder.
        options: (name, value) of the methods' own fields that differ from their defaults, those of `first` first.
        ratio, keep_tokens: a ratio of 0 becomes None and removes nothing. With a preselection the amount limits what
            `method` leaves of the whole image; with `pixelprune` as `method` it says how much stays at least.
        decoder_ratio: None also if the decoder's method has a fixed share.
        query: None: the text of the image's message.

    Raises:
        InvalidReduction: a field is invalid, or two of them contradict each other.
    """

    method: str = _DEFAULT_METHOD
    decoder: str | None = None
    options: tuple[tuple[str, Value], ...] = ()
    ratio: float | None = None
    keep_tokens: int | None = None
    positions: Positions | None = None
    decoder_ratio: float | None = None
    first: str | None = None
    query: str | None = None

    def __post_init__(self) -> None:
        if isinstance(_known(self.method), InDecoder):
            raise InvalidReduction(f"method {self.method!r} works in the decoder: it goes into `decoder`", "method")
        if self.method == BaseOnly.name:
            raise InvalidReduction(f"method {self.method!r} decides what is encoded: it goes into `first`", "method")
        if self.first and not (
            isinstance(_known(self.first), Preselection) and isinstance(METHODS[self.method], AfterTower)
        ):
            raise InvalidReduction(_not_together(self.first, self.method), "method")
        for field in _VALUES:
            if (value := getattr(self, field.name)) is not None:
                object.__setattr__(self, field.name, field.parse(value))
        if self.ratio is not None and self.keep_tokens is not None:
            raise InvalidReduction("ratio and keep_tokens came together: give one of them", "ratio")
        self._settle_decoder()
        given: dict[str, object] = dict(self.options)
        for name in [*given, *([] if self.query is None else [_QUERY.name])]:
            if name not in (takes := self._fields):
                raise InvalidReduction(f"method {self._methods!r} takes no {name}, only {', '.join(takes)}", name)
        object.__setattr__(self, "options", parse_options(self._own_options, given))
        if self.ratio == 0:
            self._settle_ratio_0()

    def _settle_ratio_0(self) -> None:
        """Nothing is removed before the decoder, so `pixelprune` and its options are dropped."""
        object.__setattr__(self, "ratio", None)
        if PixelPrune.name not in (self.first, self.method):
            return
        own = {option.name for option in METHODS[self.method].options} if self.first else set()
        object.__setattr__(self, "options", tuple(option for option in self.options if option[0] in own))
        object.__setattr__(self, "method", self.method if self.first else _DEFAULT_METHOD)
        object.__setattr__(self, "first", None)

    def _settle_decoder(self) -> None:
        """Fill in the decoder's share; a share of 0 drops the method."""
        if self.decoder is None:
            if self.decoder_ratio is not None:
                raise InvalidReduction("decoder_ratio needs a method that works in the decoder", "decoder_ratio")
            return
        method = _known(self.decoder)
        if not isinstance(method, InDecoder):
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
        """Whether all vision tokens leave the decoder at layer K."""
        return self.decoder == "withdraw"

    @property
    def acts_before_decoder(self) -> bool:
        """Whether tokens may be removed before the decoder."""
        return bool(self.first or self.ratio or self.keep_tokens or self.pruning is not None)

    def with_ratio(self, ratio: float) -> Reduction:
        """The same methods with this ratio; `pixelprune` becomes the preselection, so that the ratio is exact."""
        first, method = self.first, self.method
        if method == PixelPrune.name:
            first, method = method, _DEFAULT_METHOD
        return replace(self, first=first, method=method, ratio=ratio, keep_tokens=None)

    @property
    def base_only(self) -> bool:
        """Whether only the base tile of a tiled image is encoded."""
        return self.first == BaseOnly.name

    @cached_property
    def pruning(self) -> PixelPrune | None:
        """The method that chooses cells by their pixels, with its options."""
        method = METHODS[self.first or self.method]
        if not isinstance(method, PixelPrune):
            return None
        found = method_with_options(method.name, self._values_of(method))  # one object for equal options
        assert isinstance(found, PixelPrune)
        return found

    @cached_property
    def option_values(self) -> tuple[Value, ...]:
        """A value for each option of `method`, in its order."""
        return self._values_of(METHODS[self.method])

    def _values_of(self, method: Method) -> tuple[Value, ...]:
        given = dict(self.options)
        return tuple(given.get(option.name, option.default) for option in method.options)

    @property
    def _methods(self) -> str:
        """The methods before the decoder, as a request names them."""
        return f"{self.first}+{self.method}" if self.first else self.method

    @property
    def _fields(self) -> list[str]:
        """Fields that `reduction` may have with these methods."""
        common = [name for name in _COMMON if name != _QUERY.name or METHODS[self.method].takes_query]
        return [*common, *(option.name for option in self._own_options)]

    @property
    def _own_options(self) -> tuple[Option[Any], ...]:
        return (METHODS[self.first].options if self.first else ()) + METHODS[self.method].options

    @classmethod
    def parse(cls, value: object) -> Reduction:
        """Read the JSON form, an object with any of `FIELDS`; raises InvalidReduction with the field at fault."""
        if not isinstance(value, Mapping):
            raise InvalidReduction(f"a reduction must be an object such as {{'ratio': 0.5}}, not {_short(value)}")
        for name, given in value.items():
            if name not in FIELDS:
                raise InvalidReduction(f"unknown field {_short(name)}: the fields are {', '.join(FIELDS)}", str(name))
            if given is None:
                raise InvalidReduction(f"{name} must have a value: leave it out for the default", name)
        values = {field.name: value[field.name] for field in _VALUES if field.name in value}
        first, method, decoder = _METHOD.parse(value.get("method", _DEFAULT_METHOD))
        own = tuple((name, given) for name, given in value.items() if name not in _COMMON)
        if first == BaseOnly.name and not method:
            _refuse_amount([*values, *dict(own)])
        elif first and not method:
            first, method = None, first
        elif decoder and not method:
            _move_ratio(decoder, values)
        method = method or _DEFAULT_METHOD
        decoder = _decoder_method(method, decoder, "withdraw", _WITHDRAW.parse(value.get("withdraw", False)))
        decoder = _decoder_method(
            method, decoder, METHODS[method].decoder_half, _DECODER.parse(value.get("decoder", False))
        )
        return cls(method, decoder, own, first=first, **values)

    def to_json(self) -> dict[str, Any]:
        """Fields that differ from their defaults; the inverse of `parse`. Equal reductions give equal dicts."""
        methods = [self.first] if self.first else []
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
        f"{BaseOnly.name!r} or {PixelPrune.name!r} only before one that works after the tower"
    )


def _refuse_amount(given: Sequence[str]) -> None:
    """Refuse amounts and options with the base tile alone."""
    if amount := [name for name in given if name not in ("positions", "decoder_ratio")]:
        raise InvalidReduction(
            f"method {BaseOnly.name!r} takes no {amount[0]}: leave it out, or name the method that reduces the base "
            f"tile, as in '{BaseOnly.name}+{_DEFAULT_METHOD}'",
            amount[0],
        )


def _move_ratio(decoder: str, values: dict[str, Any]) -> None:
    """If the only method is in the decoder, `ratio` means `decoder_ratio`."""
    if "keep_tokens" in values:
        raise InvalidReduction(f"method {decoder!r} takes a ratio, not keep_tokens", "keep_tokens")
    if "ratio" in values:
        if "decoder_ratio" in values:
            raise InvalidReduction(f"ratio and decoder_ratio mean the same for {decoder!r}: give one", "ratio")
        values["decoder_ratio"] = _RATIO.parse(values.pop("ratio"))


def _decoder_method(method: str, decoder: str | None, more: str | None, flag: bool) -> str | None:
    """The decoder's method: `more` if `flag` is set, else `decoder`."""
    if not flag:
        return decoder
    if more is None:
        raise InvalidReduction(f"method {method!r} has no half in the decoder: leave `decoder` out", "decoder")
    if decoder not in (None, more):
        raise InvalidReduction(f"{decoder!r} and {more!r} both work in the decoder: ask for one", "withdraw")
    return more
