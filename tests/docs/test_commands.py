"""The commands of the README and of docs/ work: they are run, or their options are known."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from foldserve.server import cli, commands
from tests.api.live import Live
from tests.docs.blocks import MARKS, ROOT, SHELLS, STARTS_A_SERVER, TUTORIAL, Block, blocks

BLOCKS = [block for block in blocks() if block.is_commands]
OTHERS = [block for block in blocks() if not block.is_commands and not block.page.startswith("docs/reference/cli")]
_COMMAND = re.compile(r"^(\$ )?(foldserve|make|curl|pip|python|docker|kubectl|helm|export) ", re.MULTILINE)
_SERVER = "http://localhost:8000"


def ids(block: Block) -> str:
    return block.place


@pytest.mark.parametrize("block", OTHERS, ids=ids)
def test_commands_are_fenced_as_such(block: Block) -> None:
    assert block.language == "text" or not _COMMAND.search(block.text), f"fence it as one of {', '.join(SHELLS)}"


@pytest.mark.parametrize("block", BLOCKS, ids=ids)
def test_a_block_runs_or_says_why_not(block: Block) -> None:
    assert block.mark in ("", *MARKS)


@pytest.fixture(scope="module")
def engine_options() -> frozenset[str]:
    """Those of `vllm serve`."""
    actions = ServeSubcommand().subparser_init(FlexibleArgumentParser().add_subparsers())._actions
    return frozenset(option for action in actions for option in action.option_strings)


@pytest.mark.parametrize("block", [block for block in BLOCKS if list(block.commands())], ids=ids)
def test_its_options_are_known(block: Block, engine_options: frozenset[str]) -> None:
    for words in block.commands():
        words = [word for word in words if not word.startswith("[")]  # a page's "[any option of vllm serve]"
        words = words[: next((place for place, word in enumerate(words) if word.endswith("]")), None)]
        assert words[0] in commands.ALL
        args, rest = cli.build_parser(words[0]).parse_known_args(words)
        assert args.takes_engine_options or not rest
        assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= engine_options


def run(block: Block, folder: Path, url: str = _SERVER) -> str:
    """What a block prints, in a shell that stops at the first command that fails."""
    script = f"set -euo pipefail\n{block.text.replace(_SERVER, url)}"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # an engine starts in half the time
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{block.place}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run: the pages' paths are those of the repository, and what is written stays out of it."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("deploy", "docs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


STEPS = [block for block in BLOCKS if block.page == TUTORIAL]
LAST_SERVER = [block for block in STEPS if block.mark == STARTS_A_SERVER][-1]
BEFORE_IT = [block for block in takewhile(lambda block: block is not LAST_SERVER, STEPS) if not block.mark]
PREPARATION = [block for block in BEFORE_IT if _SERVER not in block.text]
RUNS = [block for block in BLOCKS if not block.mark and block not in PREPARATION]


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The tutorial's last server, which all pages' requests go to, behind what the tutorial does for it."""
    for block in PREPARATION:
        assert_prints(block, run(block, folder))
    (words,) = LAST_SERVER.commands()
    _, model, *options = words
    server = Live(folder / model, tmp_path_factory.mktemp("server"), *options)
    yield f"http://127.0.0.1:{server.port}"
    server.end()


@pytest.mark.parametrize("block", RUNS, ids=ids)
def test_it_runs(block: Block, folder: Path, url: str) -> None:
    assert_prints(block, run(block, folder, url))


def assert_prints(block: Block, printed: str) -> None:
    """As the page says, where it says so."""
    if block.output is not None:
        expected = ".*".join(map(re.escape, block.output.split("...")))
        assert re.fullmatch(expected, printed, re.DOTALL), f"{block.place} prints\n{printed}"


def test_the_tutorial_is_whole() -> None:
    """The checks above see it: it calibrates, starts servers and asks them."""
    on_this_machine = [block for block in STEPS if block.mark in ("", STARTS_A_SERVER)]
    used = [words[0] for block in on_this_machine for words in block.commands()]
    assert used == ["serve", "demo-model", "calibrate", "serve"]
    assert len(PREPARATION) == 1
