"""A report as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from foldserve.loadtest.report.charts import Chart
from foldserve.loadtest.report.svg import page_css
from foldserve.loadtest.report.tables import Table

_LONG_TABLE = 30
"""Tables with at least this many rows are collapsed."""

_STYLE = """\
* { box-sizing: border-box } html { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 86rem; margin: 1.5rem auto; padding: 0 1rem;
  background: var(--paper); color: var(--ink) }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .2rem; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem } p { margin: .3rem 0; max-width: 60rem }
.lead, .note, dt, summary, thead th { color: var(--muted) } .note { font-size: 13px }
.charts { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, max(22rem, 100% / var(--columns) - .8rem)), 1fr)) }
figure { margin: 0; max-width: 34rem } svg { display: block; width: 100%; height: auto }
.scroll { overflow-x: auto; border: 1px solid var(--grid); width: fit-content; max-width: 100% }
table { border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--grid); text-align: right; vertical-align: top;
  white-space: nowrap; font-weight: normal }
thead th { vertical-align: bottom } tbody tr:last-child > * { border-bottom: 0 }
tbody tr:hover > * { background: var(--grid) }
tr > :first-child { position: sticky; left: 0; background: var(--paper); border-right: 1px solid var(--grid) }
tr > :first-child, .label, .prose :is(th, td) { text-align: left } .prose td { white-space: normal; min-width: 9rem }
summary { cursor: pointer; margin-bottom: .4rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: 13px; margin: .8rem 0 }
dd { margin: 0; overflow-wrap: anywhere }
#tip { position: fixed; z-index: 9; pointer-events: none; padding: .3rem .5rem; border-radius: 4px;
  max-width: calc(100vw - 1rem); background: var(--ink); color: var(--paper); font-size: 12.5px; line-height: 1.4;
  white-space: pre-wrap }
@media (max-width: 30rem) {
  body { margin: 1rem auto; padding: 0 .6rem } dl { grid-template-columns: 1fr } dd { margin-bottom: .3rem }
  tr > :first-child { white-space: normal; min-width: 6.5rem; max-width: 9rem }
}
"""

_SCRIPT = """\
const tip=document.getElementById("tip");
for(const hit of document.querySelectorAll(".hit")){
  const text=hit.textContent;hit.replaceChildren();
  hit.addEventListener("pointerenter",event=>{
    tip.textContent=text;tip.hidden=false;
    tip.style.left=Math.max(8,Math.min(event.clientX+12,innerWidth-tip.offsetWidth-8))+"px";
    tip.style.top=Math.max(8,event.clientY-tip.offsetHeight-12)+"px";
  });
  hit.addEventListener("pointerleave",()=>{tip.hidden=true});
}
"""

_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title><style>
{{ style }}</style></head><body>
<h1>{{ title }}</h1>
{% if lead %}<p class="lead">{{ lead }}</p>
{% endif %}
{%- macro cell(tag, text, is_label, more="") -%}
<{{ tag }}{{ more | safe }}{% if is_label %} class="label"{% endif %}>{{ text }}</{{ tag }}>
{%- endmacro %}
{%- macro shown(table) %}<div class="scroll"><table{% if table.is_prose %} class="prose"{% endif %}>
<thead><tr>{% for text in table.headings %}{{ cell("th", text, loop.index <= table.labels) }}{% endfor %}</tr></thead>
<tbody>{% for cells in table.cells %}<tr>
{%- for text in cells %}
{%- if loop.first %}{{ cell("th", text, True, ' scope="row"') }}
{%- else %}{{ cell("td", text, loop.index <= table.labels) }}{% endif %}
{%- endfor %}</tr>
{% endfor %}</tbody></table></div>{% endmacro %}
{%- macro section(table) %}<h2>{{ table.title }}</h2>
{% set rows = table.cells | length %}
{%- if rows >= long %}<details><summary>{{ rows }} rows</summary>{{ shown(table) }}</details>
{% else %}{{ shown(table) }}
{% endif %}{% if table.note %}<p class="note">{{ table.note }}</p>
{% endif %}{% endmacro %}
{%- for table in first %}{{ section(table) }}{% endfor %}
{%- for chart in charts %}<section><h2>{{ chart.title }}</h2>
<div class="charts" style="--columns:{{ chart.columns }}">
{%- for figure in chart.figures() %}<figure>{{ figure.svg(alone=False) | inline }}</figure>{% endfor %}</div>
{% if chart.note %}<p class="note">{{ chart.note }}</p>
{% endif %}</section>
{% endfor %}
{%- for table in tables %}{{ section(table) }}{% endfor %}
{% if facts %}<h2>How it was measured</h2>
<dl>{% for name, value in facts.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
{% endif %}<div id="tip" role="tooltip" hidden></div>
<script>
{{ script }}</script>
</body></html>
"""


def page(
    title: str,
    *,
    lead: str = "",
    facts: Mapping[str, str],
    charts: Iterable[Chart],
    tables: Iterable[Table],
    first: Iterable[Table] = (),
) -> str:
    """The page, from top to bottom: title, lead, tables `first`, charts, tables, facts."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["inline"] = lambda svg: Markup(svg[svg.index("<svg") :])  # without the XML head
    return environment.from_string(_PAGE).render(
        title=title,
        lead=lead,
        facts=facts,
        first=[table.for_page() for table in first],
        charts=[*charts],
        tables=[table.for_page() for table in tables],
        long=_LONG_TABLE,
        style=Markup(f"{page_css()}\n{_STYLE}"),
        script=Markup(_SCRIPT),
    )
