"""`withdrawal.json`: the withdrawal layer that a calibration found, and for which weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

FILE_NAME = "withdrawal.json"
_SAMPLED_BYTES = 1 << 20


class CalibrationFile(BaseModel):
    """A calibration file, valid only for the weights that it was measured on."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    read_by: ClassVar[str]
    """The option of `serve` that reads it."""

    model: str
    model_hash: str

    def write(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, file: Path, advice: str) -> Self:
        """Raises ValueError, ending in `advice`, if `file` is missing or no such calibration."""
        try:
            return cls.model_validate_json(file.read_text())
        except FileNotFoundError as error:
            raise ValueError(f"{cls.read_by} needs a calibration, and there is no {file}: {advice}") from error
        except ValidationError as error:
            raise ValueError(f"{file} is not a calibration for {cls.read_by}: {error}") from error

    def check_weights(self, model: str, revision: str | None, file: Path, advice: str) -> None:
        """Raises ValueError if this calibration, read from `file`, was measured on other weights."""
        if self.model_hash != model_hash(model_folder(model, revision)):
            raise ValueError(f"the calibration in {file} is of {self.model} with other weights: {advice}")


class Calibration(CalibrationFile):
    """Result of a search for the withdrawal layer.

    Attributes:
        layers: number of decoder layers.
        withdraw_layer: K, the first layer without vision tokens; None if no layer met eta.
        eta: largest mean KL divergence accepted, in nats.
        answer_tokens: most tokens of an answer that the KL is averaged over.
        kl: mean KL(P_withdrawn || P_full) in nats for every K measured.
    """

    read_by = "--withdraw-layer auto"

    layers: int
    withdraw_layer: int | None
    eta: float
    samples: int
    answer_tokens: int = 1
    kl: dict[int, float]

    def summary(self) -> dict[str, float | int]:
        """What `/v1/reducers` shows: the search's settings and the mean KL in nats at the layer found."""
        assert self.withdraw_layer is not None
        asked = {"eta": self.eta, "samples": self.samples, "answer_tokens": self.answer_tokens}
        return asked | {"kl": self.kl[self.withdraw_layer]}


def read_for(model: str, revision: str | None, file: Path) -> Calibration:
    """Raises ValueError if `file` is missing, no calibration, measured on other weights, or found no layer."""
    advice = f"run `foldserve calibrate {model} --data DIR`, or give --withdraw-layer a number"
    calibration = Calibration.read(file, advice)
    if calibration.withdraw_layer is None:
        raise ValueError(
            f"the calibration in {file} found no layer with a mean KL of {calibration.eta} or less: {advice}"
        )
    calibration.check_weights(model, revision, file, advice)
    return calibration


def default_file(model: str, cache_dir: Path) -> Path:
    """The file that `calibrate` writes and `serve` reads by default."""
    return default_folder(model, cache_dir) / FILE_NAME


def default_folder(model: str, cache_dir: Path) -> Path:
    """The directory of a local model, else a folder in the cache."""
    return Path(model) if Path(model).is_dir() else cache_dir / "calibration" / model.replace("/", "--")


def model_folder(model: str, revision: str | None) -> Path:
    """A model's local directory, or its snapshot in the Hugging Face cache; ValueError if it is in neither."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError) as error:
        raise ValueError(f"{model} is neither a directory nor in the Hugging Face cache of this machine") from error


def model_hash(folder: Path) -> str:
    """SHA-256 of a checkpoint's configuration, weight index, and the size and both ends of each weight file.

    The ends, 1 MiB each, tell fine-tuned checkpoints of equal configuration apart without reading tens of gigabytes.

    Raises:
        ValueError: no configuration or no weights in `folder`.
    """
    described = [path for path in (folder / "config.json", *sorted(folder.glob("*.index.json"))) if path.is_file()]
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))  # of the two, vLLM loads the first
    if not described or not weights:
        raise ValueError(f"{folder} holds no model: config.json and *.safetensors are looked for")
    digest = hashlib.sha256()
    for path in described:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    for path in weights:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + _ends(path))
    return f"sha256:{digest.hexdigest()}"


def _ends(file: Path) -> bytes:
    with file.open("rb") as content:
        head = content.read(_SAMPLED_BYTES)
        content.seek(max(0, file.stat().st_size - _SAMPLED_BYTES))
        return head + content.read()
