"""docs/clients.md is right: its examples print what it says, and clients do by default what it says."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.page import PAGE, ROOT, URL, Example, examples

HERE = Path(__file__).parent
CLIENTS = ROOT / ".venv-clients"
NODE = CLIENTS / "node"
EXAMPLES = {example.name: example for example in examples()}
OPENAI_OF_PYTHON = {"openai-python": ("openai-2", "openai-3"), "LlamaIndex": ("openai-2",), "instructor": ("openai-2",)}
"""The environments of those that are not in the one with the newest openai alone."""

PYTHON = [
    (name, environment)
    for name, example in EXAMPLES.items()
    if example.language == "python"
    for environment in OPENAI_OF_PYTHON.get(name, ("openai-3",))
]
TYPESCRIPT = [name for name, example in EXAMPLES.items() if example.language == "ts"]

# Nobody but the server of these tests is asked: whatever goes elsewhere is sent to a port where nobody listens.
_NOBODY = "http://127.0.0.1:9"
OFFLINE = {
    "HTTP_PROXY": _NOBODY,
    "HTTPS_PROXY": _NOBODY,
    "NO_PROXY": "127.0.0.1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}


def run(*command: str | Path, text: str | None = None, **environment: str) -> str:
    """Standard output of a program, which has to succeed."""
    env = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], **OFFLINE, **environment}
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, cwd=ROOT, env=env, check=False, timeout=600
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines()]


def program(name: str, url: str, folder: Path) -> tuple[Example, Path]:
    """An example as a file that asks this server."""
    example = EXAMPLES[name]
    file = folder / f"example-{name.replace(' ', '-')}.{example.language}"
    file.write_text(example.code.replace(URL, url))
    return example, file


def test_the_page_has_an_example_of_every_client_of_its_table() -> None:
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| [")]
    named = {name.strip("` ") for row in rows for name in row.replace("[", "").split(",")}
    assert {name.partition("]")[0].replace("`", "") for name in named} == set(EXAMPLES)


@pytest.mark.parametrize(("name", "environment"), PYTHON)
def test_python(name: str, environment: str, url: str, tmp_path: Path) -> None:
    example, file = program(name, url, tmp_path)
    assert lines(run(CLIENTS / environment / "bin" / "python", file)) == lines(example.output)


@pytest.mark.parametrize("name", TYPESCRIPT)
def test_typescript(name: str, url: str) -> None:
    example, file = program(name, url, NODE)
    assert lines(run(CLIENTS / "openai-3" / "bin" / "node", file)) == lines(example.output)


def test_types_of_typescript() -> None:
    """Examples pass, and what the page says that the types refuse is refused."""
    for name in TYPESCRIPT:
        program(name, URL, NODE)
    shutil.copy(HERE / "pitfalls" / "openai.ts", NODE)
    run(CLIENTS / "openai-3" / "bin" / "node", NODE / "node_modules" / "typescript" / "bin" / "tsc", "--project", NODE)


def test_jdk(url: str, tmp_path: Path) -> None:
    example, file = program("JDK", url, tmp_path)
    assert lines(run("java", file)) == lines(example.output)


def test_curl(url: str) -> None:
    example = EXAMPLES["curl"]
    assert lines(run("bash", "-euo", "pipefail", text=example.code.replace(URL, url))) == lines(example.output)


@pytest.mark.parametrize("environment", ["openai-2", "openai-3"])
def test_pitfalls(environment: str, url: str) -> None:
    """What the page says that goes wrong, goes wrong in that way."""
    file = HERE / "pitfalls" / f"{environment.replace('-', '_')}.py"
    scene = base64.b64encode((ROOT / "docs" / "images" / "scene.png").read_bytes()).decode()
    run(CLIENTS / environment / "bin" / "python", file, URL=f"{url}/v1", SCENE=f"data:image/png;base64,{scene}")


def test_pitfalls_of_vercel_ai(url: str) -> None:
    file = Path(shutil.copy(HERE / "pitfalls" / "vercel.test.ts", NODE))
    run(CLIENTS / "openai-3" / "bin" / "node", "--test", file, URL=f"{url}/v1")
