"""Two commands set the package up anywhere: nothing pinned or written down is of one machine."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import scvi_sams

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(pin.name): pin
    for pin in (
        Requirement(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
}
SCRIPTS = [ROOT / "scripts" / name for name in ("demo", "test", "lock")] + [ROOT / ".ci" / "run"]


def test_every_pin_is_one_released_version():
    for pin in PINS.values():
        assert pin.url is None
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert Version(specifier.version).local is None


def test_every_dependency_is_pinned_to_a_version_it_allows():
    extras = PROJECT["optional-dependencies"]
    wanted = [Requirement(text) for text in [*PROJECT["dependencies"], *sum(extras.values(), [])]]
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        # Pins are of the oldest Python, and annbatch takes a newer one.
        marker = requirement.marker
        is_for_oldest = marker is None or marker.evaluate({"python_version": "3.11"})
        if name != canonicalize_name(PROJECT["name"]) and is_for_oldest:
            (pin,) = PINS[name].specifier
            assert requirement.specifier.contains(pin.version), name


def test_one_version_everywhere():
    assert scvi_sams.__version__ == version("scvi-sams") == PROJECT["version"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, flags=re.MULTILINE)[1] == PROJECT["version"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_can_be_run_and_parse(script):
    assert script.stat().st_mode & 0o100
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_an_unsuitable_python_is_one_line():
    done = subprocess.run(
        ["bash", "-c", "source scripts/_environment.sh; PYTHON=no-such-python find_python"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: none of no-such-python is Python 3.11 or later")
