"""Access and life cycle on the command line, up to the arguments that vLLM gets."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from starlette.datastructures import Headers, State

from foldserve.server import cli
from foldserve.server.access import Access
from foldserve.server.settings import CONFIG_KEY, Environment, Settings

ENVIRONMENT = Environment(Path("/cache"), None, False, "g++")
Parse = Callable[..., Namespace]


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """`serve_args` as on a GPU, where nothing is chosen for the user."""
    from foldserve.server.api import launch

    def parse(*argv: str, access: Access | None = None, environment: Environment = ENVIRONMENT) -> Namespace:
        monkeypatch.setattr(launch, "current_platform", SimpleNamespace(is_cpu=lambda: False))
        return launch.serve_args(list(argv), Settings(access=access or Access()), environment, Path("/small"))

    return parse


@pytest.mark.parametrize(
    ("values", "option"),
    [({"max_queue": -1}, "--max-queue"), ({"shutdown_timeout_s": -1}, "--shutdown-timeout")],
    ids=str,
)
def test_out_of_bounds(values: dict[str, int], option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be at least 0, not -1"):
        Access(**values)  # type: ignore[arg-type]


def test_vllm_waits_longer_than_we_do(parsed: Parse) -> None:
    args = parsed("m", access=Access(shutdown_timeout_s=7))
    assert args.shutdown_timeout == 17
    assert args.additional_config["foldserve"]["access"]["shutdown_timeout_s"] == 7
    assert args.disable_uvicorn_access_log


@pytest.mark.parametrize(
    "argv",
    [
        ("--api-key", "secret"),
        ("--enable-log-requests",),
        ("--enable-log-requests", "--enable-log-outputs"),
        ("--enable-request-id-headers",),
        ("--logging-config", '{"formatter": "json"}'),
        ("--log-level", "DEBUG"),
        ("--shutdown-timeout", "3"),
    ],
    ids=lambda argv: argv[-1],
)
def test_options_that_would_undo_a_promise(
    parsed: Parse, argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed("m", *argv)
    said = capsys.readouterr().err
    assert "not taken" in said
    assert "secret" not in said


def test_variables_that_would_undo_a_promise(parsed: Parse, capsys: pytest.CaptureFixture[str]) -> None:
    environment = Environment.read({"VLLM_API_KEY": "secret", "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "0"})
    assert [text.split(":")[0] for text in environment.refused] == ["VLLM_API_KEY"]
    with pytest.raises(SystemExit):
        parsed("m", environment=replace(ENVIRONMENT, refused=environment.refused))
    said = capsys.readouterr().err
    assert "VLLM_API_KEY" in said
    assert "secret" not in said


@pytest.mark.parametrize(
    "option", [("--log-format", "json"), ("--log-level", "DEBUG"), ("--verbose",)], ids=lambda option: option[0]
)
def test_two_logging_configurations(
    option: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_LOGGING_CONFIG_PATH", "/mine.json")
    with pytest.raises(SystemExit):
        cli.main(["serve", "m", *option])
    assert "configuration of your own" in capsys.readouterr().err


def test_a_model_that_generates_nothing_is_not_served() -> None:
    """vLLM would leave out a plugin that does not fit, and serve its own routes without a check of ours."""
    from foldserve.server.api.plugin import FoldserveEndpoint

    class Embeds:
        async def get_supported_tasks(self) -> tuple[str, ...]:
            return ("embed",)

    plugin = FoldserveEndpoint()
    assert plugin.required_tasks is None
    for engine in (Embeds(), None):
        with pytest.raises(RuntimeError, match="generate text"):
            asyncio.run(plugin.init_state(engine, State(), Namespace()))


@pytest.mark.parametrize(
    ("options", "asked"),
    [((), False), (("--open-metrics",), False), (("--api-keys",), True), (("--api-keys", "--open-metrics"), False)],
    ids=str,
)
def test_metrics_need_a_key_where_there_are_keys(
    options: tuple[str, ...], asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foldserve.server.api import launch, plugin
    from foldserve.server.api.errors import Unauthorized

    file = tmp_path / "keys.toml"
    file.write_text(f'[[key]]\nname = "alice"\nsha256 = "{"ab" * 32}"\n')
    config: dict[str, object] = {}
    monkeypatch.setattr(launch, "serve", lambda argv, settings, *_: config.update(settings.to_config()))
    cli.main(["serve", "m", *(f"{option}={file}" if option == "--api-keys" else option for option in options)])

    vllm = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=1), parallel_config=SimpleNamespace(data_parallel_size=1)
    )
    state = State()
    monkeypatch.setattr(plugin, "Lifecycle", lambda *_: None)
    access = Settings.from_config({CONFIG_KEY: config}).access
    plugin._init_access(SimpleNamespace(vllm_config=vllm), state, Namespace(), access)
    with pytest.raises(Unauthorized) if asked else nullcontext():
        assert state.foldserve_guard.identify(Headers(), "metrics") is None
