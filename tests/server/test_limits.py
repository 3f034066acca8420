"""The bounds of one request, from the command line to the API servers."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from foldserve.server import cli
from foldserve.server.limits import Limits
from foldserve.server.options import flag
from foldserve.server.settings import Settings


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[Limits]:
    """The limits that the server would have been started with."""
    from foldserve.server.api import launch

    calls: list[Limits] = []
    monkeypatch.setattr(launch, "serve", lambda argv, settings, *_: calls.append(settings.limits))
    return calls


def test_defaults(chosen: list[Limits]) -> None:
    cli.main(["serve", "some/model"])
    assert chosen == [Limits()] == [Settings().limits]
    assert (Limits().max_image_bytes, Limits().max_image_pixels) == (20_000_000, 40_000_000)


def test_every_bound_is_an_option(chosen: list[Limits], capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["serve"]
    wanted: dict[str, Any] = {}
    for number, limit in enumerate(fields(Limits), start=30):
        is_list = limit.default == ()
        words = limit.metadata.get("choices", [3 if limit.name == "max_stop_strings" else number])
        wanted[limit.name] = ("minio", "10.0.0.7") if is_list else words[-1]
        for value in wanted[limit.name] if is_list else [wanted[limit.name]]:
            argv += [flag(limit.name), str(value)]
    cli.main(argv)
    assert chosen == [Limits(**wanted)]
    cli.main(["serve", "--help"])
    text = capsys.readouterr().out
    assert all(flag(limit.name) in text for limit in fields(Limits))


def test_they_travel_as_json() -> None:
    limits = Limits(max_image_mb=1.5, max_choices=2, allow_media_private_host=("minio",))
    assert Limits.from_config(json.loads(json.dumps(limits.to_config()))) == limits
    assert Limits.from_config({}) == Limits()


def test_a_choice_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="--oversized must be refuse or scale, not 'crop'"):
        Limits(oversized="crop")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-images-per-request", "-1"], "--max-images-per-request must be at least 0, not -1"),
        (["--max-image-megapixels", "500"], "must be at least 0 and at most 178, not 500"),
        (["--max-media-seconds", "nan"], "--max-media-seconds must be at least 0, not nan"),
        (["--max-media-seconds", "inf"], "--max-media-seconds must be at least 0, not inf"),
        (["--max-choices", "0"], "--max-choices must be at least 1, not 0"),
        (["--oversized", "crop"], "invalid choice: 'crop' (choose from 'refuse', 'scale')"),
        (["--max-choices", "1.5"], "invalid int value: '1.5'"),
        (["--max-media-megapixels", "39"], "must not be below --max-image-megapixels"),
        (["--min-image-side", "100", "--max-image-side", "99"], "must not be below --min-image-side"),
    ],
)
def test_bad_bounds(argv: list[str], message: str, chosen: list[Limits], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["serve", *argv])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not chosen


def test_a_models_own_bounds_only_lower_them() -> None:
    limits = Limits(max_images_per_request=3, max_videos_per_request=2, video_frames=16)
    assert limits.lowered_to(images=999, videos=999, frames=None) == limits
    lowered = limits.lowered_to(images=999, videos=1, frames=8)
    assert lowered == replace(limits, max_videos_per_request=1, video_frames=8)
    assert limits.lowered_to(images=2, videos=0, frames=32) == replace(limits, max_images_per_request=2)
