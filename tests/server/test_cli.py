"""The command line up to the call that starts vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import pytest

from foldserve.reducers.reduction import Reduction
from foldserve.server import cli, commands
from foldserve.server.settings import Environment, Settings


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], Settings]]:
    """What vLLM would have been started with, instead of starting it."""
    from foldserve.server.api import launch

    calls: list[tuple[list[str], Settings]] = []

    def serve(argv: list[str], settings: Settings, environment: Environment, small: Path) -> None:
        assert (small / "config.json").is_file()
        calls.append((argv, settings))

    monkeypatch.setattr(launch, "serve", serve)
    return calls


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("asked", "variable"), [("auto", "theirs"), ("v1", "0"), ("v2", "1")])
def test_the_model_runner_may_be_chosen(
    asked: str, variable: str, started: list[tuple[list[str], Settings]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a variable of vLLM's, which `auto` leaves as it is."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "theirs")
    cli.main(["serve", "m", "--model-runner", asked])
    assert started[0][0] == ["m"]
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == variable


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "foldserve serve llava-hf/llava-1.5-7b-hf" in text
    assert "demo-model" in text


@pytest.mark.parametrize("name", [*commands.ALL, "convert stf", "convert mmvp"])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) if name not in ("serve", "batch", "doctor") else nullcontext():
        cli.main([*name.split(), "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: foldserve {name} ")
    assert "\noptions:\n" in text


def test_help_does_not_wait_for_torch() -> None:
    """Nor for other large packages, but that of `serve`, whose defaults need the methods."""
    code = """
import sys
from foldserve.server import cli
for name in ([], ["calibrate"], ["evaluate"], ["analyze"], ["loadtest"], ["gpu-check"], ["hash-key"]):
    try:
        cli.main([*name, "--help"])
    except SystemExit:
        pass
print(sys.modules.keys() & {"matplotlib", "numpy", "pandas", "PIL", "pydantic", "torch", "transformers", "vllm"})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_version_names_both(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"foldserve {version('foldserve')} (vLLM {version('vllm')})\n"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_serve_help_is_ours_and_starts_nothing(
    flag: str, started: list[tuple[list[str], Settings]], capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["serve", flag])
    text = capsys.readouterr().out
    for option in ("--default-reduction", "--low-detail-ratio", "--withdraw-layer", "--help=all"):
        assert option in text
    assert not started


def test_serve_help_about_a_word_goes_to_vllm(started: list[tuple[list[str], Settings]]) -> None:
    cli.main(["serve", "--help=max-model-len"])
    assert started == [(["--help=max-model-len"], Settings())]


def test_serve_takes_its_options_and_leaves_vllms_in_order(started: list[tuple[list[str], Settings]]) -> None:
    ours = ["--default-reduction", "0.5", "--withdraw-layer", "4", "--low-detail-ratio=0.9"]
    theirs = ["some/model", "--port", "8001", "-tp", "2", "--default", "x", "--additional-config", '{"a": 1}']
    cli.main(["serve", *theirs[:3], *ours, *theirs[3:]])
    assert started == [(theirs, Settings(Reduction(ratio=0.5), 0.9, 4))]


def test_serve_takes_a_reduction_as_json(started: list[tuple[list[str], Settings]]) -> None:
    cli.main(["serve", "--default-reduction", '{"method": "folder_cls", "keep_tokens": 64}'])
    assert started == [([], Settings(Reduction(method="folder_cls", keep_tokens=64)))]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--default-reduction", "1.5"], r"argument --default-reduction: ratio"),
        (["--default-reduction", "much"], "a ratio such as 0.5"),
        (["--default-reduction", '{"method": "best"}'], "unknown method 'best'"),
        (["--low-detail-ratio", "1"], "low-detail ratio must lie in [0, 1), not 1.0"),
        (["--low-detail-ratio", "low"], "invalid float value: 'low'"),
        (["--withdraw-layer", "0"], "at least 1, not 0"),
        (["--withdraw-layer", "2.5"], "a decoder layer or auto is needed, not '2.5'"),
    ],
)
def test_bad_values_of_serve_say_what_is_wrong(
    argv: list[str], message: str, started: list[tuple[list[str], Settings]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, "serve", *argv)
    assert not started


def test_no_command_and_unknown_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "COMMAND" in fails(capsys)
    assert "unrecognized arguments: --fast" in fails(capsys, "demo-model", str(tmp_path / "m"), "--fast")
    assert not (tmp_path / "m").exists()


def test_demo_model_is_copied(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cli.main(["demo-model", str(tmp_path / "m")])
    assert f"foldserve serve {tmp_path / 'm'}" in capsys.readouterr().out
    assert (tmp_path / "m" / "config.json").is_file()
    assert "is not an empty directory" in fails(capsys, "demo-model", str(tmp_path / "m"))
