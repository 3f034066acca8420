"""What a calibration of `ratio: "auto"` found, for people."""

from __future__ import annotations

from importlib.util import find_spec
from math import ceil
from typing import TYPE_CHECKING

from foldserve.loadtest.report.page import page
from foldserve.loadtest.report.tables import Table
from foldserve.reducers.ladder import STEPS
from foldserve.server.quality.auto.file import AutoCalibration, Group
from foldserve.server.quality.auto.rule import samples_needed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 3
_PANEL_IN = (2.9, 2.1)
_TARGETS_HIGH = 4
_LEGEND = (
    "Each panel: the share of answers that change over the share of tokens that stay. The line is the bound for new "
    "requests, dotted is what was measured, dashed the target; left of the upright line the bound is above it."
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
    }
    charts = [_chart(calibration)] if find_spec("matplotlib") else []
    lead = " ".join([_lead(calibration), *_notes(calibration), *([_LEGEND] if charts else [])])
    return page(
        "How few vision tokens these requests need", lead=lead, facts=facts, charts=charts, tables=[_table(calibration)]
    )


def _lead(calibration: AutoCalibration) -> str:
    one = calibration.together.step / STEPS
    compared = f"; a single group for all would keep {one:.0%}" if len(calibration.groups) > 1 else ""
    return (
        f"At most {calibration.target:.1%} of the answers may change: {calibration.kept:.0%} of the vision tokens "
        f"stay{compared}."
    )


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
    if group.step < STEPS:
        place = calibration.steps.index(group.step)
        measured, bound = f"{group.changed[place]:.1%}", f"{group.bound[place]:.1%}"
    return (
        name,
        str(group.samples),
        f"{group.step}/{STEPS}",
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


def _chart(calibration: AutoCalibration) -> str:
    """One small panel a group: the bound over the share of tokens that stays."""
    from matplotlib.figure import Figure

    from foldserve.loadtest.report.charts import as_svg, style

    groups = calibration.groups
    rows = ceil(len(groups) / _COLUMNS)
    columns = min(_COLUMNS, len(groups))
    with style():
        figure = Figure(figsize=(_PANEL_IN[0] * columns + 0.4, _PANEL_IN[1] * rows + 0.6), layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for axes, (name, group) in zip(panels, groups.items(), strict=False):
            _panel(axes, name, group, calibration)
        for axes in panels[len(groups) :]:
            axes.remove()
        figure.supxlabel("vision tokens that stay, % of all", fontsize=9)
        figure.supylabel("answers that change, %", fontsize=9)
    return as_svg(figure)


def _panel(axes: Axes, name: str, group: Group, calibration: AutoCalibration) -> None:
    kept = [100 * step / STEPS for step in (*calibration.steps, STEPS)]
    bound = [100 * share for share in (*group.bound, 1 / (group.samples + 1))]
    chosen, target = 100 * group.step / STEPS, 100 * calibration.target
    axes.axvspan(0, chosen, color="C3", alpha=0.07, linewidth=0)
    axes.plot(kept, bound, color="C0", linewidth=1.6, drawstyle="steps-post")
    axes.plot(kept, [100 * share for share in (*group.changed, 0)], color="C0", linewidth=0.9, linestyle=":")
    axes.axhline(target, color="C3", linewidth=0.9, linestyle="--")
    axes.axvline(chosen, color="C2", linewidth=1.6)
    tokens = f"{_tokens(group, calibration)} of {calibration.tokens:.0f} tokens"
    axes.set_title(f"{name}: {tokens}", loc="left")
    axes.set_xlim(0, 103)
    axes.set_ylim(0, _TARGETS_HIGH * target)
    axes.grid()


def _tokens(group: Group, calibration: AutoCalibration) -> int:
    """Of a mean image, at the group's step."""
    return ceil(calibration.tokens * group.step / STEPS)
