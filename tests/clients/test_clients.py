"""docs/guides/clients.md is true: its examples print what it shows, and clients' defaults are as it says."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.page import PAGE, ROOT, URL, Example, examples

PITFALLS = Path(__file__).parent / "pitfalls"
CLIENTS = ROOT / ".venv-clients"
NODE = CLIENTS / "node"
OPENAI_2, OPENAI_3 = CLIENTS / "openai-2" / "bin", CLIENTS / "openai-3" / "bin"
INTERPRETERS = {"bash": Path("bash"), "java": Path("java"), "python": OPENAI_3 / "python", "ts": OPENAI_3 / "node"}
OTHER_INTERPRETERS = {
    "LlamaIndex": [OPENAI_2 / "python"],
    "instructor": [OPENAI_2 / "python"],
    "openai-python": [OPENAI_2 / "python", OPENAI_3 / "python"],
    "Responses in openai-python": [OPENAI_2 / "python", OPENAI_3 / "python"],
}
RUNS = [
    pytest.param(example, interpreter, id="-".join([example.name, *interpreter.parts[-3:-2]]))
    for example in examples()
    for interpreter in OTHER_INTERPRETERS.get(example.name, [INTERPRETERS[example.language]])
]

# Nobody but the server of these tests is asked: what would go elsewhere goes to a port where nobody listens.
_NOBODY = "http://127.0.0.1:9"
OFFLINE = {"HTTP_PROXY": _NOBODY, "HTTPS_PROXY": _NOBODY, "NODE_USE_ENV_PROXY": "1", "NO_PROXY": "127.0.0.1"}
OFFLINE |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}


def run(*command: str | Path, **environment: str) -> str:
    """Standard output of a program, which has to succeed."""
    env = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], **OFFLINE, **environment}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False, timeout=600)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


def program(example: Example, folder: Path, url: str = URL) -> Path:
    """An example as a file; Node finds packages from where the file lies."""
    name = f"example-{example.name.replace(' ', '-')}.{example.language}"
    file = (NODE if example.language == "ts" else folder) / name
    file.write_text(example.code.replace(URL, url))
    return file


@pytest.mark.parametrize(("example", "interpreter"), RUNS)
def test_an_example_prints_what_the_page_says(example: Example, interpreter: Path, url: str, tmp_path: Path) -> None:
    printed = run(interpreter, program(example, tmp_path, url))
    assert printed.splitlines() == example.output.splitlines()


def test_the_table_names_the_clients_that_have_examples() -> None:
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| [")]
    named = [name.replace("`", "") for row in rows for name in re.findall(r"\[(.+?)\]", row)]
    assert sorted(named) == sorted(example.name for example in examples())


def test_types(tmp_path: Path) -> None:
    """TypeScript takes the examples, and refuses what the page says that it refuses."""
    for example in examples():
        if example.language == "ts":
            program(example, tmp_path)
    for file in PITFALLS.glob("*.ts"):
        shutil.copy(file, NODE)
    run(OPENAI_3 / "node", NODE / "node_modules" / "typescript" / "bin" / "tsc", "--project", NODE)


@pytest.mark.parametrize("interpreter", [OPENAI_2, OPENAI_3], ids=["openai-2", "openai-3"])
def test_pitfalls(interpreter: Path, url: str) -> None:
    """What the page says that goes wrong, goes wrong in that way."""
    file = PITFALLS / f"{interpreter.parent.name.replace('-', '_')}.py"
    scene = base64.b64encode((ROOT / "docs" / "images" / "scene.png").read_bytes()).decode()
    run(interpreter / "python", file, URL=f"{url}/v1", SCENE=f"data:image/png;base64,{scene}")


def test_pitfalls_in_node(url: str) -> None:
    run(OPENAI_3 / "node", "--test", shutil.copy(PITFALLS / "node.test.ts", NODE), URL=f"{url}/v1")
