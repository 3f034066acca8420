"""The page that all reports share, and its tables."""

from __future__ import annotations

from foldserve.loadtest.report.charts import bars
from foldserve.loadtest.report.page import page
from foldserve.loadtest.report.tables import Table


def test_a_table_as_markdown_and_on_a_page() -> None:
    table = Table("Sizes & more", ["name", "tokens"], [["a|b", "1"], ["<c>", "2"]], note="Of one image.")
    assert table.markdown() == "| name | tokens |\n| --- | --- |\n| a\\|b | 1 |\n| <c> | 2 |"
    chart = bars("chart", "How <many>?", [("one", 1.0)], "x", note="So many.")
    text = page("T", facts={"model": "<m>"}, charts=[chart], tables=[table])
    assert "<dt>model</dt><dd>&lt;m&gt;</dd>" in text
    assert "<h2>How &lt;many&gt;?</h2>" in text and "<figure><svg" in text and "So many." in text
    assert "<h2>Sizes &amp; more</h2>" in text
    assert '<tr><th scope="row" class="label">&lt;c&gt;</th><td>2</td></tr>' in text
    assert text.count("Of one image.") == 1


def test_what_names_a_row_is_the_one_column_that_stays() -> None:
    table = Table("T", ["load", "variant", "mode", "x"], [["8 at once", "folder", "on", "1"]], labels=3, key=2)
    assert table.for_page().headings == ["load, variant", "mode", "x"]
    assert table.for_page().cells == [["8 at once, folder", "on", "1"]]
    text = page("T", facts={}, charts=[], tables=[table])
    assert '<th scope="row" class="label">8 at once, folder</th><td class="label">on</td><td>1</td>' in text
    assert "<details>" not in text
    long = Table("T", ["name"], [[str(i)] for i in range(100)])
    assert "<details><summary>100 rows</summary>" in page("T", facts={}, charts=[], tables=[long])


def test_a_page_needs_nothing_else() -> None:
    text = page("T", facts={}, charts=[bars("chart", "?", [("one", 1.0)], "x")], tables=[])
    assert not any(outside in text for outside in ("src=", "<link", "@import", "url(http", "fetch("))
    assert text.count("prefers-color-scheme") == 1 and 'class="hit"' in text and "<script>" in text
