"""docs/guides/adding-a-method.md, followed to the letter on a copy of the package."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TRY_IT = """
import torch
from foldserve.reducers import METHODS
from foldserve.reducers.item import ItemPlan, Layout, plan_item
from foldserve.reducers.plan import Reduction, VisionGeometry
from foldserve.server.engine.vision import KeptTokens, reduce_features

assert list(METHODS)[-1] == "norm", "another place would give other methods another code in cache keys"
layout = Layout.single(VisionGeometry(16, (4, 4), layers=2))
x = torch.arange(16.0)[:, None] * torch.ones(3)
for order, expected in (("largest", range(8, 16)), ("smallest", range(8))):
    reduction = Reduction.parse({"method": "norm+withdraw", "ratio": 0.5, "order": order})
    plan = ItemPlan.from_ints(plan_item(reduction, layout).to_ints(), layout)
    assert (plan.method, plan.decoder, plan.kept, plan.kept_deep) == ("norm", "withdraw", 8, 0), plan
    (image,) = reduce_features([KeptTokens(x, torch.arange(16))], plan.grids)  # as the engine does
    assert image.source.tolist() == list(expected)
    assert torch.equal(image.features, x[list(expected)])
    group = image.history.group()
    assert [group[i] for i in expected] == list(range(8)) and (group == -1).sum() == 8
try:
    Reduction.parse({"method": "norm", "order": "middle"})
except ValueError as refusal:
    assert refusal.param == "order"
else:
    raise AssertionError("a wrong option was taken")
print("worked")
"""


def test_the_example_of_the_docs(tmp_path: Path) -> None:
    file, line = re.findall(r"```python\n(.*?)```", (ROOT / "docs/guides/adding-a-method.md").read_text(), re.DOTALL)
    assert len(file.splitlines()) <= 34, "the docs promise a short example"
    package = tmp_path / "foldserve"
    shutil.copytree(ROOT / "reducers", package / "reducers", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("kernels", "server"):
        (package / folder).symlink_to(ROOT / folder)
    (package / "__init__.py").touch()
    (package / "reducers" / "norm.py").write_text(file)
    registry = package / "reducers" / "__init__.py"
    before = registry.read_text()
    after = re.sub(r"(,)(  # append new methods)", r",\n            Norm()\1\2", before)
    after = after.replace("\nMETHODS:", f"\n{line}\nMETHODS:", 1)
    assert after.count("\n") == before.count("\n") + 3
    registry.write_text(after)
    run = subprocess.run(
        [sys.executable, "-c", TRY_IT], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert run.stdout.endswith("worked\n"), run.stderr
