"""`ratio: "auto"`: how few tokens each group of requests gets, as `foldserve calibrate --auto` found it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from foldserve.reducers.ladder import STEPS, PixelCap, SettledStep, StepBounds, ratio_of, steps_within
from foldserve.reducers.plan import Reduction

DEFAULT_GROUP = "default"
"""Of requests that no group is known of."""

BOUNDS = (0.0, 0.75)
"""Least and most of an image's tokens that go, unless somebody says otherwise."""


class AutoChoice(NamedTuple):
    """What one image gets.

    Attributes:
        step: of the ladder; with a cap that is not settled yet, the lowest that it can get.
        group: that its request belongs to.
        target: share of answers that may change; None where nothing is promised: of a group that the calibration does
            not hold, which gets the step of the group that needs most, within bounds that allow too few tokens, and
            under pressure.
        pressure: steps that the server's load took off; None where it may not.
        is_calibrated: the calibration holds the group.
        cap: that the image's pixels settle; None where they have no say.
        unpredicted: cells that they do not predict, once the cap is settled.
    """

    step: int
    group: str
    target: float | None
    pressure: int | None = None
    is_calibrated: bool = True
    cap: PixelCap | None = None
    unpredicted: int | None = None

    @property
    def label(self) -> str:
        """The group for metrics, of which a client can't make more."""
        return self.group if self.is_calibrated else "other"

    @property
    def ratio(self) -> float:
        return ratio_of(self.step)

    def with_step(self, by: SettledStep) -> AutoChoice:
        """With what the image's pixels came to."""
        return self._replace(
            step=by.step, unpredicted=by.unpredicted, target=self.target if by.is_enough else None, cap=None
        )

    @classmethod
    def combined(cls, each: Sequence[AutoChoice]) -> AutoChoice | None:
        """Of a request's images the last one's, with the cells of all; nothing is promised that is not of each.

        None without images.
        """
        if not each:
            return None
        targets, cells = [one.target for one in each], [one.unpredicted for one in each if one.unpredicted is not None]
        return each[-1]._replace(target=None if None in targets else targets[-1], unpredicted=sum(cells) or None)

    def to_json(self) -> dict[str, object]:
        """As `usage.vision_tokens` has it."""
        load = {} if self.pressure is None else {"pressure": self.pressure}
        cells = {} if self.unpredicted is None else {"u": self.unpredicted}
        return {"policy": "auto", "group": self.group, "step": self.step, "target": self.target, **load, **cells}


@dataclass(frozen=True, slots=True)
class GroupRules:
    """The operator's map from whom asks, and for which model, to a group; a request's own word comes first.

    Attributes:
        keys: by name of the API key.
        models: by the name that the request calls the model by.
    """

    keys: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> GroupRules:
        """Reads `{"keys": {name: group}, "models": {name: group}}`; ValueError where it is something else."""
        try:
            return cls.from_config(json.loads(text))
        except (json.JSONDecodeError, ValueError) as error:
            raise ValueError(
                f'JSON such as {{"keys": {{"scanner": "ocr"}}, "models": {{}}}} is needed, not {text!r}'
            ) from error

    @classmethod
    def from_config(cls, config: object) -> GroupRules:
        if not isinstance(config, Mapping) or not config.keys() <= {"keys", "models"}:
            raise ValueError(f"groups are given by keys and models, not {config!r}")
        for names in config.values():
            if not isinstance(names, Mapping) or not all(
                isinstance(name, str) for pair in names.items() for name in pair
            ):
                raise ValueError(f"a map from names to groups is needed, not {names!r}")
        return cls(**config)

    def of(self, asked: str | None, owner: str | None, model: str | None) -> str:
        """The group of a request: what it asks for, or its key's, or its model's."""
        return asked or self.keys.get(owner or "") or self.models.get(model or "") or DEFAULT_GROUP


@dataclass(frozen=True, slots=True)
class AutoPolicy:
    """What a server does with `ratio: "auto"`.

    Attributes:
        reduction: the calibrated one, without an amount.
        target: share of answers that may change.
        steps: that were calibrated, ascending, below `STEPS`.
        groups: the step of each.
        pixel_cap: levels by which pixels of like cells may differ; None: pixels have no say.
        uncapped: groups that keep all of their tokens, whatever the pixels are.

    Raises:
        ValueError: no groups, or steps out of their bounds, or an uncapped group that keeps fewer.
    """

    reduction: Reduction
    target: float
    steps: tuple[int, ...]
    groups: Mapping[str, int]
    pixel_cap: int | None = None
    uncapped: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.groups or not {*self.groups.values()} <= {*self.steps, STEPS}:
            raise ValueError(f"groups with steps of {[*self.steps, STEPS]} are needed, not {dict(self.groups)}")
        if any(self.groups.get(group) != STEPS for group in self.uncapped):
            raise ValueError(
                f"groups without a cap keep all tokens: not {sorted(self.uncapped)} of {dict(self.groups)}"
            )

    def __str__(self) -> str:
        kept = ", ".join(f"{name} {step}/{STEPS}" for name, step in self.groups.items())
        capped = "" if self.pixel_cap is None else " at most, fewer where an image's pixels are predictable"
        return f"{kept} of the vision tokens stay{capped}, at most {self.target:.1%} of the answers change"

    def choose(
        self, group: str, bounds: tuple[float, float], pressure: int | None = None, *, more: int = 0
    ) -> AutoChoice | None:
        """The step of a group within bounds, least and most of the tokens that go; None where there is none.

        Args:
            pressure: calibrated steps that the server's load takes off, as far as the bounds allow; None: it may not.
            more: calibrated steps that are put on.
        """
        steps = (*self.steps, STEPS)
        allowed = tuple(step for step in steps if step in steps_within(*bounds))
        if not allowed:
            return None
        step_bounds = StepBounds(steps, allowed, more, pressure or 0)
        is_calibrated = group in self.groups
        as_of = {group} if is_calibrated else self.groups.keys()
        needed = max(self.groups[name] for name in as_of)
        promised = self.target if is_calibrated else None
        if self.pixel_cap is None or self.uncapped & as_of or allowed[0] == STEPS:
            step, is_enough, _ = step_bounds.settle(needed)
            return AutoChoice(step, group, promised if is_enough else None, pressure, is_calibrated)
        cap = PixelCap(self.pixel_cap, needed, step_bounds)
        return AutoChoice(cap.least, group, promised, pressure, is_calibrated, cap)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AutoPolicy:
        """Of what `to_config` gave."""
        return cls(
            Reduction.parse(config["reduction"]),
            config["target"],
            tuple(config["steps"]),
            dict(config["groups"]),
            config["pixel_cap"],
            frozenset(config["uncapped"]),
        )

    def to_config(self) -> dict[str, Any]:
        """As JSON, also for `/v1/reducers`."""
        return {
            "reduction": self.reduction.to_json(),
            "target": self.target,
            "steps": list(self.steps),
            "groups": dict(self.groups),
            "pixel_cap": self.pixel_cap,
            "uncapped": sorted(self.uncapped),
        }


def parse_bounds(text: str) -> tuple[float, float]:
    """Reads `LEAST,MOST`; ValueError where these are no shares."""
    parts = text.split(",")
    try:
        least, most = map(float, parts)
    except ValueError as error:
        raise ValueError(f"two shares such as 0,0.75 are needed, not {text!r}") from error
    check_bounds(least, most)
    return least, most


def check_bounds(least: float, most: float) -> None:
    """Raises ValueError where these are not least and most of the tokens that go."""
    if not 0 <= least <= most < 1:
        raise ValueError(f"bounds are the least and the most of the tokens that go, in [0, 1), not {least} and {most}")
