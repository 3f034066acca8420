"""A report as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from foldserve.loadtest.report.tables import Table

_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #1f2937 }
h1 { font-size: 1.6rem; margin-bottom: .3rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e5e7eb; text-align: right; white-space: nowrap }
th { background: #f9fafb } tr:hover td { background: #f3f4f6 }
.label { text-align: left } .prose :is(th, td) { text-align: left; white-space: normal }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem; font-size: 13px }
dt { color: #6b7280 } dd { margin: 0 } svg { max-width: 100%; height: auto } figure { margin: 1.5rem 0 }
.note { font-size: 13px; color: #4b5563; max-width: 60rem }
</style></head><body>
<h1>{{ title }}</h1>
{% if lead %}<p>{{ lead }}</p>
{% endif %}<dl>{% for name, value in facts.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
{% for svg in charts %}<figure>{{ svg | safe }}</figure>
{% endfor %}
{%- macro row(tag, cells, labels) %}<tr>
{%- for cell in cells %}<{{ tag }}{% if loop.index <= labels %} class="label"{% endif %}>{{ cell }}</{{ tag }}>
{%- endfor %}</tr>
{% endmacro %}
{%- for table in tables %}<h2>{{ table.title }}</h2>
<div class="scroll"><table{% if table.is_prose %} class="prose"{% endif %}>{{ row("th", table.headings, table.labels) }}
{%- for cells in table.cells %}{{ row("td", cells, table.labels) }}{% endfor %}</table></div>
{% if table.note %}<p class="note">{{ table.note }}</p>
{% endif %}{% endfor %}
</body></html>
"""


def page(
    title: str, *, lead: str = "", facts: Mapping[str, str], charts: Iterable[str], tables: Iterable[Table]
) -> str:
    """The page.

    Args:
        lead: the sentence below the title.
        facts: name -> value, below that.
        charts: SVG files.
    """
    from jinja2 import Environment, StrictUndefined

    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_PAGE)
    bare = [svg[svg.index("<svg") :] for svg in charts]  # without the XML head
    return template.render(title=title, lead=lead, facts=facts, charts=bare, tables=tables)
