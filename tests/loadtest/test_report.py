"""What all reports share, where no single report shows it."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from PIL import Image

from foldserve.loadtest.report.charts import one_panel, write
from foldserve.loadtest.report.page import page
from foldserve.loadtest.report.tables import Table


def test_a_chart_has_room_for_its_legend(tmp_path: Path) -> None:
    """Matplotlib warns of axes that a legend has squeezed to nothing, and warnings are errors."""

    def paint(axes: Axes) -> None:
        for number in range(50):
            axes.plot([0, number], label=f"method {number}")
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))

    write(one_panel(paint), tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as chart:
        assert chart.width == 700 and chart.height > 800


def test_a_table_as_markdown_and_on_a_page() -> None:
    table = Table("Sizes & more", ["name", "tokens"], [["a|b", "1"], ["<c>", "2"]], note="Of one image.")
    assert table.markdown() == "| name | tokens |\n| --- | --- |\n| a\\|b | 1 |\n| <c> | 2 |"
    text = page("T", facts={"model": "<m>"}, charts=["<?xml?><svg></svg>"], tables=[table])
    assert "<dt>model</dt><dd>&lt;m&gt;</dd>" in text
    assert "<figure><svg></svg></figure>" in text
    assert "<h2>Sizes &amp; more</h2>" in text
    assert '<tr><td class="label">&lt;c&gt;</td><td>2</td></tr>' in text
    assert text.count("Of one image.") == 1
