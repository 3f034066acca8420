"""What a calibration of `ratio: "auto"` found, for people."""

from __future__ import annotations

from importlib.util import find_spec
from math import ceil

from foldserve.loadtest.report.charts import Axis, Chart, ChartLine, ChartPoint, Level, Panel, line_chart
from foldserve.loadtest.report.estimates import Estimate
from foldserve.loadtest.report.page import page
from foldserve.loadtest.report.tables import Table
from foldserve.reducers.ladder import STEPS
from foldserve.server.quality.auto.file import AutoCalibration, Group
from foldserve.server.quality.auto.rule import samples_needed

_TARGETS_HIGH = 4
_LEGEND = (
    "The bound is for new requests. At the upright line the fewest tokens stay for which it does not exceed the target."
)


def text(calibration: AutoCalibration) -> str:
    """What was found, for a terminal."""
    return "\n".join([_lead(calibration), "", _table(calibration).markdown(), *_notes(calibration)])


def html(calibration: AutoCalibration) -> str:
    """The page; without matplotlib without its chart."""
    facts = {
        "Model": calibration.model,
        "Method": str(calibration.reduction.get("method", "folder")),
        "Requests": f"{calibration.data}, {sum(group.samples for group in calibration.groups.values())}",
        "Answers compared": f"their first {calibration.answer_tokens} tokens",
        "Target": f"{calibration.target:.1%} of the answers may change",
        "Pixel cap": "none" if calibration.pixel_cap is None else f"cells alike within {calibration.pixel_cap} levels",
    }
    charts = [chart(calibration)] if find_spec("matplotlib") else []
    lead = " ".join([_lead(calibration), *_notes(calibration)])
    return page(
        "How few vision tokens these requests need", lead=lead, facts=facts, charts=charts, tables=[_table(calibration)]
    )


def _lead(calibration: AutoCalibration) -> str:
    one = calibration.together.share
    compared = f"; a single group for all would keep {one:.0%}" if len(calibration.groups) > 1 else ""
    return (
        f"At most {calibration.target:.1%} of the answers may change: {calibration.kept:.0%} of the vision tokens "
        f"stay{compared}{_without_cap(calibration)}."
    )


def _without_cap(calibration: AutoCalibration) -> str:
    if calibration.kept_uncapped is None:
        return ""
    return f"; without the pixel cap {calibration.kept_uncapped:.0%} would"


def _table(calibration: AutoCalibration) -> Table:
    rows = {**calibration.groups, **({"all as one": calibration.together} if len(calibration.groups) > 1 else {})}
    return Table(
        "Groups",
        ("group", "samples", "step", "tokens kept", "of", "answers changed, measured", "bound"),
        [_row(name, group, calibration) for name, group in rows.items()],
        note="The bound is what the share of changed answers is at most on new requests like these (conformal risk "
        "control). Tokens are those of a mean image.",
    )


def _row(name: str, group: Group, calibration: AutoCalibration) -> tuple[str, ...]:
    measured, bound = "0 %", "-"
    if group.step < STEPS or group.is_capped:
        place = (*calibration.steps, STEPS).index(group.step)
        measured, bound = f"{group.changed[place]:.1%}", f"{group.bound[place]:.1%}"
    return (
        name,
        str(group.samples),
        f"{'at most ' if group.is_capped else ''}{group.step}/{STEPS}",
        str(_tokens(group, calibration)),
        f"{calibration.tokens:.0f}",
        measured,
        bound,
    )


def _notes(calibration: AutoCalibration) -> list[str]:
    needed = samples_needed(calibration.target)
    few = [name for name, group in calibration.groups.items() if group.samples < needed]
    if not few:
        return []
    return [f"Too few samples to remove anything, {needed} are needed at this target: {', '.join(few)}."]


def chart(calibration: AutoCalibration) -> Chart:
    """A panel a group: the bound over the share of tokens that stays."""
    target = Estimate(*[calibration.target] * 3)
    return line_chart(
        "auto",
        "How many answers change, of those with so many tokens?",
        [
            Panel(
                f"{name}: {_tokens(group, calibration)} of {calibration.tokens:.0f} tokens",
                _lines(group, calibration),
                [Level("target", target)],
                at,
            )
            for name, group in calibration.groups.items()
            for at in [100 * group.step / STEPS]
        ],
        Axis("vision tokens that stay, % of all", low=0, high=100, falls=True),
        Axis("answers that change, %", scale=100, digits=1, low=0, high=100 * _TARGETS_HIGH * calibration.target),
        note=_LEGEND,
    )


def _lines(group: Group, calibration: AutoCalibration) -> list[ChartLine]:
    below, steps = len(calibration.steps), (*calibration.steps, STEPS)
    bound, changed = group.bound, group.changed
    if not group.is_capped:  # with all tokens no answer changes
        bound, changed = (*bound[:below], 1 / (group.samples + 1)), (*changed[:below], 0.0)
    return [
        ChartLine(
            name,
            [
                ChartPoint.exact(100 * step / STEPS, share, f"{step}/{STEPS}")
                for step, share in zip(steps, shares, strict=True)
            ],
            colour,
        )
        for name, shares, colour in (("bound", bound, 0), ("measured", changed, None))
    ]


def _tokens(group: Group, calibration: AutoCalibration) -> int:
    """Of a mean image."""
    return ceil(calibration.tokens * group.share)
