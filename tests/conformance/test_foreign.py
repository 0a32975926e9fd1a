"""A throw-away package with entry points: one criterion, method, part, policy, way and export target, each in one file.

In a process of its own every conformance suite runs over them, and foreign_cases.py uses them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from making import foreign

TESTS = Path(__file__).parents[1]
# By entry-point group: the suite that everything of the kind must pass.
SUITES = {
    "locum.criteria": TESTS / "conformance" / "test_criteria.py",
    "locum.methods": TESTS / "conformance" / "test_methods.py",
    "locum.parts": TESTS / "conformance" / "test_parts.py",
    "locum.policies": TESTS / "conformance" / "test_parts.py",
    "locum.ways": TESTS / "training" / "test_ways.py",
    "locum.exports": TESTS / "conformance" / "test_export_targets.py",
}


@pytest.mark.journeys
def test_every_suite_passes_over_what_another_package_offers(tmp_path):
    site = foreign.install(tmp_path / "site")
    names = [name for name, _ in foreign.OFFERS.values()]
    # Names of tests end with what they are about: test_x[shift-swiglu].
    wanted = " or ".join(["foreign_cases", *(f"[{name}" for name in names), *(f"-{name}" for name in names)])
    files = dict.fromkeys([*map(str, SUITES.values()), str(TESTS / "conformance" / "foreign_cases.py")])
    line = [sys.executable, "-m", "pytest", "-v", "-v", "-p", "no:cacheprovider", "-k", wanted, *files]
    paths = os.pathsep.join([str(site), *(path for path in sys.path if path)])
    run = subprocess.run(
        line, cwd=TESTS.parent, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-5000:]
    assert set(SUITES) == set(foreign.OFFERS)
    passed = re.findall(r"^tests/\S*?(\w+\.py)::\S+ PASSED", run.stdout, flags=re.M)
    for group, (name, _) in foreign.OFFERS.items():
        own = re.findall(rf"{SUITES[group].name}::\S*[\[-]{name}\b\S* PASSED", run.stdout)
        assert len(own) >= 3, f"{group}: {SUITES[group].name} ran {len(own)} tests of {name}"
    assert passed.count("foreign_cases.py") >= 9
