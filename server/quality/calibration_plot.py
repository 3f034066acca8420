"""The KL curve of a calibration as a chart. Matplotlib is optional."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from foldserve.loadtest.report.charts import Axis, ChartLine, ChartPoint, Level, Panel, line_chart, write
from foldserve.loadtest.report.estimates import Estimate
from foldserve.server.quality.calibration_file import Calibration


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def plot(calibration: Calibration, file: Path) -> None:
    """Draws mean KL against K, with eta and the layer found; the suffix of `file` chooses the format."""
    curve = [ChartPoint.exact(float(layer), kl, f"K={layer}") for layer, kl in calibration.kl.items()]
    lines = [ChartLine(f"mean KL, {calibration.samples} samples", curve, 0)]
    if calibration.withdraw_layer is not None:
        found = calibration.withdraw_layer
        lines.append(ChartLine(f"K={found}", [point for point in curve if point.x == found], 1))
    least = min(calibration.kl.values())
    panel = Panel(_found(calibration), lines, [Level("most accepted (eta)", Estimate(*[calibration.eta] * 3))])
    chart = line_chart(
        "calibration",
        "From which decoder layer on can vision tokens go?",
        [panel],
        Axis("K, first decoder layer without vision tokens"),
        Axis("KL, nats", digits=4, is_log=least > 0),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write(chart.whole(), file)


def _found(calibration: Calibration) -> str:
    if calibration.withdraw_layer is None:
        return f"Vision tokens can leave none of {calibration.layers} layers"
    return f"Vision tokens can go from layer {calibration.withdraw_layer} of {calibration.layers} on"
