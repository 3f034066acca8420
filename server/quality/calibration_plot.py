"""The KL curve of a calibration as a chart. Matplotlib is optional."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from foldserve.loadtest.report.charts import one_panel, write
from foldserve.server.quality.calibration_file import Calibration

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def plot(calibration: Calibration, file: Path) -> None:
    """Draws mean KL over K, eta and the layer found; the suffix of `file` chooses the format."""

    def paint(axes: Axes) -> None:
        axes.plot(list(calibration.kl), list(calibration.kl.values()), marker="o", label="mean KL")
        axes.axhline(calibration.eta, linestyle="--", color="gray", label=f"eta = {calibration.eta:g}")
        if calibration.withdraw_layer is not None:
            axes.axvline(calibration.withdraw_layer, color="green", label=f"K = {calibration.withdraw_layer}")
        axes.set_yscale("log" if min(calibration.kl.values()) > 0 else "linear")
        axes.set_xlabel("K, first decoder layer without vision tokens")
        axes.set_ylabel("KL(withdrawn || full), nats")
        axes.set_title(f"{calibration.model} ({calibration.layers} layers, {calibration.samples} samples)")
        axes.legend()

    file.parent.mkdir(parents=True, exist_ok=True)
    write(one_panel(paint), file)
