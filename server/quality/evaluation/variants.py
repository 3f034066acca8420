"""The variants to compare: methods x ratios x withdrawal layers, and controls at the same token counts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean as mean
from typing import Any

from foldserve.reducers import METHODS
from foldserve.reducers.item import ItemPlan, Layout, plan_item
from foldserve.reducers.method import AcrossFrames, BeforeTower, InDecoder, Preselection
from foldserve.reducers.plan import InvalidReduction, Reduction
from foldserve.reducers.reduction import MIN_KEPT

CONTROLS = ("random", "downsample")
"""Every method's figure is shown beside the figures of these at the same number of tokens."""

_AMOUNTS = ("ratio", "keep_tokens", "withdraw")


@dataclass(frozen=True, slots=True)
class Spec:
    """A method from the command line: its label, and the fields of a request's `reduction` without an amount."""

    label: str
    fields: tuple[tuple[str, Any], ...]

    def reduction(self, **amount: Any) -> Reduction:
        """Raises InvalidReduction."""
        return Reduction.parse(dict(self.fields) | amount)


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of serving a question.

    Attributes:
        ratio: None if the amount is fixed or a count.
        layer: withdrawal layer K, or None.
        layers: number of decoder layers.
        plans: one for each question's image.
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
        """Vision tokens of an image that reach the decoder; mean over the images."""
        return mean(plan.kept for plan in self.plans)

    @property
    def kept_deep(self) -> float:
        """Vision tokens of an image that layers from K on see; mean over the images."""
        return mean(plan.kept_deep for plan in self.plans)

    @property
    def layer_tokens(self) -> float:
        """Vision tokens that a decoder layer sees; mean over the layers. n K / L if all n leave at layer K of L."""
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
class VariantRefusal:
    label: str
    ratio: float | None
    layer: int | None
    reason: str


def parse_specs(texts: Iterable[str]) -> list[Spec]:
    """Reads methods `name`, `name:option=value,option=value` or a request's JSON object, without amounts.

    Raises:
        ValueError: malformed, or it holds an amount.
    """
    return [_spec(text) for argument in texts for text in _split(argument)]


def _split(text: str) -> list[str]:
    """Splits methods at commas; a piece `option=value` belongs to the method before it."""
    methods: list[str] = []
    for piece in _pieces(text):
        is_option = "=" in piece and ":" not in piece and not piece.lstrip().startswith("{")
        if is_option and methods:
            methods[-1] += f",{piece}"
        else:
            methods.append(piece)
    return methods


def _pieces(text: str) -> list[str]:
    """Splits at commas outside of brackets."""
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
    fields = _json(text) if text.startswith("{") else _parse_method(text)
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


def _parse_method(text: str) -> dict[str, Any]:
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
    """All methods for images; decoder methods only if there is a K."""
    return [
        Spec(name, (("method", name),))
        for name, method in METHODS.items()
        if (withdraws or not isinstance(method, InDecoder)) and not isinstance(method, AcrossFrames)
    ]


def complete(specs: Sequence[Spec], withdraws: bool) -> list[Spec]:
    """Adds the controls, and plain withdrawal if there is a K, unless they are among `specs`."""
    wanted = [*CONTROLS, *(["withdraw"] if withdraws else [])]
    present = {spec.label for spec in specs}
    return [*specs, *(Spec(name, (("method", name),)) for name in wanted if name not in present)]


def variants(
    specs: Sequence[Spec],
    ratios: Sequence[float],
    withdraw_layers: Sequence[int],
    layouts: Sequence[Layout],
    layers: int,
) -> tuple[list[Variant], list[VariantRefusal]]:
    """All variants to measure except ratio 0, and those that this model refuses; controls come last, at each count.

    Args:
        ratios: in (0, 1).
        withdraw_layers: values of K.
        layouts: of each question's image.
        layers: number of decoder layers.
    """
    found: list[Variant] = []
    refused: list[VariantRefusal] = []
    for spec in specs:
        for ratio, layer in _grid(spec, ratios, withdraw_layers):
            try:
                if layer is None and spec.reduction().decoder:
                    raise InvalidReduction("it works in the decoder, from a layer K on: give --withdraw K")
                reduction = spec.reduction() if ratio is None else spec.reduction(ratio=ratio)
                found.append(Variant(spec.label, ratio, layer, layers, reduction, plan_all(reduction, layouts)))
            except InvalidReduction as error:
                refused.append(VariantRefusal(spec.label, ratio, layer, str(error)))
    counts = {
        (v.count, v.reduction.positions or "") for v in found if v.count < mean(layout.tokens for layout in layouts)
    }
    for name in CONTROLS:
        for count, positions in sorted({(count, control_positions(name, asked)) for count, asked in counts}):
            try:
                found.append(_control(name, count, positions, layouts, layers))
            except InvalidReduction as error:
                refused.append(VariantRefusal(f"{name} at {count} tokens", None, None, str(error)))
    return found, refused


def _grid(
    spec: Spec, ratios: Sequence[float], withdraw_layers: Sequence[int]
) -> Iterator[tuple[float | None, int | None]]:
    """Pairs (ratio, K) of a method; the ratio is None if it takes no amount, K is None if it needs none."""
    try:
        decoder = spec.reduction().decoder
    except InvalidReduction:
        yield None, None  # refused once
        return
    method = METHODS.get(dict(spec.fields)["method"])
    fixed = isinstance(method, Preselection) or (isinstance(method, InDecoder) and method.default_ratio is None)
    for layer in withdraw_layers if decoder and withdraw_layers else [None]:
        for ratio in [None] if fixed else ratios:
            yield ratio, layer


def control_positions(name: str, asked: str) -> str:
    """A control's `positions` beside a method with `asked`; "" is the default, which a smaller image always has."""
    return "" if isinstance(METHODS[name], BeforeTower) else asked


def plan_all(reduction: Reduction, layouts: Sequence[Layout]) -> tuple[ItemPlan, ...]:
    """The plan of each image; raises InvalidReduction if one of them can't be reduced so."""
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
            if len(set(layouts)) == 1:  # every image would be refused
                raise
            raise InvalidReduction(f"image {number} of {len(layouts)}: {error}", error.param) from error
    return tuple(plans)


def _control(name: str, count: int, positions: str, layouts: Sequence[Layout], layers: int) -> Variant:
    """A control that keeps `count` tokens, or the next lower possible number; InvalidReduction if unsupported."""
    fields = {"method": name} | ({"positions": positions} if positions else {})
    reduction = Reduction.parse(fields | _amount(name, count, layouts))
    label = f"{name}:positions={positions}" if positions else name
    return Variant(label, None, None, layers, reduction, plan_all(reduction, layouts), is_control=True)


def _amount(name: str, count: int, layouts: Sequence[Layout]) -> dict[str, Any]:
    """`keep_tokens` if all images are one grid of one size, else a ratio that leaves a mean of `count` tokens."""
    first = layouts[0]
    if set(layouts) == {first} and first.tokens == first.parts[0].geometry.tokens:
        geometry = first.parts[0].geometry
        METHODS[name].check(geometry)
        return {"keep_tokens": geometry.tokens - METHODS[name].removable(geometry, geometry.tokens - count)}
    parts = [part for layout in layouts for part in layout.parts]
    grids, tokens = sum(part.count for part in parts), sum(part.tokens for part in parts)
    in_grids = tokens - sum(part.separators for part in parts)
    # The number removed from each grid is rounded down: remove one more from each, so that at most `count` are left.
    return {"ratio": min(1 - 1e-9, (tokens - count * len(layouts) + grids) / in_grids)}
