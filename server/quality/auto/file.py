"""`auto.json`: how few tokens each group of requests needs, and what that was found on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from foldserve.reducers.ladder import STEPS
from foldserve.reducers.reduction import Reduction
from foldserve.server.auto import AutoPolicy
from foldserve.server.quality.calibration_file import CalibrationFile, default_folder

FILE_NAME = "auto.json"


class Group(BaseModel):
    """What was found for one group of requests.

    Attributes:
        samples: that were asked.
        step: the smallest that the bound allows, 1 to 16.
        changed: share of answers that changed at each of the calibration's steps, as measured; with a pixel cap also at
            step 16, at which pixels alone decide.
        bound: what that share is at most on new requests, see `rule.risk_bounds`.
        is_capped: the calibration's pixel cap holds for the group; where the bound forbids that at every step, the
            group keeps all tokens.
        kept: share of the tokens that stays, mean over the samples; None where it is `step` of each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int = Field(ge=1)
    step: int = Field(ge=1, le=STEPS)
    changed: tuple[float, ...]
    bound: tuple[float, ...]
    is_capped: bool = False
    kept: float | None = None

    @property
    def share(self) -> float:
        """Of the tokens that stay, mean over the samples."""
        return self.step / STEPS if self.kept is None else self.kept


class AutoCalibration(CalibrationFile):
    """Result of `foldserve calibrate --auto`.

    Attributes:
        reduction: JSON form of the reduction, without an amount.
        target: share of answers that may change.
        answer_tokens: how much of each answer was compared, at most.
        data: name of the requests.
        data_hash: of their texts and pixels.
        tokens: vision tokens of a request at ratio 0, mean over the samples.
        steps: that the method can take with all of the images, ascending, below 16.
        groups: by name.
        together: what a single group of all samples would have got.
        pixel_cap: levels by which pixels of like cells may differ, see `PixelCap`; None: pixels have no say.
        kept_uncapped: share of the tokens that would stay without the cap, mean over the samples; None without one.
    """

    read_by = "--auto"

    reduction: Mapping[str, Any]
    target: float = Field(gt=0, lt=1)
    answer_tokens: int
    data: str
    data_hash: str
    tokens: float
    steps: tuple[Annotated[int, Field(ge=1, lt=STEPS)], ...] = Field(min_length=1)
    groups: Mapping[str, Group] = Field(min_length=1)
    together: Group
    pixel_cap: int | None = Field(default=None, ge=0, le=255)
    kept_uncapped: float | None = None

    @property
    def kept(self) -> float:
        """Share of the tokens that stays, mean over the samples."""
        return mean_share(self.groups)

    def policy(self) -> AutoPolicy:
        """What a server does with it."""
        steps = {name: group.step for name, group in self.groups.items()}
        uncapped = frozenset(name for name, group in self.groups.items() if not group.is_capped)
        reduction = Reduction.parse(self.reduction)
        if self.pixel_cap is None:
            return AutoPolicy(reduction, self.target, self.steps, steps)
        return AutoPolicy(reduction, self.target, self.steps, steps, self.pixel_cap, uncapped)


def mean_share(groups: Mapping[str, Group]) -> float:
    """Of the tokens that stay, mean over the samples of all groups."""
    samples = sum(group.samples for group in groups.values())
    return sum(group.samples * group.share for group in groups.values()) / samples


def read_for(model: str, revision: str | None, file: Path) -> AutoCalibration:
    """The calibration in `file`, if it is of this very model.

    Raises:
        ValueError: no such file, not a calibration, or of other weights.
    """
    advice = f"run `foldserve calibrate {model} --auto --data requests.jsonl`"
    calibration = AutoCalibration.read(file, advice)
    calibration.check_weights(model, revision, file, advice)
    return calibration


def default_file(model: str, cache_dir: Path) -> Path:
    """Where `calibrate --auto` writes and `serve` looks."""
    return default_folder(model, cache_dir) / FILE_NAME
