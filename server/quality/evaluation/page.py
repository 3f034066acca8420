"""The quality card as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping

from jinja2 import Environment, StrictUndefined

from foldserve.server.quality.evaluation.card import Card
from foldserve.server.quality.evaluation.tables import HEADINGS, head, kind_rows, notes, refused_rows, rows

_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Quality of {{ card.model }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } .why td { text-align: left; white-space: normal }
svg { max-width: 100%; height: auto } figure { margin: 1.5rem 0 } code { font-size: 12px }
</style></head><body>
{% macro table(headings, cells) %}<tr>{% for name in headings %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in cells %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}{% endmacro %}
<h1>Quality of {{ card.model }}</h1><p>{{ head }}</p>
{% for svg in plots %}<figure>{{ svg | safe }}</figure>
{% endfor %}<h2>Results</h2><table>{{ table(headings, rows) }}</table><p>{{ notes }}</p>
{% if kinds %}<h2>Accuracy by kind of question, %</h2>
<table>{{ table(["method", "ratio", "K"] + kinds, kind_rows) }}</table>{% endif %}
{% if refused %}<h2>Not possible on this model</h2>
<table class="why">{{ table(["method", "ratio", "K", "why"], refused) }}</table>{% endif %}
<p><code>weights {{ card.model_hash }}<br>questions {{ card.data_hash }}</code></p>
</body></html>
"""


def page(card: Card, plots: Mapping[str, str]) -> str:
    """The page, with the plots (SVG) in it."""
    kinds = sorted({kind for result in card.results for kind in result.kinds})
    bare = [svg[svg.index("<svg") :] for svg in plots.values()]  # without the XML head
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_PAGE)
    return template.render(
        card=card,
        head=head(card),
        notes=notes(card),
        plots=bare,
        headings=HEADINGS,
        rows=rows(card),
        kinds=kinds,
        kind_rows=kind_rows(card, kinds),
        refused=refused_rows(card),
    )
