"""Requests with `ratio: "auto"`: read, refused, and turned into a reduction by what was calibrated."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from foldserve.reducers.options import Field
from foldserve.reducers.plan import InvalidReduction, Reduction
from foldserve.reducers.reduction import FIELDS
from foldserve.server.auto import AutoPolicy, Choice, Groups, check_bounds

AUTO = "auto"
"""The value of `ratio`."""
_LONGEST_GROUP = 64
_COMMAND = "`foldserve calibrate MODEL --auto --data requests.jsonl`"


class _Group(Field[str]):
    def parse(self, value: object) -> str:
        if not isinstance(value, str) or not 1 <= len(value) <= _LONGEST_GROUP:
            raise self.refusal(f"a word of at most {_LONGEST_GROUP} characters", value)
        return value

    def values(self) -> dict[str, Any]:
        return {"type": "string", "minLength": 1, "maxLength": _LONGEST_GROUP}


class _Bounds(Field[tuple[float, float]]):
    def parse(self, value: object) -> tuple[float, float]:
        if not isinstance(value, list) or len(value) != 2:
            raise self.refusal("a pair such as [0, 0.75]", value)
        least, most = (FIELDS["ratio"].parse(share) for share in value)
        try:
            check_bounds(least, most)
        except ValueError as error:
            raise InvalidReduction(str(error), self.name) from error
        return least, most

    def values(self) -> dict[str, Any]:
        return {"type": "array", "items": FIELDS["ratio"].values(), "minItems": 2, "maxItems": 2}


_GROUP = _Group("group", None, 'with `ratio: "auto"`: which of the calibrated groups the request belongs to')
_BOUNDS = _Bounds("bounds", None, 'with `ratio: "auto"`: least and most of the tokens that may go')
AUTO_FIELDS: Mapping[str, Field[Any]] = {field.name: field for field in (_GROUP, _BOUNDS)}
"""Fields of `reduction` beside those of every reduction."""


@dataclass(frozen=True, slots=True)
class AutoRatio:
    """What a request with `ratio: "auto"` asks for.

    Attributes:
        fields: of its `reduction` that are no business of this.
        group: that it names.
        bounds: least and most of the tokens that go, if it says so.
    """

    fields: Mapping[str, Any]
    group: str | None = None
    bounds: tuple[float, float] | None = None


def parse(value: object) -> Reduction | AutoRatio:
    """The value of a request's `reduction`; raises InvalidReduction with the field at fault."""
    if not isinstance(value, Mapping):
        return Reduction.parse(value)
    if value.get("ratio") != AUTO:
        for name in AUTO_FIELDS:
            if name in value:
                raise InvalidReduction(f'{name} goes with "ratio": "auto" alone: leave it out', name)
        return Reduction.parse(value)
    own = {field.name: field.parse(value[field.name]) for field in AUTO_FIELDS.values() if field.name in value}
    fields = {name: given for name, given in value.items() if name not in {*AUTO_FIELDS, "ratio"}}
    if "keep_tokens" in fields:
        raise InvalidReduction("ratio and keep_tokens came together: give one of them", "ratio")
    return AutoRatio(fields, **own)


@dataclass(frozen=True, slots=True)
class Chooser:
    """What a server does with such requests.

    Attributes:
        policy: None where nothing was calibrated.
        bounds: least and most of the tokens that go, of requests that do not say.
        groups: the operator's map.
    """

    policy: AutoPolicy | None
    bounds: tuple[float, float]
    groups: Groups

    def choose(
        self, asked: AutoRatio, owner: str | None, model: str | None, modalities: Collection[str]
    ) -> tuple[Reduction, Choice]:
        """The reduction, and why.

        Args:
            owner: name of the key that asks.
            model: as the request calls it.
            modalities: what it brings.

        Raises:
            InvalidReduction: nothing was calibrated, or it was for something else.
        """
        policy = self.policy
        if policy is None:
            raise InvalidReduction(
                f"ratio 'auto' needs a calibration, which this server has not: run {_COMMAND} and start it "
                "again with --auto, or give a number",
                "ratio",
            )
        if asked.fields and Reduction.parse(asked.fields) != policy.reduction:
            calibrated = policy.reduction.to_json() or {"method": policy.reduction.method}
            raise InvalidReduction(
                f"ratio 'auto' was calibrated for {calibrated} on this server: leave {', '.join(asked.fields)} out",
                next(iter(asked.fields)),
            )
        if "video" in modalities:
            raise InvalidReduction("ratio 'auto' was calibrated on images: give videos a number", "ratio")
        group = self.groups.of(asked.group, owner, model)
        choice = policy.choose(group, asked.bounds or self.bounds)
        if choice is None:
            least, most = asked.bounds or self.bounds
            raise InvalidReduction(
                f"no sixteenth of the tokens that was calibrated lies between the bounds [{least}, {most}]: widen them",
                "bounds",
            )
        return replace(policy.reduction, ratio=choice.ratio), choice
