"""Two commands set the package up anywhere: nothing pinned or written down is of one machine."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
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
SCRIPTS = [ROOT / "scripts" / name for name in ("demo", "docs", "lock", "notebooks", "test")]
SCRIPTS.append(ROOT / ".ci" / "run")


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


def test_classifiers_name_the_pythons_that_are_tested():
    workflow = (ROOT / ".github" / "workflows" / "test.yaml").read_text()
    tested = re.findall(r'"(3\.\d+)"', re.search(r"python: \[(.*)\]", workflow)[1])
    assert re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"])) == tested
    assert PROJECT["requires-python"] == f">={tested[0]}"


def test_entry_for_the_list_of_scverse_says_what_pyproject_says():
    entry = (ROOT / ".github" / "scverse-meta.yaml").read_text()
    fields = dict(re.findall(r"^(\w+): (\S+)$", entry, flags=re.MULTILINE))
    for field in ("name", "version", "license"):
        assert fields[field] == PROJECT[field]
    assert "http" not in re.sub(r"^#.*$", "", entry, flags=re.MULTILINE) or "urls" in PROJECT


@pytest.mark.slow
def test_wheel_and_sdist_can_be_uploaded_and_installed(tmp_path):
    def run(*command: object) -> str:
        done = subprocess.run(
            [str(word) for word in command], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    run(sys.executable, "-m", "hatchling", "build", "--directory", tmp_path)
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)

    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    install = ("install", "--quiet", "--no-deps", "--no-index", wheel)
    run(sys.executable, "-m", "pip", "--python", python, *install)
    code = "import scvi_sams; print(scvi_sams.__version__, 'SAMSVAE' in dir(scvi_sams))"
    assert run(python, "-I", "-c", code) == f"{PROJECT['version']} True"
    assert PROJECT["version"] in run(python.with_name("scvi-sams"), "--version")
