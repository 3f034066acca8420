"""The pixel cap of `ratio: "auto"` without a server: the rule by hand, what always holds of it, its calibration."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from foldserve.reducers.ladder import STEPS, PixelCap, SettledStep, StepBounds, ratio_of, step_for
from foldserve.reducers.plan import Reduction
from foldserve.server import cli
from foldserve.server.api import auto
from foldserve.server.api.auto import AutoChooser, AutoRatio
from foldserve.server.auto import AutoChoice, AutoPolicy
from foldserve.server.pressure import Pressure
from foldserve.server.quality.auto.command import by_group, caps_of, group_of, write_all
from foldserve.server.quality.auto.file import AutoCalibration
from foldserve.server.quality.auto.page import chart, html, text
from foldserve.server.quality.auto.rule import capped, make_monotone
from foldserve.server.quality.calibration_options import CalibrationOptions
from foldserve.server.quality.demo.checkpoint import CHECKPOINT
from foldserve.server.quality.engine.offline import AnsweringModel
from foldserve.server.quality.evaluation.questions import Question
from foldserve.server.settings import Settings
from tests import next_checkpoint
from tests.images import page, photo
from tests.loadtest.readable import check
from tests.quality.test_auto import ALL_STEPS, RECORDED, calibration, flags

LADDER = (*ALL_STEPS, STEPS)


@pytest.mark.parametrize(
    ("count", "tokens", "steps", "step"),
    [
        (1, 144, LADDER, 1),
        (9, 144, LADDER, 1),
        (10, 144, LADDER, 2),
        (135, 144, LADDER, 15),
        (136, 144, LADDER, 16),
        (144, 144, LADDER, 16),
        (4, 50, LADDER, 1),  # ceil(50 / 16) tokens stay
        (5, 50, LADDER, 2),
        (1, 16, LADDER, 2),  # two tokens have to stay
        (28, 144, (2, 4, 8, 16), 4),
        (73, 144, (2, 4, 8, 16), 16),
    ],
)
def test_the_smallest_step_that_keeps_so_many(count: int, tokens: int, steps: Sequence[int], step: int) -> None:
    assert step_for(count, tokens, steps) == step


@pytest.mark.parametrize(
    ("unpredicted", "needed", "bounds", "settled"),
    [
        (144, 9, StepBounds(LADDER, LADDER), (9, True)),  # a photo
        (40, 9, StepBounds(LADDER, LADDER), (5, True)),  # a page with margins
        (81, 9, StepBounds(LADDER, LADDER), (9, True)),
        (40, 16, StepBounds(LADDER, LADDER), (5, True)),  # where all tokens are needed, of those there are
        (40, 9, StepBounds(LADDER, LADDER[6:]), (7, True)),  # never below the bounds
        (144, 9, StepBounds(LADDER, LADDER[:8]), (8, False)),
        (40, 9, StepBounds(LADDER, LADDER[:8]), (5, True)),  # the bounds take nothing that a page needs
        (144, 9, StepBounds(LADDER, LADDER[3:], pressure=2), (7, False)),
        (40, 9, StepBounds(LADDER, LADDER[3:], pressure=1), (4, False)),
        (40, 9, StepBounds(LADDER, LADDER[3:], pressure=4), (4, False)),
        (1, 9, StepBounds(LADDER, LADDER[3:], pressure=4), (4, True)),
        (40, 9, StepBounds(LADDER, LADDER, more=1), (6, True)),
        (144, 9, StepBounds(LADDER, LADDER, more=1), (10, True)),
        (40, 8, StepBounds((4, 8, 12, 16), (4, 8, 12, 16)), (8, True)),
    ],
)
def test_the_rule_by_hand(unpredicted: int, needed: int, bounds: StepBounds, settled: tuple[int, bool]) -> None:
    assert PixelCap(2, needed, bounds).settle(unpredicted, 144) == SettledStep(*settled, unpredicted)


@st.composite
def caps(draw: st.DrawFn) -> tuple[PixelCap, int, int]:
    """(cap, tokens, cells that are not predicted)"""
    steps = (*sorted(draw(st.sets(st.integers(1, 15), min_size=1))), STEPS)
    first = draw(st.integers(0, len(steps) - 1))
    allowed = steps[first : draw(st.integers(first + 1, len(steps)))]
    bounds = StepBounds(steps, allowed, draw(st.integers(0, 3)), draw(st.integers(0, 4)))
    tokens = draw(st.integers(2, 3000))
    return PixelCap(2, draw(st.sampled_from(steps)), bounds), tokens, draw(st.integers(1, tokens))


@given(caps())
def test_what_always_holds(drawn: tuple[PixelCap, int, int]) -> None:
    cap, tokens, unpredicted = drawn
    found, without = cap.settle(unpredicted, tokens), cap.bounds.settle(cap.needed)
    assert found.step in cap.bounds.allowed and cap.least <= found.step <= without.step
    if tokens >= STEPS:  # of fewer a lower step may keep all too
        assert cap.settle(tokens, tokens) == without._replace(unpredicted=tokens)  # nothing is predicted
    assert cap.settle(max(1, unpredicted - 1), tokens).step <= found.step
    if not cap.bounds.pressure and cap.bounds.allowed == cap.bounds.steps:
        kept = -(-tokens * found.step // STEPS)
        assert found.is_enough and (found.step == without.step or kept >= unpredicted)


POLICY = AutoPolicy(
    Reduction(), 0.05, ALL_STEPS, {"ocr": 9, "colour": 1, "count": 16}, pixel_cap=2, uncapped=frozenset({"count"})
)


def served(policy: AutoPolicy, group: str, unpredicted: int, **more: Any) -> tuple[int, float | None]:
    choice = policy.choose(group, (0, 0.75), **more)
    assert choice is not None and choice.cap is not None
    assert choice.step == choice.cap.least  # the server checks it with the fewest tokens that can stay
    found = choice.with_step(choice.cap.settle(unpredicted, 144))
    assert found.cap is None and found.unpredicted == unpredicted
    return found.step, found.target


def test_a_servers_choice() -> None:
    assert served(POLICY, "ocr", 144) == (9, 0.05)
    assert served(POLICY, "ocr", 50) == (6, 0.05)
    assert served(POLICY, "ocr", 3) == (4, 0.05)  # the bounds
    assert served(POLICY, "colour", 144) == (4, 0.05)
    assert served(POLICY, "ocr", 50, more=2) == (8, 0.05)
    assert served(POLICY, "ocr", 50, pressure=1) == (5, None)
    assert served(POLICY, "ocr", 3, pressure=1) == (4, 0.05)


@pytest.mark.parametrize(
    ("group", "bounds", "step", "target"),
    [("count", (0, 0.75), 16, 0.05), ("other", (0, 0.75), 16, None), ("ocr", (0, 0), 16, 0.05)],
)
def test_where_pixels_have_no_say(group: str, bounds: tuple[float, float], step: int, target: float | None) -> None:
    """A group whose answers the cap changes too often, an unknown one, which gets what that needs; and no room."""
    assert POLICY.choose(group, bounds) == AutoChoice(step, group, target, is_calibrated=group != "other")


def test_an_unknown_group_is_capped_where_all_are() -> None:
    policy = AutoPolicy(Reduction(), 0.05, ALL_STEPS, {"ocr": 9, "colour": 1}, pixel_cap=2)
    assert served(policy, "other", 50) == (6, None)


def test_a_policy_that_can_not_be() -> None:
    with pytest.raises(ValueError, match="without a cap keep all tokens"):
        AutoPolicy(Reduction(), 0.05, ALL_STEPS, {"ocr": 9}, pixel_cap=2, uncapped=frozenset({"ocr"}))


def test_several_images_are_told_together() -> None:
    one, other = AutoChoice(5, "g", 0.05, unpredicted=40), AutoChoice(9, "g", 0.05, unpredicted=100)
    assert AutoChoice.combined([one, other]) == AutoChoice(9, "g", 0.05, unpredicted=140)
    assert AutoChoice.combined([one._replace(target=None), other]) == AutoChoice(9, "g", None, unpredicted=140)
    assert AutoChoice.combined([AutoChoice(9, "g", 0.05)] * 2) == AutoChoice(9, "g", 0.05)
    assert AutoChoice.combined([]) is None


def test_an_image_keeps_the_level_that_it_came_with(monkeypatch: pytest.MonkeyPatch) -> None:
    level = 1
    monkeypatch.setattr(Pressure, "level", lambda self, now: level)
    chooser = AutoChooser(Settings(auto=POLICY, auto_under_load=True))
    asked = auto.parse_requested_reduction({"ratio": "auto", "group": "ocr"})
    assert isinstance(asked, AutoRatio)

    def steps(*images: str) -> list[int]:
        reductions, choices = chooser.choose(asked, None, "tiny", images)
        assert [reduction.ratio for reduction in reductions] == [ratio_of(4)] * len(images)
        return [choice.cap.settle(50, 144).step for choice in choices if choice.cap is not None]

    assert steps("a") == [5]
    level = 2
    assert steps("a", "b") == [5, 4]
    level = 0
    assert steps("a", "b", "c") == [5, 4, 6]


def test_losses_with_a_cap_by_hand() -> None:
    """With all tokens no answer changes; at its cap an answer is what it is at that step without one."""
    steps = (4, 8, 12)
    changed = [[True, False, True], [True, True, False], [False, False, False]]
    assert capped(changed, steps, [8, 16, 4]) == [
        [True, False, False, False],
        [True, True, False, False],
        [False, False, False, False],
    ]
    assert capped([make_monotone(own) for own in changed], steps, [8, 8, 4]) == [[True] * 4, [True] * 4, [False] * 4]


def test_a_group_whose_cap_costs_too_many_answers_has_none() -> None:
    samples = [flags(3)] * 2 + [flags(0)] * 60
    caps = [2] * 2 + [16] * 60  # the two answers that need four steps
    spoilt = group_of(samples, ALL_STEPS, 0.04, caps)
    assert (spoilt.step, spoilt.is_capped, spoilt.kept, spoilt.share) == (16, False, None, 1)
    assert spoilt.changed == (2 / 62,) * 16 and [round(63 * bound) for bound in spoilt.bound] == [3] * 16
    saving = group_of(samples, ALL_STEPS, 0.04, [16] * 2 + [2] * 60)
    assert (saving.step, saving.is_capped) == (4, True)
    assert saving.kept == pytest.approx((2 * 4 + 60 * 2) / (62 * 16))
    plain = group_of(samples, ALL_STEPS, 0.04)
    assert (plain.step, plain.is_capped, plain.share) == (4, False, 0.25)


def test_pixels_may_be_the_only_limit() -> None:
    """Text of pages: an answer needs all that can't be predicted."""
    samples = [flags(last) for last in (5, 11) * 30]
    pages = group_of(samples, ALL_STEPS, 0.05, [6, 12] * 30)
    assert (pages.step, pages.is_capped, pages.kept) == (12, True, 9 / 16)
    assert group_of(samples, ALL_STEPS, 0.05).step == 12
    needy = group_of([flags(15)] * 60, ALL_STEPS, 0.05, [16] * 60)
    assert (needy.step, needy.is_capped, needy.bound[-1]) == (16, True, 1 / 61)


@pytest.mark.parametrize("target", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("least", [1, 6], ids=["no bounds", "bounds"])
def test_the_other_half_keeps_the_promise_with_a_cap(target: float, least: int) -> None:
    """Mean over 30 random halves, of images whose pixels limit them by chance; bounds may lift what they get."""
    recorded = [last for group in json.loads(RECORDED.read_text()).values() for last in group]
    rng, shares = random.Random(0), []
    each = [(last, min(16, max(last + 1 - (rng.random() < 0.03) * 5, rng.randint(1, 16)))) for last in recorded]
    for _ in range(30):
        rng.shuffle(each)
        half, other = each[: len(each) // 2], each[len(each) // 2 :]
        found = group_of([flags(last) for last, _ in half], ALL_STEPS, target, [max(1, cap) for _, cap in half])
        assert found.is_capped
        shares.append(sum(last >= max(least, min(found.step, cap)) for last, cap in other) / len(other))
    assert sum(shares) / len(shares) <= target


def test_what_changes_without_the_cap_has_changed_with_it() -> None:
    """Its bounds may lift an image to step 7, at which its answer is another one."""
    odd = [step == 7 for step in ALL_STEPS]
    assert group_of([odd] + [flags(0)] * 40, ALL_STEPS, 0.03, [3] * 41).is_capped is False


def page_calibration() -> AutoCalibration:
    plain = calibration()
    samples = {"ocr": [flags(3)] * 2 + [flags(0)] * 60, "count": [flags(12)] * 40 + [flags(0)] * 20}
    asked = [Question(photo(0, 48, 48), "", kind=kind) for kind, own in samples.items() for _ in own]
    everything = [own for group in samples.values() for own in group]
    limits = [2] * 60 + [16] * 2 + [10] * 60
    return plain.model_copy(
        update={
            "groups": by_group(asked, everything, ALL_STEPS, 0.05, limits),
            "together": group_of(everything, ALL_STEPS, 0.05, limits),
            "pixel_cap": 4,
            "kept_uncapped": plain.kept,
        }
    )


def test_the_file_says_whether_there_is_a_cap(tmp_path: Path) -> None:
    made = page_calibration()
    made.write(tmp_path / "auto.json")
    read = AutoCalibration.read(tmp_path / "auto.json", "")
    assert read == made
    policy = read.policy()
    assert (policy.pixel_cap, policy.groups, policy.uncapped) == (4, {"count": 16, "ocr": 1}, frozenset({"count"}))
    assert AutoPolicy.from_config(json.loads(json.dumps(policy.to_config()))) == policy


def test_files_from_before_the_cap_go_on_working() -> None:
    old = json.loads(calibration().model_dump_json())
    for name in ("pixel_cap", "kept_uncapped"):
        del old[name]
    for group in (*old["groups"].values(), old["together"]):
        del group["is_capped"], group["kept"]
    policy = AutoCalibration.model_validate(old).policy()
    assert (policy.pixel_cap, policy.uncapped) == (None, frozenset())
    choice = policy.choose("ocr", (0, 0.75))
    assert choice is not None and choice.cap is None and "u" not in choice.to_json()
    with pytest.raises(ValidationError, match="less than or equal to 255"):
        AutoCalibration.model_validate(old | {"pixel_cap": 256})


def test_the_page_says_what_the_cap_does() -> None:
    told = text(page_calibration())
    assert "without the pixel cap 43% would" in told
    assert "| count | 60 | 16/16 | 144 | 144 | 0 % | - |" in told
    assert "| ocr | 62 | at most 1/16 | 9 | 144 | 3.2% | 4.8% |" in told
    assert "cells alike within 4 levels" in html(page_calibration())
    count: Any = chart(page_calibration()).panels[0]
    ends = [(line.points[-1].x, line.points[-1].estimate.value) for line in count.panel.lines]
    assert ends == [(100, 1 / 61), (100, 0)]  # with all of its tokens, as it is served
    check(chart(page_calibration()))
    assert "without the pixel cap" not in text(calibration())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixel_cap": 2}, "--pixel-cap means nothing without --auto"),
        ({"auto": True, "pixel_cap": 256}, "0 to 255, or none"),
        ({"auto": True, "pixel_cap": -1}, "0 to 255, or none"),
    ],
)
def test_levels_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalibrationOptions("m", **options)


def test_a_group_that_pixels_alone_reduce_is_reduced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = CalibrationOptions(str(tmp_path), auto=True, results=tmp_path / "results")
    pages = group_of([flags(11)] * 30, ALL_STEPS, 0.05, [12] * 30)
    photos = group_of([flags(15)] * 30, ALL_STEPS, 0.05, [16] * 30)
    assert (photos.step, photos.is_capped) == (16, True)
    both = page_calibration().model_copy(update={"groups": {"pages": pages}})
    assert write_all(both, asked, tmp_path) == 0
    assert write_all(both.model_copy(update={"groups": {"photos": photos}}), asked, tmp_path) == 1
    assert "No group can be reduced" in capsys.readouterr().out


def test_a_model_that_lays_images_out_in_tiles_has_no_cap(tiny_llava: Path, tmp_path: Path) -> None:
    model = AnsweringModel(str(next_checkpoint.write(tmp_path / "tiny-next", tiny_llava)), command="calibrate")
    asked = [Question(page(1), "")]
    assert caps_of(model, asked, model.layouts([page(1)]), ALL_STEPS, None) is None
    with pytest.raises(ValueError, match="--pixel-cap 2 needs a model whose tokens are cells"):
        caps_of(model, asked, model.layouts([page(1)]), ALL_STEPS, 2)


def test_pixels_that_are_no_bytes_calibrate_nothing(tiny_llava: Path) -> None:
    model = AnsweringModel(str(tiny_llava), ["--mm-processor-kwargs", '{"do_normalize": false}'], "calibrate")
    with pytest.raises(ValueError, match="leave none of an image"):
        model.unpredicted([page(1)], 2)


def test_another_cap_asks_nothing_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the real engine: what is measured holds for every cap; the file says which one it is for."""
    command = ["calibrate", str(CHECKPOINT), "--auto", "--samples", "10", "--target", "0.5", "--answer-tokens", "4"]
    command += ["--results", str(tmp_path / "results"), "--output", str(tmp_path / "auto.json")]
    command += ["--max-model-len", "512", "--dtype", "float32"]

    def run(cap: str) -> AutoCalibration:
        cli.main([*command, "--pixel-cap", cap])
        return AutoCalibration.read(tmp_path / "auto.json", "")

    with_cap = run("24")
    measured = (tmp_path / "results" / "results.jsonl").read_text()
    monkeypatch.setattr(AnsweringModel, "engine", lambda *args: pytest.fail("nothing is left to be asked"))
    without, again = run("none"), run("24")
    assert (tmp_path / "results" / "results.jsonl").read_text() == measured
    assert again == with_cap and (with_cap.pixel_cap, without.pixel_cap) == (24, None)
    assert with_cap.kept_uncapped == without.kept and without.kept_uncapped is None
    (capped_group,), (plain_group,) = with_cap.groups.values(), without.groups.values()
    assert (len(capped_group.changed), len(plain_group.changed)) == (16, 15)
