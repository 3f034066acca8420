"""What is compared: methods by amounts by withdrawal layers, and the controls at the same counts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean as mean
from typing import Any

from foldserve.reducers import METHODS
from foldserve.reducers.item import ItemPlan, Layout, plan_item
from foldserve.reducers.method import AcrossFrames, BeforeTower, Decoder, Preselection
from foldserve.reducers.plan import InvalidReduction, Reduction
from foldserve.reducers.reduction import MIN_KEPT

CONTROLS = ("random", "downsample")
"""No method's figure is shown without what these keep of the answers at the same number of tokens."""

_AMOUNTS = ("ratio", "keep_tokens", "withdraw")


@dataclass(frozen=True, slots=True)
class Spec:
    """A method as the user named it: its label, and the fields of a request's `reduction` without an amount."""

    label: str
    fields: tuple[tuple[str, Any], ...]

    def reduction(self, **amount: Any) -> Reduction:
        """The request's reduction; raises InvalidReduction where it can't be."""
        return Reduction.parse(dict(self.fields) | amount)


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of serving a question.

    Attributes:
        label: as the user named it.
        ratio: that was asked for; None where the amount is fixed or a count.
        layer: K of the server that it needs, or None.
        layers: L, the decoder's layers.
        reduction: what a request sends.
        plans: what becomes of each question's image.
        is_control: it stands for no request but for the count of others.
    """

    label: str
    ratio: float | None
    layer: int | None
    layers: int
    reduction: Reduction
    plans: tuple[ItemPlan, ...]
    is_control: bool = False

    @property
    def kept(self) -> float:
        """Vision tokens of an image that reach the decoder, mean over the images."""
        return mean(plan.kept for plan in self.plans)

    @property
    def kept_deep(self) -> float:
        """Those that its layers from K on see."""
        return mean(plan.kept_deep for plan in self.plans)

    @property
    def layer_tokens(self) -> float:
        """Vision tokens of an image that a decoder layer sees, mean over the layers: n K / L if all leave at K."""
        if self.layer is None:
            return self.kept
        return (self.kept * self.layer + self.kept_deep * (self.layers - self.layer)) / self.layers

    @property
    def count(self) -> int:
        """`layer_tokens` as a number of tokens that a control can keep."""
        return max(MIN_KEPT, round(self.layer_tokens))

    @property
    def key(self) -> str:
        """Equal for variants that are the same to the engine."""
        return json.dumps([sorted({plan.to_ints() for plan in self.plans}), self.layer], separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Refusal:
    """What can't be done on this model, and why."""

    label: str
    ratio: float | None
    layer: int | None
    reason: str


def parse_specs(texts: Iterable[str]) -> list[Spec]:
    """Reads methods as written on a command line: `name`, `name:option=value,option=value`, or a request's JSON object.

    Raises:
        ValueError: not readable, or an amount in it.
    """
    return [_spec(text) for argument in texts for text in _split(argument)]


def _split(text: str) -> list[str]:
    """Methods with commas between them; `option=value` behind a comma belongs to the method before it."""
    methods: list[str] = []
    for piece in _pieces(text):
        is_option = "=" in piece and ":" not in piece and not piece.lstrip().startswith("{")
        if is_option and methods:
            methods[-1] += f",{piece}"
        else:
            methods.append(piece)
    return methods


def _pieces(text: str) -> list[str]:
    """What stands between the commas that are in no brackets."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return pieces


def _spec(text: str) -> Spec:
    text = text.strip()
    fields = _json(text) if text.startswith("{") else _named(text)
    for name in _AMOUNTS:
        if name in fields:
            advice = "withdraw as +withdraw in the method" if name == "withdraw" else "amounts with --ratios"
            raise ValueError(f"{text!r} has {name} in it: give {advice}")
    if not isinstance(fields.get("method"), str):
        raise ValueError(f"{text!r} names no method: the methods are {', '.join(METHODS)}")
    return Spec(text if not text.startswith("{") else _label(fields), tuple(fields.items()))


def _json(text: str) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{text!r} is no JSON object: {error}") from error
    return fields


def _named(text: str) -> dict[str, Any]:
    name, _, options = text.partition(":")
    fields: dict[str, Any] = {"method": name}
    for option in _pieces(options) if options else []:
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"{text!r}: {option!r} must be option=value")
        try:
            fields[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            fields[key.strip()] = value.strip()
    return fields


def _label(fields: Mapping[str, Any]) -> str:
    options = [f"{name}={json.dumps(value)}" for name, value in fields.items() if name != "method"]
    return ":".join([str(fields["method"]), *([",".join(options)] if options else [])])


def default_specs(withdraws: bool) -> list[Spec]:
    """Every method of images; those of the decoder only where there is a K to run them at."""
    return [
        Spec(name, (("method", name),))
        for name, method in METHODS.items()
        if (withdraws or not isinstance(method, Decoder)) and not isinstance(method, AcrossFrames)
    ]


def complete(specs: Sequence[Spec], withdraws: bool) -> list[Spec]:
    """The specs, and the controls and plain withdrawal where they are missing."""
    wanted = [*CONTROLS, *(["withdraw"] if withdraws else [])]
    present = {spec.label for spec in specs}
    return [*specs, *(Spec(name, (("method", name),)) for name in wanted if name not in present)]


def variants(
    specs: Sequence[Spec],
    ratios: Sequence[float],
    withdraw_layers: Sequence[int],
    layouts: Sequence[Layout],
    layers: int,
) -> tuple[list[Variant], list[Refusal]]:
    """Everything to be measured beside ratio 0, each once, and what can't be.

    The controls come after what they control, at each of its counts.

    Args:
        ratios: shares of tokens removed, in (0, 1).
        withdraw_layers: values of K.
        layouts: of each question's image.
        layers: L, the decoder's layers.
    """
    found: list[Variant] = []
    refused: list[Refusal] = []
    for spec in specs:
        for ratio, layer in _grid(spec, ratios, withdraw_layers):
            try:
                if layer is None and spec.reduction().decoder:
                    raise InvalidReduction("it works in the decoder, from a layer K on: give --withdraw K")
                reduction = spec.reduction() if ratio is None else spec.reduction(ratio=ratio)
                found.append(Variant(spec.label, ratio, layer, layers, reduction, plan_all(reduction, layouts)))
            except InvalidReduction as error:
                refused.append(Refusal(spec.label, ratio, layer, str(error)))
    counts = {
        (v.count, v.reduction.positions or "") for v in found if v.count < mean(layout.tokens for layout in layouts)
    }
    for name in CONTROLS:
        for count, positions in sorted({(count, control_positions(name, asked)) for count, asked in counts}):
            try:
                found.append(_control(name, count, positions, layouts, layers))
            except InvalidReduction as error:
                refused.append(Refusal(f"{name} at {count} tokens", None, None, str(error)))
    return found, refused


def _grid(
    spec: Spec, ratios: Sequence[float], withdraw_layers: Sequence[int]
) -> Iterator[tuple[float | None, int | None]]:
    """(ratio, K) of a method; no ratio for what has no amount, no K for what needs none."""
    try:
        decoder = spec.reduction().decoder
    except InvalidReduction:
        yield None, None  # refused once
        return
    method = METHODS.get(dict(spec.fields)["method"])
    fixed = isinstance(method, Preselection) or (isinstance(method, Decoder) and method.default_ratio is None)
    for layer in withdraw_layers if decoder and withdraw_layers else [None]:
        for ratio in [None] if fixed else ratios:
            yield ratio, layer


def control_positions(name: str, asked: str) -> str:
    """Which positions the tokens of a control have, beside a method's; "" is the server's default.

    Those of a smaller image are its own: it has no others.
    """
    return "" if isinstance(METHODS[name], BeforeTower) else asked


def plan_all(reduction: Reduction, layouts: Sequence[Layout]) -> tuple[ItemPlan, ...]:
    """What becomes of each image; raises InvalidReduction if one of them can't be reduced so."""
    if reduction.pruning is not None:
        raise InvalidReduction(
            f"with {reduction.pruning.name!r} an image's pixels decide how many tokens it keeps, and methods are "
            "compared here at counts that are planned from sizes",
            "method",
        )
    plans: list[ItemPlan] = []
    for number, layout in enumerate(layouts, start=1):
        try:
            plans.append(plan_item(reduction, layout))
        except InvalidReduction as error:
            if len(set(layouts)) == 1:  # as of any other image
                raise
            raise InvalidReduction(f"image {number} of {len(layouts)}: {error}", error.param) from error
    return tuple(plans)


def _control(name: str, count: int, positions: str, layouts: Sequence[Layout], layers: int) -> Variant:
    """A control that keeps `count` tokens of an image, or the next lower number that it can keep.

    Raises:
        InvalidReduction: the model is not one that it works with.
    """
    fields = {"method": name} | ({"positions": positions} if positions else {})
    reduction = Reduction.parse(fields | _amount(name, count, layouts))
    label = f"{name}:positions={positions}" if positions else name
    return Variant(label, None, None, layers, reduction, plan_all(reduction, layouts), is_control=True)


def _amount(name: str, count: int, layouts: Sequence[Layout]) -> dict[str, Any]:
    """Tokens to keep, of images that are one grid of one size; else a ratio that leaves `count` of them at the mean."""
    first = layouts[0]
    if set(layouts) == {first} and first.tokens == first.parts[0].geometry.tokens:
        geometry = first.parts[0].geometry
        METHODS[name].check(geometry)
        return {"keep_tokens": geometry.tokens - METHODS[name].removable(geometry, geometry.tokens - count)}
    parts = [part for layout in layouts for part in layout.parts]
    grids, tokens = sum(part.count for part in parts), sum(part.tokens for part in parts)
    in_grids = tokens - sum(part.separators for part in parts)
    # What goes of a grid is rounded down: one more from each, so that no more than `count` are left.
    return {"ratio": min(1 - 1e-9, (tokens - count * len(layouts) + grids) / in_grids)}
