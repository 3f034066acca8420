from __future__ import annotations

import re
from pathlib import Path

from foldserve.reducers import METHODS
from foldserve.reducers.method import Method
from tools.reference.markdown import code, table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "methods.md"
START, END = "<!-- python -m tests.engine.method_table -->\n", "<!-- end of the table -->\n"
"""Marks around the table of methods and models."""

_TEXT = """\
# Methods

Values of `reduction.method`. `a+b` joins a method that works before the decoder with one in it; `base_only+a` and
`pixelprune+a` reduce what these two leave. Which one to take: [choosing](../guides/choosing.md). What it costs:
[right answers](../explanation/quality/quality.md), [time](../explanation/benchmarks/reducers-cpu.md).

{methods}
## Methods and models

`i`: images, `v`: videos, `-`: not with this model. A server says the same of its model: `modalities` in
`GET /v1/reducers`. What is particular to a model: [families](families.md).

{models}"""


def page() -> str:
    head = ["Method", "Works", "What it does", "Its own fields"]
    return _TEXT.format(methods=table(head, map(_row, METHODS.values())), models=_models())


def _row(method: Method) -> list[str]:
    fields = [option.name for option in method.options] + ["decoder"] * (method.decoder_half is not None)
    fields += ["query"] * method.takes_query
    paper = f" *{method.paper}*" if method.paper else ""
    works = method.stage.value.replace("_", " ")
    return [code(method.name), works, f"{method.summary}{paper}", ", ".join(map(code, fields))]


def _models() -> str:
    """The table already on the page: writing it anew takes a checkpoint of each family, whose tests keep it true."""
    found = re.search(f"{re.escape(START)}.*{re.escape(END)}", PAGE.read_text(), re.DOTALL)
    assert found, f"{PAGE} has no table of models: see tests/engine/method_table.py"
    return found[0]
