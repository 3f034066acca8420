"""The machine and date of a measurement, for a report."""

from __future__ import annotations

import shutil
import subprocess
from datetime import date
from pathlib import Path

import psutil

from foldserve.loadtest.report.journal import RESULTS_FILE

_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")


def machine() -> str:
    """CPUs, memory and NVIDIA GPUs."""
    return ", ".join([f"{psutil.cpu_count()} CPUs, {psutil.virtual_memory().total / 2**30:.0f} GiB", *_gpus()])


def measured_on(folder: Path) -> str:
    """The day on which the last result in the folder's journal was written."""
    return date.fromtimestamp((folder / RESULTS_FILE).stat().st_mtime).isoformat()


def _gpus() -> list[str]:
    """Names from `nvidia-smi`: torch would take GPU memory to answer."""
    if shutil.which(_NVIDIA_SMI[0]) is None:
        return []
    found = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, check=False)
    names = [line.strip() for line in found.stdout.splitlines() if line.strip()] if found.returncode == 0 else []
    return [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
