"""Whether `ratio: "auto"` keeps its targets on held-out questions: `python -m foldserve.loadtest.micro.auto DIR`.

DIR holds the results of `foldserve calibrate --auto --group-field kind` on the demo model's scenes. The demo model
answers held-out questions at several targets, each with token counts by group and with the count of a single group;
with `--pixel-cap`, with the counts that a calibration with that option finds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from foldserve.loadtest.report.journal import RESULTS_FILE
from foldserve.loadtest.report.tables import Table
from foldserve.reducers.item import Layout, plan_item
from foldserve.reducers.ladder import STEPS, ratio_of
from foldserve.reducers.plan import Reduction
from foldserve.server.quality.auto.command import SEED, by_group, caps_of, group_of
from foldserve.server.quality.demo.checkpoint import CHECKPOINT
from foldserve.server.quality.engine.offline import AnsweringEngine, AnsweringModel
from foldserve.server.quality.evaluation.questions import Question, load_questions
from foldserve.server.quality.evaluation.scores import is_right

_TARGETS = (0.02, 0.05, 0.1)
_LONGEST = 96
_AT_ONCE = 64
_ALL_STEPS = tuple(range(1, STEPS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="DIR")
    parser.add_argument("--questions", type=int, default=1200, metavar="N")
    parser.add_argument("--pixel-cap", type=int, metavar="LEVELS", help="as of foldserve calibrate --auto")
    args = parser.parse_args()
    changed = _losses(args.results / RESULTS_FILE)
    calibrated = load_questions(None, len(changed), "", seed=SEED)
    asked = load_questions(None, args.questions, "")
    cells = []
    model = AnsweringModel(str(CHECKPOINT), ("--max-model-len", "1024"))
    layout = model.family.largest
    caps, own_caps = (
        caps_of(model, each, [layout] * len(each), _ALL_STEPS, args.pixel_cap) for each in (calibrated, asked)
    )
    with model.engine(None) as engine:
        whole = [STEPS] * len(asked)
        full = _ask(engine, layout, asked, whole)
        cells.append(_row("all tokens", asked, whole, full, full))
        for target in _TARGETS:
            groups = by_group(calibrated, changed, _ALL_STEPS, target, caps)
            one = dict.fromkeys(groups, group_of(changed, _ALL_STEPS, target, caps))
            for name, found in (("by kind", groups), ("one group", one)):
                own = [found[question.kind] for question in asked]
                steps = [
                    min(group.step, cap) if group.is_capped else group.step
                    for group, cap in zip(own, own_caps or whole, strict=True)
                ]
                answers = _ask(engine, layout, asked, steps)
                cells.append(_row(f"target {target:.0%}, {name}", asked, steps, answers, full))
    headings = ("", "tokens kept, %", "answers changed, %", "right, %")
    print(Table("", headings, cells).markdown())


def _losses(file: Path) -> list[list[bool]]:
    """Whether each sample changed at each step, from the newest run with all steps."""
    runs: dict[str, dict[str, list[bool]]] = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        runs.setdefault(row["run"], {})[row["step"]] = row["samples"]
    steps = [run for run in runs.values() if all(str(step) in run for step in _ALL_STEPS)][-1]
    return [list(flags) for flags in zip(*(steps[str(step)] for step in _ALL_STEPS), strict=True)]


def _ask(engine: AnsweringEngine, layout: Layout, questions: Sequence[Question], steps: Sequence[int]) -> list[str]:
    """The answers, in the order of the questions."""
    answers: dict[int, str] = {}
    for step in sorted(set(steps)):
        places = [i for i, own in enumerate(steps) if own == step]
        reduction = Reduction(ratio=ratio_of(step))
        for start in range(0, len(places), _AT_ONCE):
            these = places[start : start + _AT_ONCE]
            plans = [plan_item(reduction, layout)] * len(these)
            replies = engine.ask([questions[i].messages() for i in these], reduction, plans, _LONGEST)
            answers |= zip(these, (reply.text for reply in replies), strict=True)
    return [answers[i] for i in range(len(questions))]


def _row(
    name: str, questions: Sequence[Question], steps: Sequence[int], answers: Sequence[str], full: Sequence[str]
) -> list[str]:
    kept = sum(steps) / (STEPS * len(questions))
    changed = sum(own != whole for own, whole in zip(answers, full, strict=True)) / len(questions)
    right = sum(is_right(own, question.answers) for own, question in zip(answers, questions, strict=True))
    return [name, f"{100 * kept:.0f}", f"{100 * changed:.1f}", f"{100 * right / len(questions):.1f}"]


if __name__ == "__main__":
    main()
