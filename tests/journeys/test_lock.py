"""The versions that `make demo` and `make test` install: whole, exact, allowed, and free of anything of one machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINS = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in LINES[1:])}


def requirements(project, extra=None):
    """What the project asks for, its own extras unfolded."""
    lines = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    for requirement in map(Requirement, lines):
        if requirement.name != project["name"]:
            yield requirement
        for name in requirement.extras if requirement.name == project["name"] else ():
            yield from requirements(project, name)


def test_every_line_is_one_exact_version():
    assert LINES[0].startswith("# ")
    for line in LINES[1:]:  # neither a path, nor a host, nor a build of one machine such as +cpu
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][0-9a-z.]*", line), line
    assert len(PINS) == len(LINES) - 1
    assert not PINS.keys() & {"pip", "setuptools", "locum"}


def test_the_lock_has_what_the_project_asks_for_in_an_allowed_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*requirements(project), *requirements(project, "dev")]
    assert {"torch", "transformers", "pytest", "lm-eval"} <= {requirement.name for requirement in asked}
    for requirement in asked:
        version = PINS.get(canonicalize_name(requirement.name))
        assert version and requirement.specifier.contains(version), f"{requirement} is locked as {version}: make lock"
    assert f"torch=={PINS['torch']}" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize("version, locked", [("3.11", True), ("3.12", False)])
def test_make_installs_from_the_lock_where_it_holds_and_says_so_where_not(version, locked, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {version}\n")
    python.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-n", f"VENV={tmp_path}", f"PYTHON={python}", f"{tmp_path}/.ready"]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert ("--editable '.[dev]' --constraint constraints.txt" in said) is locked
    assert ("is not Python 3.11, which constraints.txt is for" in said) is not locked
