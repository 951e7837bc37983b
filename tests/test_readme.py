"""The README: its Python and its commands run, and continuous integration runs its two set-up commands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import environment

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


class Block(NamedTuple):
    """A fenced block of code, and the line of the README where it begins."""

    language: str
    line: int
    code: str


def read_blocks() -> list[Block]:
    text = README.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(match[1], text.count("\n", 0, match.start(2)) + 1, match[2]) for match in found]


BLOCKS = read_blocks()
COMMANDS = [line for block in BLOCKS if block.language == "sh" for line in block.code.splitlines()]
SET_UP = [line for line in COMMANDS if not line.startswith("fastlstm ")]
FASTLSTM = [line for line in COMMANDS if line.startswith("fastlstm ")]


def run(command: list[str], folder: Path) -> str:
    """Run a command in a folder and return what it printed."""
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the README's Python has run, block after block in one namespace."""
    folder = tmp_path_factory.mktemp("readme")
    script = []
    for block in (block for block in BLOCKS if block.language == "python"):  # a traceback names the README's line
        if "import torch" in block.code and not find_spec("torch"):
            continue
        padded = "\n" * (block.line - 1) + block.code
        script.append(f"exec(compile({padded!r}, 'README.md', 'exec'))")
    run([sys.executable, "-W", "error", "-c", "\n".join(script)], folder)
    return folder


def test_every_block_is_run_by_a_test() -> None:
    assert {block.language for block in BLOCKS} == {"python", "sh"}
    assert README.read_text(encoding="utf-8").count("```") == 2 * len(BLOCKS)
    assert len(FASTLSTM) >= 5
    assert len(SET_UP) == 2


def test_python_runs(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir())[:2] == ["model.safetensors", "x.npy"]


@pytest.mark.parametrize("command", FASTLSTM, ids=lambda command: command.partition("#")[0].strip())
def test_command_runs(folder: Path, command: str) -> None:
    program, *arguments = shlex.split(command, comments=True)
    assert run([sys.executable, "-m", program, *arguments], folder)


def test_set_up_commands_are_those_of_continuous_integration() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    for command in SET_UP:
        assert command in script


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8")))
def test_link_leads_to_a_file(path: str) -> None:
    assert (ROOT / path).is_file()
