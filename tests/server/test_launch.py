"""The arguments that vLLM is started with."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from foldserve.reducers.reduction import Reduction
from foldserve.server.limits import Limits
from foldserve.server.settings import Environment, Settings

SMALL = Path("/small/model")
SETTINGS = Settings()
ENVIRONMENT = Environment(Path("/cache"), None, False, "g++")


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Namespace]:
    """`serve_args` on a CPU (or, with `cpu=False`, a GPU) with 8 GiB of memory and a compiler unless said otherwise."""
    from foldserve.server.api import launch
    from foldserve.server.engine import worker

    def parse(
        *argv: str,
        settings: Settings = SETTINGS,
        environment: Environment = ENVIRONMENT,
        cpu: bool = True,
        memory_gib: int = 8,
        compiler: bool = True,
    ) -> Namespace:
        for module in (launch, worker):
            monkeypatch.setattr(module, "current_platform", SimpleNamespace(is_cpu=lambda: cpu))
        memory = SimpleNamespace(available_memory=memory_gib * 2**30)
        monkeypatch.setattr(launch, "get_memory_node_info", lambda node: memory)
        monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if compiler else None)
        return launch.serve_args(list(argv), settings, environment, SMALL)

    return parse


def test_no_model_serves_the_small_one(parsed: Callable[..., Namespace], capsys: pytest.CaptureFixture[str]) -> None:
    args = parsed("--port", "8001")
    assert (args.model_tag, args.model, args.served_model_name, args.port) == (None, str(SMALL), ["demo"], 8001)
    assert (args.dtype, args.enforce_eager, args.kv_cache_memory_bytes) == ("float32", True, 2 << 30)
    said = capsys.readouterr().err
    assert "serving the small demo model" in said
    options = "--dtype float32 --enforce-eager --kv-cache-memory-bytes 2147483648"
    options += """ --structured-outputs-config '{"backend": "xgrammar", "disable_any_whitespace": true}'"""
    assert args.structured_outputs_config.disable_any_whitespace
    assert f"--model /small/model --served-model-name demo --mm-processor-cache-gb 1 {options}" in said


@pytest.mark.parametrize("argv", [("some/model",), ("--model", "some/model"), ("--config", "FILE")], ids=lambda a: a[0])
def test_a_given_model_is_served(parsed: Callable[..., Namespace], argv: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: some/model\n")
    args = parsed(*(str(file) if argument == "FILE" else argument for argument in argv))
    assert (args.model_tag or args.model) == "some/model"
    assert (args.served_model_name, args.dtype, args.enforce_eager) == (None, "auto", False)
    assert not args.structured_outputs_config.disable_any_whitespace


def test_memory_for_the_kv_cache_has_a_bound(parsed: Callable[..., Namespace]) -> None:
    assert parsed("m", memory_gib=256).kv_cache_memory_bytes == 4 << 30


def test_without_a_compiler_nothing_is_compiled(parsed: Callable[..., Namespace]) -> None:
    assert parsed("m", compiler=False).enforce_eager is True


def test_what_the_user_chose_stays(parsed: Callable[..., Namespace], capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--dtype=bfloat16", "--no-enforce-eager", "--served-model-name=x", "--kv-cache-memory-bytes=1000"]
    args = parsed(*chosen, "--mm-processor-cache-gb=4", '--structured-outputs-config={"backend": "guidance"}')
    assert args.structured_outputs_config.backend == "guidance"
    assert args.mm_processor_cache_gb == 4
    assert (args.dtype, args.enforce_eager, args.served_model_name) == ("bfloat16", False, ["x"])
    assert args.kv_cache_memory_bytes == 1000
    assert capsys.readouterr().err.endswith("defaults applied: --model /small/model\n")


@pytest.mark.parametrize(
    ("argv", "environment"),
    [
        (("m", "--gpu-memory-utilization", "0.5"), ENVIRONMENT),
        (("m",), Environment(Path("/cache"), None, True, "g++")),
    ],
    ids=["by-share", "by-environment"],
)
def test_a_kv_cache_sized_in_another_way_stays(
    argv: tuple[str, ...], environment: Environment, parsed: Callable[..., Namespace]
) -> None:
    assert parsed(*argv, environment=environment).kv_cache_memory_bytes is None


def test_on_a_gpu_every_other_choice_is_vllms(parsed: Callable[..., Namespace]) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    ours = vars(parsed("m", cpu=False, compiler=False))
    parser = ServeSubcommand().subparser_init(FlexibleArgumentParser().add_subparsers())
    plain = vars(parser.parse_args(["m"]))
    needed = {
        "additional_config",
        "disable_uvicorn_access_log",  # ours has request ids
        "foldserve_shared",
        "h11_max_incomplete_event_size",  # 64 kB of headers instead of 4 MB
        "scheduler_cls",
        "shutdown_timeout",
        "subparser",
        "worker_cls",
    }
    assert {name for name, value in ours.items() if name not in plain or value != plain[name]} == needed
    assert ours["worker_cls"] == "foldserve.server.engine.worker_cuda.FoldWorker"
    assert ours["scheduler_cls"] == "foldserve.server.engine.scheduler.make_scheduler"


def test_a_server_without_videos_profiles_none(parsed: Callable[..., Namespace]) -> None:
    settings = Settings(limits=Limits(max_videos_per_request=0))
    assert parsed("m", "--limit-mm-per-prompt.image", "2").limit_mm_per_prompt == {"image": 2}
    args = parsed("m", "--limit-mm-per-prompt.image", "2", settings=settings)
    assert args.limit_mm_per_prompt == {"image": 2, "video": 0}


def test_a_runner_or_scheduler_of_ones_own_is_left_alone(parsed: Callable[..., Namespace]) -> None:
    assert parsed("m", "--scheduler-cls", "theirs.Scheduler").scheduler_cls == "theirs.Scheduler"
    assert parsed("m", "--worker-cls", "theirs.Worker").worker_cls == "theirs.Worker"
    assert parsed("m", "--pipeline-parallel-size", "2").worker_cls == "auto"  # later ranks see no images


def test_settings_travel_in_the_additional_config(parsed: Callable[..., Namespace]) -> None:
    settings = Settings(Reduction(ratio=0.5), 0.9, 4)
    assert parsed("m", settings=settings).additional_config == {"foldserve": settings.to_config()}
    args = parsed("m", "--additional-config", '{"theirs": {"x": 1}}', settings=settings)
    assert args.additional_config == {"theirs": {"x": 1}, "foldserve": settings.to_config()}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["m", "--additional-config", '{"foldserve": {}}'], "'foldserve' in --additional-config"),
        (["m", "-cc.cudagraph_mm_encoder=true"], "cudagraph_mm_encoder in --compilation-config does not go with"),
        (
            ["m", "--enable-lora", "--enable-tower-connector-lora"],
            "--enable-tower-connector-lora does not go with foldserve",
        ),
        (["m", "--no-such-option"], "unrecognized arguments: --no-such-option"),
    ],
)
def test_refused_arguments(
    argv: list[str], message: str, parsed: Callable[..., Namespace], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parsed(*argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_plugins_are_added_to_what_would_load_anyway() -> None:
    from foldserve.server.api.launch import plugins_to_load

    def load(*names: str) -> list[str]:
        return plugins_to_load(Environment(Path("/cache"), names, False, "g++"))

    assert load() == ["foldserve", "foldserve_api", "foldserve_stats"]
    assert load("theirs") == ["theirs", "foldserve", "foldserve_api", "foldserve_stats"]
    assert load("foldserve_api", "theirs") == ["foldserve_api", "theirs", "foldserve", "foldserve_stats"]
    unset = plugins_to_load(ENVIRONMENT)
    assert {"lora_filesystem_resolver", "foldserve", "foldserve_api"} <= set(unset)
    assert len(unset) == len(set(unset))
