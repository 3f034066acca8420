"""`ratio: "auto"` without an engine: the rule by hand and on recorded losses, the ladder, the files, the choice."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldserve.reducers.item import ItemPlan, Layout
from foldserve.reducers.ladder import STEPS, ratio_of, steps_within
from foldserve.reducers.plan import InvalidReduction, Reduction, VisionGeometry, make_plan
from foldserve.server.api import auto
from foldserve.server.api.auto import AutoChooser, AutoRatio
from foldserve.server.auto import AutoPolicy, GroupRules, parse_bounds
from foldserve.server.pressure import Pressure
from foldserve.server.quality.auto.command import by_group, group_of
from foldserve.server.quality.auto.file import AutoCalibration, read_for
from foldserve.server.quality.auto.measure import StepJournal, measure, possible_steps
from foldserve.server.quality.auto.page import chart, html, text
from foldserve.server.quality.auto.rule import chosen_step, risk_bounds, samples_needed
from foldserve.server.quality.calibration_options import CalibrationOptions
from foldserve.server.quality.evaluation.questions import Question
from foldserve.server.quality.evaluation.variants import parse_specs
from foldserve.server.settings import Settings
from tests.images import photo
from tests.loadtest.readable import check

ALL_STEPS = tuple(range(1, STEPS))
RECORDED = Path(__file__).with_name("auto_losses.json")
"""Of the demo model, by kind of question: for each question the largest step at which FOLDER changes its answer."""


def flags(last_changed: int, steps: Sequence[int] = ALL_STEPS) -> list[bool]:
    """A sample whose answer changes up to this step."""
    return [step <= last_changed for step in steps]


@given(st.integers(2, 4000), st.integers(1, STEPS))
def test_a_step_keeps_its_sixteenths_rounded_up(tokens: int, step: int) -> None:
    asked = Reduction(ratio=ratio_of(step), method="random")
    kept = -(-tokens * step // STEPS)
    if kept >= 2:
        assert make_plan(asked, VisionGeometry(tokens)).kept == kept


@pytest.mark.parametrize(
    ("bounds", "steps"),
    [
        ((0, 0.75), range(4, 17)),
        ((0.5, 0.5), range(8, 9)),
        ((0.3, 0.4), range(10, 12)),
        ((0.26, 0.3), range(12, 12)),
        ((0, 0.99), range(1, 17)),
    ],
)
def test_bounds_are_kept(bounds: tuple[float, float], steps: range) -> None:
    found = steps_within(*bounds)
    assert list(found) == list(steps)
    assert all(bounds[0] <= ratio_of(step) <= bounds[1] for step in found)


def test_the_rule_on_losses_by_hand() -> None:
    samples = [flags(0)] * 17 + [flags(4)] + [flags(9)]
    assert [round(20 * bound) for bound in risk_bounds(samples)] == [3] * 4 + [2] * 5 + [1] * 6
    assert [chosen_step(samples, ALL_STEPS, target) for target in (0.04, 0.05, 0.1, 0.15)] == [16, 10, 5, 1]


def test_a_sample_that_changes_back_has_changed_below() -> None:
    """At step 5 it is right by chance: it counts as changed there and below."""
    sample = [step == 7 for step in ALL_STEPS]
    samples = [sample] + [flags(0)] * 18
    assert chosen_step(samples, ALL_STEPS, 0.05) == 8
    assert [round(20 * bound) for bound in risk_bounds(samples)] == [2] * 7 + [1] * 8


def test_steps_that_a_method_can_not_take_are_passed_over() -> None:
    steps = (1, 4, 9)
    samples = [flags(0, steps)] * 18 + [flags(3, steps)]
    assert chosen_step(samples, steps, 0.05) == 4


@pytest.mark.parametrize(("target", "needed"), [(0.05, 19), (0.02, 49), (0.1, 9), (0.3, 3)])
def test_too_few_samples_allow_nothing(target: float, needed: int) -> None:
    assert samples_needed(target) == needed
    assert chosen_step([flags(0)] * needed, ALL_STEPS, target) == 1
    assert chosen_step([flags(0)] * (needed - 1), ALL_STEPS, target) == STEPS


@pytest.mark.parametrize("target", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "by kind"])
def test_the_other_half_of_recorded_answers_keeps_the_promise(target: float, grouped: bool) -> None:
    """Mean over 30 random halves; a rule without its `+ 1` breaks it on groups of 60."""
    recorded = json.loads(RECORDED.read_text())
    groups = [*recorded.values()] if grouped else [[last for group in recorded.values() for last in group]]
    rng, shares = random.Random(0), []
    for _ in range(30):
        changed = total = 0
        for group in groups:
            shuffled = rng.sample(group, len(group))
            half = len(group) // 2
            step = chosen_step([flags(last) for last in shuffled[:half]], ALL_STEPS, target)
            changed += sum(last >= step for last in shuffled[half:])
            total += len(group) - half
        shares.append(changed / total)
    assert sum(shares) / len(shares) <= target


def questions(kinds: Sequence[str]) -> list[Question]:
    return [Question(photo(i, 48, 48), f"question {i}", kind=kind) for i, kind in enumerate(kinds)]


class Scripted:
    """An engine whose answers change up to a step that the question's number decides."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def answers(self, dialogues: Sequence[Any], plans: Sequence[ItemPlan], max_tokens: int) -> list[list[int]]:
        assert all(plan.is_identity for plan in plans)
        return [[_number(dialogue)] for dialogue in dialogues]

    def changed(
        self,
        dialogues: Sequence[Any],
        reduction: Reduction,
        plans: Sequence[ItemPlan],
        answers: Sequence[Sequence[int]],
    ) -> list[bool]:
        assert [answer[0] for answer in answers] == [_number(dialogue) for dialogue in dialogues]
        (kept,) = {plan.kept for plan in plans}
        self.asked.append(kept)
        return [kept <= _number(dialogue) for dialogue in dialogues]

    def engine(self, withdraw_layer: int | None) -> AbstractContextManager[Scripted]:
        assert withdraw_layer is None
        return nullcontext(self)


def _number(dialogue: Any) -> int:
    return int(dialogue[0]["content"][1]["text"].split()[-1])


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    asked, layouts = questions("aab"), [Layout.single(VisionGeometry(16))] * 3
    (spec,) = parse_specs(["random"])
    plans = possible_steps(spec, layouts)
    assert list(plans) == [*range(2, 16)]  # two tokens have to stay
    more: dict[str, Any] = {"answer_tokens": 4, "batch": 2}
    first = Scripted()

    class Stops(Scripted):
        def changed(self, *args: Any) -> list[bool]:
            if len(self.asked) == 4:
                raise KeyboardInterrupt
            return super().changed(*args)

    with pytest.raises(KeyboardInterrupt):
        measure(Stops(), asked, layouts, spec, plans, StepJournal(tmp_path, "run"), **more)
    found = measure(first, asked, layouts, spec, plans, StepJournal(tmp_path, "run"), **more)
    assert first.asked == [kept for kept in range(13, 1, -1) for _ in range(2)]  # 15 and 14 were there
    assert found == [[kept <= number for kept in range(2, 16)] for number in range(3)]
    again = Scripted()
    assert measure(again, asked, layouts, spec, plans, StepJournal(tmp_path, "run"), **more) == found
    assert again.asked == []


def calibration(**changes: Any) -> AutoCalibration:
    samples = {"ocr": [flags(3)] * 2 + [flags(0)] * 60, "count": [flags(12)] * 40 + [flags(0)] * 20}
    asked = [Question(photo(0, 48, 48), "", kind=kind) for kind, own in samples.items() for _ in own]
    everything = [own for group in samples.values() for own in group]
    values: dict[str, Any] = {
        "model": "m",
        "model_hash": "sha256:0",
        "reduction": {},
        "target": 0.05,
        "answer_tokens": 32,
        "data": "d",
        "data_hash": "sha256:1",
        "tokens": 144,
        "steps": ALL_STEPS,
        "groups": by_group(asked, everything, ALL_STEPS, 0.05),
        "together": group_of(everything, ALL_STEPS, 0.05),
    }
    return AutoCalibration(**values | changes)


def test_the_file_reads_as_it_was_written_and_knows_its_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    file = tmp_path / "auto.json"
    with pytest.raises(ValueError, match=r"run `foldserve calibrate .* --auto"):
        read_for(str(tmp_path), None, file)
    calibration().write(file)
    assert AutoCalibration.model_validate_json(file.read_text()) == calibration()
    with pytest.raises(ValueError, match="other weights"):
        read_for(str(tmp_path), None, file)
    file.write_text("{}")
    with pytest.raises(ValueError, match="is not a calibration"):
        read_for(str(tmp_path), None, file)


def test_the_page_says_what_groups_get_and_what_one_for_all_would() -> None:
    assert {name: group.step for name, group in calibration().groups.items()} == {"count": 13, "ocr": 1}
    told = text(calibration())
    assert "| ocr | 62 | 1/16 | 9 | 144 | 3.2% | 4.8% |" in told
    assert "| all as one | 122 | 13/16 | 117 | 144 | 0.0% | 0.8% |" in told
    assert "Too few" not in told
    page = html(calibration())
    assert "<svg" in page and "count: 117 of 144 tokens" in page
    check(chart(calibration()))
    few = calibration(groups={"ocr": group_of([flags(0)] * 5, ALL_STEPS, 0.05)})
    assert "19 are needed at this target: ocr" in text(few)


POLICY = AutoPolicy(Reduction(), 0.05, (2, 4, 8, 12), {"ocr": 4, "count": 12})


@pytest.mark.parametrize(
    ("group", "bounds", "step", "target"),
    [
        ("ocr", (0, 0.75), 4, 0.05),
        ("ocr", (0, 0.5), 8, 0.05),
        ("count", (0, 0.75), 12, 0.05),
        ("count", (0.5, 0.75), 8, None),  # bounds that allow too few tokens
        ("other", (0, 0.75), 12, None),  # as the group that needs most
        ("ocr", (0, 0.1), 16, 0.05),
    ],
)
def test_the_choice(group: str, bounds: tuple[float, float], step: int, target: float | None) -> None:
    choice = POLICY.choose(group, bounds)
    assert choice is not None and (choice.step, choice.group, choice.target) == (step, group, target)


def test_no_calibrated_step_within_bounds() -> None:
    assert POLICY.choose("ocr", (0.6, 0.7)) is None


def test_the_group_is_the_requests_or_its_keys_or_its_models() -> None:
    groups = GroupRules({"scanner": "ocr"}, {"counter": "count"})
    assert groups.of("x", "scanner", "counter") == "x"
    assert groups.of(None, "scanner", "counter") == "ocr"
    assert groups.of(None, "someone", "counter") == "count"
    assert groups.of(None, None, "tiny") == "default"
    assert GroupRules.parse('{"keys": {"scanner": "ocr"}, "models": {"counter": "count"}}') == groups


@pytest.mark.parametrize("wrong", ["[]", '{"key": {}}', '{"keys": {"a": 1}}', "nothing"])
def test_groups_that_are_none(wrong: str) -> None:
    with pytest.raises(ValueError, match="is needed"):
        GroupRules.parse(wrong)


@pytest.mark.parametrize("wrong", ["0.5", "0.5,0.2", "a,b", "0,1", "-1,0.5"])
def test_bounds_that_are_none(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"needed|bounds"):
        parse_bounds(wrong)


@pytest.mark.parametrize(
    ("value", "param", "message"),
    [
        ({"ratio": 0.5, "group": "ocr"}, "group", "goes with"),
        ({"bounds": [0, 0.5]}, "bounds", "goes with"),
        ({"ratio": "auto", "keep_tokens": 9}, "ratio", "one of them"),
        ({"ratio": "auto", "group": ""}, "group", "a word"),
        ({"ratio": "auto", "group": 3}, "group", "a word"),
        ({"ratio": "auto", "bounds": [0.5]}, "bounds", "a pair"),
        ({"ratio": "auto", "bounds": [0.5, 1]}, "ratio", "share"),
        ({"ratio": "auto", "bounds": [0.5, 0.2]}, "bounds", "least and the most"),
        ({"ratio": "Auto"}, "ratio", "a number"),
        ({"ratio": "auto", "query": 5}, "query", "a text"),
    ],
)
def test_requests_that_are_refused(value: object, param: str, message: str) -> None:
    with pytest.raises(InvalidReduction, match=message) as refusal:
        auto.parse_requested_reduction(value)
    assert refusal.value.param == param


@pytest.mark.parametrize(
    ("policy", "asked", "param", "message"),
    [
        (None, {}, "ratio", "foldserve calibrate MODEL --auto"),
        (POLICY, {"method": "pool"}, "method", "was calibrated for .*folder.*: leave method out"),
        (POLICY, {"withdraw": True}, "withdraw", "leave withdraw out"),
        (POLICY, {"bounds": [0.6, 0.7]}, "bounds", "widen them"),
        (POLICY, {"query": "cat"}, "query", "'folder' takes no query"),
    ],
)
def test_what_was_not_calibrated_is_refused(
    policy: AutoPolicy | None, asked: dict[str, Any], param: str, message: str
) -> None:
    parsed = auto.parse_requested_reduction({"ratio": "auto", **asked})
    assert isinstance(parsed, AutoRatio)
    with pytest.raises(InvalidReduction, match=message) as refusal:
        AutoChooser(Settings(auto=policy)).choose(parsed, None, "tiny", ["a"])
    assert refusal.value.param == param


def test_the_calibrated_method_may_be_named() -> None:
    parsed = auto.parse_requested_reduction({"ratio": "auto", "method": "folder", "group": "ocr"})
    assert isinstance(parsed, AutoRatio)
    reductions, choices = AutoChooser(Settings(auto=POLICY)).choose(parsed, None, "tiny", ["a", "b"])
    assert (reductions, [choice.step for choice in choices]) == ([Reduction(ratio=0.75)] * 2, [4, 4])


Steps = Callable[[float], tuple[int, float]]
"""What a step at a time shows: requests that wait, and the share of the KV cache in use."""


def levels(shows: Steps, until: float, ends: float | None = None) -> list[int]:
    """Levels each second of a server with ten steps a second, until it `ends` to have any."""
    pressure, found = Pressure(), []
    for tenth in range(int(10 * until) + 1):
        now = tenth / 10
        if ends is None or now < ends:
            pressure.observe(*shows(now), now)
        if tenth % 10 == 0:
            found.append(pressure.level(now))
    return found


def test_pressure_rises_while_requests_wait_for_a_full_cache_and_falls_slowly() -> None:
    found = levels(lambda now: (3, 0.95) if now < 30 else (0, 0.5), until=160)
    assert found[:30] == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5 + [4] * 10
    assert [found.index(level, 30) for level in (3, 2, 1, 0)] == [61, 91, 121, 151]  # full a second longer


def test_chats_that_end_together_make_no_room() -> None:
    """Seen on a pool of 23 blocks with 64 chats of one length: free for a step in four."""
    assert levels(lambda now: (52, 0.35) if int(10 * now) % 4 == 0 else (53, 0.957), until=22)[-1] == 4


@pytest.mark.parametrize(
    "shows",
    [
        lambda now: (0, 0.99),  # full, and nobody waits
        lambda now: (9, 0.8),  # they wait for something else
        lambda now: (3, 0.95 if now % 4 < 2 else 0.85),  # never full for five seconds
    ],
    ids=range(3),
)
def test_pressure_that_is_none(shows: Steps) -> None:
    assert set(levels(shows, until=60)) == {0}


def test_pressure_does_not_swing_between_its_two_bounds() -> None:
    found = levels(lambda now: (3, 0.95 if now < 10.5 else 0.89 if int(now) % 2 else 0.75), until=100)
    assert set(found[12:]) == {2}


def test_a_server_whose_clients_have_hung_up_is_free() -> None:
    """No step says so: the last one was full."""
    found = levels(lambda now: (3, 0.95), until=160, ends=12)
    assert max(found) == 3 and found[-1] == 0


def test_an_image_keeps_its_first_count_under_pressure(monkeypatch: pytest.MonkeyPatch) -> None:
    level = 0
    monkeypatch.setattr(Pressure, "level", lambda self, now: level)
    chooser = AutoChooser(Settings(auto=POLICY, auto_under_load=True))

    def steps(images: list[str | None], **fields: object) -> tuple[list[float | None], dict[str, object]]:
        parsed = auto.parse_requested_reduction({"ratio": "auto", "group": "count", **fields})
        assert isinstance(parsed, AutoRatio)
        reductions, choices = chooser.choose(parsed, None, "tiny", images)
        return [reduction.ratio for reduction in reductions], choices[-1].to_json()

    usage: dict[str, object] = {"policy": "auto", "group": "count"}
    assert steps(["a"]) == ([0.25], usage | {"step": 12, "target": 0.05, "pressure": 0})
    level = 1
    assert steps(["a", "b"]) == ([0.25, 0.5], usage | {"step": 8, "target": None, "pressure": 1})
    level = 4
    assert steps(["b", None]) == ([0.5, 0.75], usage | {"step": 4, "target": None, "pressure": 4})
    assert steps(["c"], bounds=[0, 0.5]) == ([0.5], usage | {"step": 8, "target": None, "pressure": 4})
    level = 0
    assert steps(["b"])[0] == [0.5]
    assert steps(["b"], under_load=False) == ([0.25], usage | {"step": 12, "target": 0.05})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auto": True, "eta": 0.1}, "--eta means nothing with --auto"),
        ({"auto": True, "min_layer": 2}, "--min-layer means nothing with --auto"),
        ({"target": 0.1}, "--target means nothing without --auto"),
        ({"group_field": "task"}, "--group-field means nothing without --auto"),
        ({"auto": True, "target": 1.0}, "--target is a share"),
    ],
)
def test_options_of_the_other_search_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalibrationOptions("m", **options)
