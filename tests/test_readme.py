"""The README does what it says: its Python blocks run, its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from scvi_sams.cli import build_parser, main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def _commands() -> list[list[str]]:
    """Words of every command of the shell blocks, without prompts, output and comments."""
    text = "".join(_blocks("(?:bash|sh|shell|console)")).replace("\\\n", " ")
    lines = (line.strip().removeprefix("$ ") for line in text.splitlines())
    return [
        shlex.split(line, comments=True)
        for line in lines
        if line.startswith(("scvi-sams ", "./scripts/", ".ci/"))
    ]


@pytest.mark.slow
def test_python_blocks_run_one_after_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    blocks = _blocks("python")
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


@pytest.mark.parametrize("words", _commands(), ids=" ".join)
def test_commands_exist_and_take_these_arguments(words):
    if words[0] == "scvi-sams":
        build_parser().parse_args(words[1:])
        return
    assert (ROOT / words[0]).stat().st_mode & 0o100, f"{words[0]} cannot be run"
    if words[0] == "./scripts/demo" and len(words) > 1:
        output = [] if {"-o", "--output"}.intersection(words) else ["-o", "demo_output"]
        build_parser().parse_args(["fit", *words[1:], *output])


@pytest.mark.slow
def test_commands_on_the_simulated_screen_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outputs = set()
    for words in _commands():
        if words[0] == "scvi-sams" and (words[2] == "simulated" or words[2] in outputs):
            arguments = build_parser().parse_args(words[1:])
            assert main(words[1:]) == 0, " ".join(words)
            outputs.add(str(arguments.output))
