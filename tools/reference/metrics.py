from __future__ import annotations

from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase

from foldserve.server.api import plugin as plugin  # registers those of the API processes
from foldserve.server.engine import stats as stats  # and those of the engine's statistics
from tools.reference.markdown import code, prose, table

_PAGE = """\
# Metrics

`GET /metrics`, in the format of Prometheus. With `--api-keys` it needs a key with the scope `metrics`
([keys](../guides/lifecycle.md#api-keys)). vLLM's own metrics (`vllm:...`) stand beside these.

{table}
Alerts and a dashboard that read them: [operations](../guides/operations.md#alerts).
"""


def page() -> str:
    return _PAGE.format(table=table(["Metric", "Type", "Labels", "What it says"], map(_row, ours())))


def ours() -> list[MetricWrapperBase]:
    """All metrics of foldserve, by name."""
    known = {id(metric): metric for metric in REGISTRY._names_to_collectors.values()}.values()
    metrics = [metric for metric in known if isinstance(metric, MetricWrapperBase)]
    return sorted((metric for metric in metrics if metric._name.startswith("foldserve_")), key=lambda each: each._name)


def _row(metric: MetricWrapperBase) -> list[str]:
    name = f"{metric._name}_total" if metric._type == "counter" else metric._name
    return [code(name), str(metric._type), ", ".join(map(code, metric._labelnames)), prose(metric._documentation)]
