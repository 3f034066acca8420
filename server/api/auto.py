"""Requests with `ratio: "auto"`: read, refused, and turned into a reduction by what was calibrated."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cachetools import TTLCache

from foldserve.reducers.options import Field, FlagField
from foldserve.reducers.plan import InvalidReduction, Reduction
from foldserve.reducers.reduction import FIELDS
from foldserve.server.auto import AutoChoice, AutoPolicy, check_bounds
from foldserve.server.pressure import pressure
from foldserve.server.settings import Settings

AUTO = "auto"
"""The value of `ratio`."""
_LONGEST_GROUP = 64
_MOST_IMAGES = 65_536
_REMEMBERED_S = 600
_COMMAND = "`foldserve calibrate MODEL --auto --data requests.jsonl`"


class _GroupField(Field[str]):
    def parse(self, value: object) -> str:
        if not isinstance(value, str) or not 1 <= len(value) <= _LONGEST_GROUP:
            raise self.refusal(f"a word of at most {_LONGEST_GROUP} characters", value)
        return value

    def values(self) -> dict[str, Any]:
        return {"type": "string", "minLength": 1, "maxLength": _LONGEST_GROUP}


class _BoundsField(Field[tuple[float, float]]):
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


_GROUP = _GroupField("group", None, 'with `ratio: "auto"`: which of the calibrated groups the request belongs to')
_BOUNDS = _BoundsField("bounds", None, 'with `ratio: "auto"`: least and most of the tokens that may go')
_UNDER_LOAD = FlagField(
    "under_load", None, 'with `ratio: "auto"`: fewer tokens, within the bounds, while the server is full'
)
AUTO_FIELDS: Mapping[str, Field[Any]] = {field.name: field for field in (_GROUP, _BOUNDS, _UNDER_LOAD)}
"""Fields of `reduction` beside those of every reduction."""


@dataclass(frozen=True, slots=True)
class AutoRatio:
    """What a request with `ratio: "auto"` asks for.

    Attributes:
        fields: of its `reduction` that are no business of this.
        group: that it names.
        bounds: least and most of the tokens that go, if it says so.
        under_load: whether the server's load may lower the count; None: as the server has it.
        query: that tokens are chosen by, if it says so.
    """

    fields: Mapping[str, Any]
    group: str | None = None
    bounds: tuple[float, float] | None = None
    under_load: bool | None = None
    query: str | None = None


def parse_requested_reduction(value: object) -> Reduction | AutoRatio:
    """The value of a request's `reduction`; raises InvalidReduction with the field at fault."""
    if not isinstance(value, Mapping):
        return Reduction.parse(value)
    if value.get("ratio") != AUTO:
        for name in AUTO_FIELDS:
            if name in value:
                raise InvalidReduction(f'{name} goes with "ratio": "auto" alone: leave it out', name)
        return Reduction.parse(value)
    taken = {**AUTO_FIELDS, "query": FIELDS["query"]}
    own = {name: field.parse(value[name]) for name, field in taken.items() if name in value}
    fields = {name: given for name, given in value.items() if name not in {*taken, "ratio"}}
    if "keep_tokens" in fields:
        raise InvalidReduction("ratio and keep_tokens came together: give one of them", "ratio")
    return AutoRatio(fields, **own)


class AutoChooser:
    """What a server does with such requests.

    An image keeps its first count for ten minutes, so that later turns of a chat find it in the prefix cache, whatever
    the pressure has become.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._raised: Counter[str] = Counter()  # steps, by group
        self._levels: TTLCache[object, int] = TTLCache(_MOST_IMAGES, _REMEMBERED_S)  # of pressure, by image

    def raise_count(self, group: str) -> None:
        """Has a group keep one step more from now on."""
        self._raised[group] += 1

    def choose(
        self, asked: AutoRatio, owner: str | None, model: str | None, images: Sequence[str | None]
    ) -> tuple[list[Reduction], list[AutoChoice]]:
        """The reduction of each image, of the fewest tokens where its pixels are still to settle them, and why.

        Args:
            owner: name of the key that asks.
            model: as the request calls it.
            images: their names, where they have any.

        Raises:
            InvalidReduction: nothing was calibrated, or it was for something else, or takes no query.
        """
        settings, policy = self._settings, self._policy_for(asked)
        asked_for = policy.reduction if asked.query is None else replace(policy.reduction, query=asked.query)
        group = settings.auto_groups.of(asked.group, owner, model)
        least, most = bounds = asked.bounds or settings.auto_bounds
        under_load = settings.auto_under_load if asked.under_load is None else asked.under_load
        choice = policy.choose(group, bounds, more=self._raised[group])
        if choice is None:
            raise InvalidReduction(
                f"no sixteenth of the tokens that was calibrated lies between the bounds [{least}, {most}]: widen them",
                "bounds",
            )
        each = [choice] * len(images)
        if under_load:
            now = pressure.level(time.monotonic())
            each = [self._remembered(policy, image, group, bounds, now) for image in images]
        return [replace(asked_for, ratio=one.ratio) for one in each], each

    def _policy_for(self, asked: AutoRatio) -> AutoPolicy:
        """The calibrated policy; raises InvalidReduction unless the request asks for what was calibrated."""
        policy = self._settings.auto
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
        return policy

    def _remembered(
        self, policy: AutoPolicy, image: str | None, group: str, bounds: tuple[float, float], now: int
    ) -> AutoChoice:
        """What an image got when it first came, or gets now."""
        key = None if image is None else (hash(image), group, bounds)
        level = now if key is None else self._levels.setdefault(key, now)
        choice = policy.choose(group, bounds, level, more=self._raised[group])
        assert choice is not None  # as without pressure
        return choice
