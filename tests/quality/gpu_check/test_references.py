"""The file of references is what plain PyTorch answers, and tells a wrong reduction from the right one."""

from __future__ import annotations

from pathlib import Path

import pytest

from foldserve.reducers import METHODS
from foldserve.reducers.reduction import Reduction
from foldserve.server.quality.gpu_check.comparison import compare
from foldserve.server.quality.gpu_check.correctness import FP32
from foldserve.server.quality.gpu_check.references import REFERENCES, References
from tests.quality.gpu_check.references import CASES, IMAGES, TOKENS, cases, make, withdraw_layer

SOME = ("no image", "turbo 0.75", "folder 0.5, fastv 0.5, keep", "two images, withdraw and folder 0.9")


def test_the_file_is_what_the_script_asks() -> None:
    known = References.load()
    images, asked = cases()
    assert list(known.cases) == asked and len(asked) == len(CASES) == 27
    assert [image.tobytes() for image in known.images] == [image.tobytes() for image in images]
    assert known.withdraw_layer == withdraw_layer()
    assert len(images) == IMAGES and all(len(answer.ids) == TOKENS for answer in known.answers)


def test_the_file_is_what_the_script_computes() -> None:
    known, made = References.load(), make(SOME)
    chosen = [known.cases.index(case) for case in made.cases]
    assert len(chosen) == len(SOME)
    for i, answer in zip(chosen, made.answers, strict=True):
        assert known.answers[i].ids == answer.ids and known.answers[i].prompt_tokens == answer.prompt_tokens
        assert known.answers[i].logprobs == pytest.approx(answer.logprobs, abs=1e-4)
        assert known.answers[i].margins == pytest.approx(answer.margins, abs=1e-3)


def test_a_file_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    References.load().save(tmp_path / "copy.safetensors")
    assert (tmp_path / "copy.safetensors").read_bytes() == REFERENCES.read_bytes()


def test_every_method_of_this_model_is_there() -> None:
    reductions = [Reduction.parse(reduction) for each in CASES.values() for reduction in each]
    asked = {name for reduction in reductions for name in (reduction.method, reduction.decoder)}
    left_out = {"stf", "base_only", "vidcom2", "evs"}  # of other architectures
    left_out |= {"pixelprune", "mmtok"}  # without a kernel
    assert set(METHODS) - asked == left_out, "give a method a case in references.py, or say here why it has none"
    assert {reduction.positions for reduction in reductions} == {None, "keep"}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("folder 0.5", {"method": "random", "ratio": 0.5}),
        ("folder_cls 0.66", {"ratio": 0.66}),
        ("illava_decoder 0.5", {"method": "fastv", "ratio": 0.5}),
        ("folder 0.75, keep", {"ratio": 0.75}),
    ],
    ids=str,
)
def test_another_reduction_to_as_many_tokens_is_seen(
    name: str, wrong: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which log-probabilities of the likeliest tokens alone would not show."""
    known = References.load()
    i = [case.name for case in known.cases].index(name)
    monkeypatch.setitem(CASES, name, [wrong])
    (answer,) = make([name]).answers
    assert answer.prompt_tokens == known.answers[i].prompt_tokens
    assert compare(known.cases[i : i + 1], known.answers[i : i + 1], [answer], FP32).wrong
