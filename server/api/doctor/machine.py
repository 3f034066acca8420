"""The machine as vLLM sees it. Asks NVML about GPUs, so that none is initialized."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from vllm.platforms import current_platform
from vllm.third_party import pynvml
from vllm.triton_utils import HAS_TRITON
from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

_SHM = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Gpu:
    """`capability` as in "9.0"; bytes are 0 if the GPU has no memory of its own."""

    name: str
    capability: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What a server would find here.

    Attributes:
        platform: vLLM's choice; "none" if it can't run here.
        cuda_build: CUDA version that torch is built for; None for a CPU build.
        driver: version of NVIDIA's driver; None if NVML finds none.
        triton_runs: Triton is installed and can compile for this platform.
        instructions: sets that matter to vLLM's CPU kernels.
        cpu_count: cores that this process may use.
        ram_free_bytes: of what a container may use.
        shm_free_bytes: in /dev/shm; None if there is no such directory.
    """

    platform: Literal["cpu", "cuda", "none"]
    cuda_build: str | None
    driver: str | None
    gpus: tuple[Gpu, ...]
    triton_runs: bool
    cpu_count: int
    instructions: tuple[str, ...]
    ram_free_bytes: int
    ram_total_bytes: int
    shm_free_bytes: int | None

    @classmethod
    def read(cls) -> Machine:
        driver, gpus = _nvml()
        ram_free, ram_total = _ram()
        return cls(
            platform=_platform(),
            cuda_build=torch.version.cuda,
            driver=driver,
            gpus=gpus,
            triton_runs=HAS_TRITON,
            cpu_count=len(os.sched_getaffinity(0)),
            instructions=_instructions(),
            ram_free_bytes=ram_free,
            ram_total_bytes=ram_total,
            shm_free_bytes=shutil.disk_usage(_SHM).free if _SHM.is_dir() else None,
        )


def _platform() -> Literal["cpu", "cuda", "none"]:
    if current_platform.is_cpu():
        return "cpu"
    return "cuda" if current_platform.is_cuda() else "none"


def _nvml() -> tuple[str | None, tuple[Gpu, ...]]:
    """Driver, and the GPUs that `CUDA_VISIBLE_DEVICES` leaves; (None, ()) without a driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None, ()
    try:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = map(str, range(pynvml.nvmlDeviceGetCount())) if visible is None else filter(None, visible.split(","))
        return pynvml.nvmlSystemGetDriverVersion(), tuple(map(_gpu, names))
    except pynvml.NVMLError as error:
        raise ValueError(f"CUDA_VISIBLE_DEVICES={visible} names GPUs that are not here: {error}") from error
    finally:
        pynvml.nvmlShutdown()


def _gpu(name: str) -> Gpu:
    by_index = name.strip().isdecimal()
    handle = pynvml.nvmlDeviceGetHandleByIndex(int(name)) if by_index else pynvml.nvmlDeviceGetHandleByUUID(name)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        total, free = memory.total, memory.free
    except pynvml.NVMLError_NotSupported:  # memory shared with the CPU
        total, free = 0, 0
    return Gpu(pynvml.nvmlDeviceGetName(handle), f"{major}.{minor}", total, free)


def _ram() -> tuple[int, int]:
    """(free, total) bytes; on a CPU those of the worker's memory node, from the function that vLLM uses."""
    if current_platform.is_cpu():
        node = get_memory_node_info(get_visible_memory_node()[0])
        return node.available_memory, node.total_memory
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _instructions() -> tuple[str, ...]:
    known = {
        "AMX": torch.cpu._is_amx_tile_supported,
        "AVX-512 BF16": torch.cpu._is_avx512_bf16_supported,
        "AVX-512": torch.cpu._is_avx512_supported,
        "AVX2": torch.cpu._is_avx2_supported,
    }
    return tuple(name for name, is_supported in known.items() if is_supported())
