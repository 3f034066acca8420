"""docs/guides/adding-a-field.md, followed to the letter on a copy of the package."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TRY_IT = """
from foldserve.reducers.item import Layout, plan_item
from foldserve.reducers.plan import Reduction, VisionGeometry, make_plan
from foldserve.server.api.errors import InvalidRequest, translate
from foldserve.server.api.limits import misplaced
from foldserve.server.api.schema import FoldChatRequest
from foldserve.server.settings import parse_reduction

def refused(value):
    try:
        Reduction.parse(value)
    except ValueError as refusal:
        error = translate(refusal)
        return error.param, str(error)
    raise AssertionError(f"{value} was taken")

asked = {"ratio": 0.9, "keep_at_least": 64}
reduction = Reduction.parse(asked)
assert reduction.keep_at_least == 64 and reduction.to_json() == asked
assert parse_reduction('{"ratio": 0.9, "keep_at_least": 64}') == reduction

param, message = refused({"keep_at_least": 1.5})
assert (param, message) == ("reduction.keep_at_least", "keep_at_least must be an integer of at least 2, not 1.5")
param, message = refused({"keep_tokens": 5, "keep_at_least": 64})
assert param == "reduction.keep_at_least" and "beside keep_tokens" in message
assert "keep_at_least" in refused({"keep_at_most": 64})[1]

geometry = VisionGeometry(576, (24, 24), layers=2, takes_cells=True)
plans = [make_plan(Reduction.parse(fields), geometry) for fields in (asked, {"ratio": 0.9}, asked | {"ratio": 0.5})]
assert [plan.kept for plan in plans] == [64, 58, 288]
behind_pixels = Reduction.parse(asked | {"method": "pixelprune+folder"})
assert plan_item(behind_pixels, Layout.single(geometry)).kept == 64

schema = FoldChatRequest.model_json_schema()["properties"]["reduction"]["properties"]["keep_at_least"]
assert schema == {
    "type": "integer", "minimum": 2, "description": "tokens that stay of each grid, whatever `ratio` says"
}
for body in ({"keepAtLeast": 64}, {"metadata_of_ours": {"keep_at_least": 64}}):
    try:
        misplaced.check_top(body)
    except InvalidRequest:
        continue
    raise AssertionError(f"{body} was ignored")
print("worked")
"""


def apply(diff: str, package: Path) -> None:
    """Makes the change of a fenced diff: `--- FILE`, then lines that begin with a space or a plus."""
    head, *lines = diff.splitlines()
    file = package / head.removeprefix("--- ")
    before = "".join(f"{line[1:]}\n" for line in lines if line[0] == " ")
    after = "".join(f"{line[1:]}\n" for line in lines)
    source = file.read_text()
    assert source.count(before) == 1, f"{file.name} has changed, docs/guides/adding-a-field.md has not:\n{before}"
    file.write_text(source.replace(before, after))


def test_the_example_of_the_docs(tmp_path: Path) -> None:
    diffs = re.findall(r"```diff\n(.*?)```", (ROOT / "docs/guides/adding-a-field.md").read_text(), re.DOTALL)
    assert sum(len(re.findall(r"^\+", diff, re.MULTILINE)) for diff in diffs) == 5, "the docs promise few lines"
    package = tmp_path / "foldserve"
    for folder in ("reducers", "server"):
        shutil.copytree(ROOT / folder, package / folder, ignore=shutil.ignore_patterns("__pycache__", "checkpoint"))
    (package / "kernels").symlink_to(ROOT / "kernels")
    (package / "__init__.py").touch()
    for diff in diffs:
        apply(diff, package)
    run = subprocess.run(
        [sys.executable, "-c", TRY_IT], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert run.stdout.endswith("worked\n"), run.stderr
