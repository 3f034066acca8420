"""Calibration without an engine: the search, the data, the files, and the commands that write and read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.distributions import Categorical
from torch.distributions.kl import kl_divergence as torch_kl_divergence

from foldserve.server import cli
from foldserve.server.quality import calibration_plot
from foldserve.server.quality.calibration import candidate_layers
from foldserve.server.quality.calibration_data import Sample, load_samples
from foldserve.server.quality.calibration_file import Calibration, default_file, model_folder, model_hash, read_for
from foldserve.server.quality.calibration_search import first_layer_within, kl_divergence
from foldserve.server.quality.evaluation.questions import load_questions
from foldserve.server.settings import CONFIG_KEY, Environment, Settings
from tests.images import photo

CURVES = st.dictionaries(st.integers(1, 40), st.floats(0, 1), max_size=40)


@given(CURVES, st.floats(0, 1))
def test_the_first_layer_within_eta_however_the_curve_runs(kl: dict[int, float], eta: float) -> None:
    found = first_layer_within(kl, eta)
    before = [value for layer, value in kl.items() if found is None or layer < found]
    assert all(value > eta for value in before)
    assert found is None or kl[found] <= eta


def test_eta_itself_is_within_eta() -> None:
    assert first_layer_within({5: 0.2, 7: 0.1, 6: 0.3}, 0.1) == 7


@given(st.integers(0, 2**31), st.floats(-50, 50), st.sampled_from([0.1, 1.0, 20.0]))
def test_kl_is_that_of_torch_and_ignores_a_shift_of_logits(seed: int, shift: float, scale: float) -> None:
    withdrawn, full = scale * torch.randn(2, 3, 17, generator=torch.Generator().manual_seed(seed))
    expected = torch_kl_divergence(Categorical(logits=withdrawn.double()), Categorical(logits=full[:1].double()))
    assert torch.allclose(kl_divergence(withdrawn, full[0]).double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(kl_divergence(withdrawn + shift, full[0]).double(), expected, rtol=1e-3, atol=1e-4)


def test_kl_is_computed_in_fp32() -> None:
    withdrawn, full = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert kl_divergence(withdrawn, full).dtype == torch.float32
    assert torch.equal(kl_divergence(withdrawn, full), kl_divergence(withdrawn.float(), full.float()))


def test_candidates_run_to_the_last_layer_and_an_empty_range_is_refused() -> None:
    assert candidate_layers(32, 5) == range(5, 32)
    assert candidate_layers(6, 5) == range(5, 6)
    for layers, first in ((4, 5), (5, 5), (8, 0)):
        with pytest.raises(ValueError, match=f"give --min-layer from 1 to {layers - 1}"):
            candidate_layers(layers, first)
    with pytest.raises(ValueError, match="give --min-layer from 4 to 7"):
        candidate_layers(8, 3, first=4)  # of a decoder whose first three layers add features of images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of seven images, the third of which has a question of its own."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(7):
        photo(i, 64, 48).save(folder / f"{i}.{'PNG' if i % 2 else 'jpg'}")
    (folder / "2.txt").write_text("How many?\n")
    (folder / "notes.md").write_text("not an image")
    return folder


def name(sample: Sample) -> str:
    assert isinstance(sample.image, Path)
    return sample.image.name


def test_samples_of_a_folder_spread_over_it(images: Path) -> None:
    assert [(name(s), s.question) for s in load_samples(images, 20, "What?")] == [
        *[("0.jpg", "What?"), ("1.PNG", "What?"), ("2.jpg", "How many?"), ("3.PNG", "What?")],
        *[("4.jpg", "What?"), ("5.PNG", "What?"), ("6.jpg", "What?")],
    ]
    assert [name(s) for s in load_samples(images, 3, "What?")] == ["0.jpg", "2.jpg", "4.jpg"]


def test_samples_of_a_jsonl_file_are_relative_to_it(images: Path) -> None:
    file = images / "data.jsonl"
    file.write_text('{"image": "1.PNG", "question": "Why?"}\n\n{"image": "/a/b.jpg", "question": "Who?", "id": 3}\n')
    assert load_samples(file, 20, "unused") == [
        Sample(images / "1.PNG", "Why?"),
        Sample(Path("/a/b.jpg"), "Who?"),
    ]


def test_built_in_samples_are_of_every_kind_and_not_those_of_an_evaluation() -> None:
    samples = load_samples(None, 22, "unused")
    assert len({sample.question for sample in samples}) > 11
    assert samples[0].open().size == (96, 96)
    again = load_samples(None, 22, "unused")
    assert [s.open().tobytes() for s in again] == [s.open().tobytes() for s in samples]
    asked = {question.open().tobytes() for question in load_questions(None, 200, "unused")}
    assert asked.isdisjoint(sample.open().tobytes() for sample in samples)


@pytest.mark.parametrize("line", ["{", '{"image": "1.PNG"}', '"text"', '{"image": 3, "question": "x"}'])
def test_a_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "d.jsonl").write_text(f'{{"image": "a.jpg", "question": "x"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"d\.jsonl, line 2: "):
        load_samples(tmp_path / "d.jsonl", 20, "What?")


def test_what_is_no_data_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no images"):
        load_samples(tmp_path, 20, "What?")
    with pytest.raises(ValueError, match="neither a folder of images nor a JSONL file"):
        load_samples(tmp_path / "none", 20, "What?")
    with pytest.raises(ValueError, match="at least one sample is needed, not 0"):
        load_samples(tmp_path, 0, "What?")
    (tmp_path / "x.jpg").write_text("text")
    with pytest.raises(ValueError, match=r"x\.jpg can't be read as an image"):
        load_samples(tmp_path, 1, "What?")[0].open()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What a checkpoint consists of as far as its identity goes."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"layers": 8}')
    (folder / "model.safetensors").write_bytes(bytes(3 << 20))
    return folder


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"layers": 9}')


def spoil_first_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\1" + bytes((3 << 20) - 1))


def spoil_last_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes((3 << 20) - 1) + b"\1")


def replace_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.bin")


def add_weights(folder: Path) -> None:
    (folder / "model-2.safetensors").write_bytes(bytes(4))


def add_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    "change", [spoil_config, spoil_first_weights, spoil_last_weights, replace_weights, add_weights, add_index]
)
def test_the_hash_tells_models_apart(checkpoint: Path, change: Callable[[Path], None]) -> None:
    before = model_hash(checkpoint)
    (checkpoint / "withdrawal.json").write_text("{}")
    assert model_hash(checkpoint) == before
    change(checkpoint)
    assert model_hash(checkpoint) != before


def test_no_model_has_no_hash(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no model"):
        model_hash(tmp_path)
    with pytest.raises(ValueError, match="nobody/no-model is neither a directory nor in the Hugging Face cache"):
        model_folder("nobody/no-model", None)


class FakeProbe:
    """Four layers; a token's probability moves from a half by `MOVES[K]`, and more for a longer question.

    An answer has three tokens; it moves at the first only.
    """

    MOVES: ClassVar[dict[int, float]] = {1: 0.04, 2: 0.004, 3: 0.002}
    layers = 4
    first_layer = 1

    def __init__(self, model: str, argv: list[str]) -> None:
        self.model, self.revision, self.argv = model, None, argv

    def start(self) -> None:
        self.started = True

    def logits(self, image: Image.Image, question: str, candidates: range, answer_tokens: int) -> tuple[Tensor, Tensor]:
        assert self.started
        assert image.mode == "RGB"
        moved = torch.tensor([0.5 + len(question) * self.MOVES[layer] for layer in candidates])
        withdrawn = torch.full((len(candidates), min(3, answer_tokens), 2), 0.5)
        withdrawn[:, 0] = torch.stack([moved, 1 - moved], dim=-1)
        return torch.zeros(withdrawn.shape[1:]), withdrawn.log()

    @classmethod
    def mean_kl(cls, questions: list[str], layer: int) -> float:
        moves = torch.tensor([len(question) * cls.MOVES[layer] for question in questions])
        p = torch.stack([0.5 + moves, 0.5 - moves])
        return float((p * (2 * p).log()).sum(0).mean())


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No engine, and a cache of this test's own."""
    from foldserve.server.quality.engine import kl_probe

    monkeypatch.setattr(kl_probe, "KLProbe", FakeProbe)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def status_of(*argv: object) -> int:
    """Exit status of a command."""
    try:
        cli.main([str(argument) for argument in argv])
    except SystemExit as exit_:
        assert isinstance(exit_.code, int)
        return exit_.code
    return 0


def calibrate(checkpoint: Path, data: Path, *options: object) -> int:
    return status_of("calibrate", checkpoint, "--data", data, "--min-layer", 1, "--question", "A", *options)


@pytest.mark.usefixtures("fake")
def test_calibrate_writes_the_curve_and_the_first_layer(
    checkpoint: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "2.txt").write_text("AB")
    assert calibrate(checkpoint, images, "--eta", 1e-4, "--answer-tokens", 1) == 0
    found = Calibration.model_validate_json((checkpoint / "withdrawal.json").read_text())
    questions = ["A"] * 6 + ["AB"]
    assert found.kl == pytest.approx({k: FakeProbe.mean_kl(questions, k) for k in (1, 2, 3)}, abs=1e-6)
    assert (found.withdraw_layer, found.eta, found.samples, found.layers) == (2, 1e-4, 7, 4)
    assert (found.model, found.model_hash) == (str(checkpoint), model_hash(checkpoint))
    with Image.open(checkpoint / "withdrawal.png") as picture:
        assert picture.width > 700 > picture.height > 500
    said = capsys.readouterr().out
    assert "Looking at K = 1..3 of 4 layers on 7 samples." in said
    assert "K = 2 is the first with 0.0001 or less." in said
    assert said.endswith(f"Serve with it: foldserve serve {checkpoint} --withdraw-layer auto\n")


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("tokens", "counted"), [(2, 2), (3, 3), (32, 3)])
def test_a_samples_kl_is_the_mean_over_its_tokens(checkpoint: Path, images: Path, tokens: int, counted: int) -> None:
    (images / "2.txt").write_text("AB")
    assert calibrate(checkpoint, images, "--eta", 1e-4, "--answer-tokens", tokens) == 0
    found = Calibration.model_validate_json((checkpoint / "withdrawal.json").read_text())
    expected = {k: FakeProbe.mean_kl(["A"] * 6 + ["AB"], k) / counted for k in (1, 2, 3)}
    assert found.kl == pytest.approx(expected, abs=1e-6)
    assert found.answer_tokens == tokens


@pytest.mark.usefixtures("fake")
def test_calibrate_without_a_layer_writes_the_curve_and_fails(
    checkpoint: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--output", tmp_path / "out" / "w.json", "--plot", tmp_path / "out" / "curve.svg"]
    assert calibrate(checkpoint, images, "--eta", 1e-9, *files) == 1
    written = json.loads((tmp_path / "out" / "w.json").read_text())
    assert written["withdraw_layer"] is None
    assert list(written["kl"]) == ["1", "2", "3"]
    assert "Vision tokens can leave none of 4 layers" in (tmp_path / "out" / "curve.svg").read_text()
    assert "No K has 1e-09 or less" in capsys.readouterr().out


@pytest.mark.usefixtures("fake")
def test_calibrate_without_matplotlib(
    checkpoint: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration_plot, "find_spec", lambda name: None)
    assert calibrate(checkpoint, images, "--plot", "curve.png") == 2
    assert "--plot needs matplotlib: pip install matplotlib" in capsys.readouterr().err
    assert calibrate(checkpoint, images) == 0
    assert "not drawn, since matplotlib is not installed" in capsys.readouterr().out
    assert not (checkpoint / "withdrawal.png").exists()


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eta", "0"], "must be greater than 0, not 0.0"),
        (["--samples", "0"], "at least one sample is needed, not 0"),
        (["--answer-tokens", "0"], "--answer-tokens must be at least 1, not 0"),
        (["--min-layer", "4"], "give --min-layer from 1 to 3"),
        (["--data", "nowhere"], "nowhere is neither a folder"),
        (["--output", "/"], "/ can't be written"),
        (["--output", "w.png"], "the calibration and its plot can't both be w.png"),
    ],
)
def test_calibrate_refuses(
    options: list[str], message: str, checkpoint: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate(checkpoint, images, *options) == 2
    assert message in capsys.readouterr().err
    assert not (checkpoint / "withdrawal.json").exists()


@pytest.mark.usefixtures("fake")
def test_logits_that_are_not_finite_are_said(
    checkpoint: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeProbe, "MOVES", {1: float("nan"), 2: 0.1, 3: 0.1})
    assert calibrate(checkpoint, images) == 2
    assert "0.jpg are not finite" in capsys.readouterr().err


def written(checkpoint: Path, **changed: Any) -> Path:
    """A calibration of the checkpoint, where `serve` looks for it."""
    values: dict[str, Any] = {
        "model": "m",
        "model_hash": model_hash(checkpoint),
        "layers": 4,
        "withdraw_layer": 3,
        "eta": 0.01,
    }
    file = checkpoint / "withdrawal.json"
    Calibration(**(values | {"samples": 7, "kl": {2: 0.5, 3: 0.004}} | changed)).write(file)
    return file


def test_a_calibration_is_read_for_its_model_only(checkpoint: Path, tmp_path: Path) -> None:
    file = written(checkpoint)
    assert read_for(str(checkpoint), None, file).withdraw_layer == 3
    advice = f"run `foldserve calibrate {checkpoint} --data DIR`, or give --withdraw-layer a number"
    for spoil, message in (
        (lambda: written(checkpoint, withdraw_layer=None), "found no layer with a mean KL of 0.01 or less"),
        (lambda: written(checkpoint, model_hash="sha256:0"), "is of m with other weights"),
        (file.unlink, "needs a calibration, and there is no"),
    ):
        spoil()
        with pytest.raises(ValueError, match=message) as error:
            read_for(str(checkpoint), None, file)
        assert str(error.value).endswith(advice)
    file.write_text('{"withdraw_layer": "deep"}')
    with pytest.raises(ValueError, match="is not a calibration"):
        read_for(str(checkpoint), None, file)


def test_where_a_calibration_lies(checkpoint: Path, tmp_path: Path) -> None:
    assert default_file(str(checkpoint), tmp_path) == checkpoint / "withdrawal.json"
    assert default_file("llava-hf/x", tmp_path) == tmp_path / "calibration" / "llava-hf--x" / "withdrawal.json"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """`foldserve serve` up to where vLLM starts: our part of its additional config, and the worker class."""
    from foldserve.server.api import launch

    ready: list[dict[str, Any]] = []

    def parsed(argv: list[str], settings: Any, environment: Environment, small: Path) -> None:
        args = launch.serve_args(argv, settings, environment, small)
        ready.append(args.additional_config[CONFIG_KEY] | {"scheduler_cls": args.scheduler_cls})

    monkeypatch.setattr(launch, "serve", parsed)

    def run(*argv: object) -> dict[str, Any]:
        assert status_of("serve", *argv) == 0
        return ready.pop()

    return run


def test_serve_auto_takes_the_calibrated_layer(serve: Callable[..., dict[str, Any]], checkpoint: Path) -> None:
    file = written(checkpoint)
    config = serve(checkpoint, "--withdraw-layer", "auto", "--low-detail-ratio", 0.5)
    assert config["withdraw_layer"] == 3
    assert config["low_detail_ratio"] == 0.5
    assert config["calibration"] == {"eta": 0.01, "samples": 7, "answer_tokens": 1, "kl": 0.004}
    assert "withdrawal" in config["scheduler_cls"]
    elsewhere = file.rename(checkpoint / "other.json")
    assert serve(checkpoint, "--withdraw-layer=auto", "--calibration", elsewhere)["withdraw_layer"] == 3


@pytest.mark.usefixtures("serve")
def test_serve_refuses_another_models_calibration(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(checkpoint)
    spoil_last_weights(checkpoint)
    assert status_of("serve", checkpoint, "--withdraw-layer", "auto") == 2
    assert "with other weights" in capsys.readouterr().err
    assert status_of("serve", checkpoint, "--withdraw-layer", 3, "--calibration", "x.json") == 2
    assert "--calibration is what --withdraw-layer auto reads" in capsys.readouterr().err


def test_a_layer_by_number_has_no_calibration(serve: Callable[..., dict[str, Any]], checkpoint: Path) -> None:
    config = serve(checkpoint, "--withdraw-layer", 3)
    del config["scheduler_cls"]
    assert config == Settings(withdraw_layer=3).to_config()
