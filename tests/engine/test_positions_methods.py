"""Every method that works before the decoder, with kept positions, on a CLIP tower and on a SigLIP tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import MAX_TOKENS, Case, greedy
from tests.engine.keeping_reference import KeepingReference
from tests.images import photo

ANY_TOWER: list[dict[str, object]] = [
    {"method": "folder", "ratio": 0.66},
    {"method": "folder", "ratio": 0.66, "scale": "official"},
    {"method": "illava", "ratio": 0.5, "layers": [0, 2]},
    {"method": "illava", "keep_tokens": 10, "layers": [1]},
    {"method": "tome", "ratio": 0.5},
    {"method": "pool", "ratio": 0.75},
    {"method": "pool", "ratio": 0.5, "window": "row"},
    {"method": "random", "ratio": 0.5},
    {"method": "downsample", "ratio": 0.5},
    {"method": "visionzip", "ratio": 0.7},
    {"method": "pixelprune", "tau": 60},
    {"method": "pixelprune+folder", "tau": 30, "ratio": 0.7},
]
WITH_CLASS_TOKEN: list[dict[str, object]] = [
    {"method": "folder_cls", "ratio": 0.66},
    {"method": "turbo", "ratio": 0.5},
    {"method": "prumerge", "ratio": 0.75},
    {"method": "visionzip", "keep_tokens": 6},
]
REDUCTIONS = {"clip": ANY_TOWER + WITH_CLASS_TOKEN, "siglip": ANY_TOWER}


@pytest.fixture(scope="module")
def references(tiny_llava: Path, siglip: Path) -> dict[str, KeepingReference]:
    return {"clip": KeepingReference(tiny_llava), "siglip": KeepingReference(siglip)}


@pytest.mark.parametrize("tower", REDUCTIONS)
def test_all_methods_equal_plain_pytorch(
    engines: dict[str, Any], references: dict[str, KeepingReference], tower: str
) -> None:
    """In one batch: one image for all, so that a cache that took two plans for the same would show."""
    asked = [{**reduction, "positions": "keep"} for reduction in REDUCTIONS[tower]]
    cases = [Case("USER: <image>\nWhat is in the picture? ASSISTANT:", [photo(36)], [each]) for each in asked]
    for case, (tokens, logprobs) in zip(cases, greedy(engines[tower], cases), strict=True):
        want_tokens, want_logprobs = references[tower].generate(case.prompt, case.images, case.reductions, MAX_TOKENS)
        assert tokens == want_tokens, case.reductions
        assert logprobs == pytest.approx(want_logprobs, abs=2e-4), case.reductions


@pytest.mark.parametrize("tower", REDUCTIONS)
def test_methods_leave_tokens_at_places_of_their_own(references: dict[str, KeepingReference], tower: str) -> None:
    """Guards the test above: positions ascend within the image, have gaps, and differ from method to method."""
    reference = references[tower]
    found = []
    for reduction in REDUCTIONS[tower]:
        plan = reference.plan_of(photo(36), {**reduction, "positions": "keep"})
        _, positions = reference.survivors(photo(36), plan)
        assert positions == sorted(set(positions)) and len(positions) == plan.kept
        assert positions[0] >= 0 and positions[-1] < plan.encoded == 144
        found.append(tuple(positions))
    assert len(set(found)) == len(found) - 1  # the scale of `folder` moves no token
