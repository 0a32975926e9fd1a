"""What `import locum` offers, how it is typed, and what importing it does not do."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import subprocess
import sys
import typing

import pytest

import locum
from locum import errors

PUBLIC = """
    METHODS Base CheckpointError DataError EngineError LayerPlan LayerShape LocumError ModelShape OptionError OutputError Plan
    PlanError Slot StandInExperts Statistics StatisticsError UnsupportedModel apply bench calibrate catalogue clean compare compress demo
    diff evaluate export frontier inspect load_adapter load_model load_plan load_statistics make_plan optimize plan read_shape recover report save_plan save_statistics
    search show stand_in verify
"""
OPTIONAL = {
    "locum.engines.vllm_plugin": "vllm",
    "locum.kernels.triton_grouped": "triton",
    "locum.kernels.triton_packed": "triton",
    "locum.kernels.triton_ways": "triton",
}
LEFT_OUT = {"locum.__main__", *(name for name, needed in OPTIONAL.items() if not importlib.util.find_spec(needed))}
MODULES = sorted(m.name for m in pkgutil.walk_packages(locum.__path__, "locum.") if m.name not in LEFT_OUT)


def test_the_public_names_are_frozen():
    assert locum.__all__ == PUBLIC.split()
    for name in locum.__all__:
        assert hasattr(locum, name)


def test_functions_stay_functions_whatever_is_imported():
    """Modules and functions share names (locum.plan); importing a module must not put it in its function's place."""
    for name in MODULES:
        importlib.import_module(name)
    for name in locum.__all__:
        assert not inspect.ismodule(getattr(locum, name)), name


@pytest.mark.parametrize("name", [name for name in locum.__all__ if inspect.isroutine(getattr(locum, name))])
def test_every_function_is_typed_and_described(name):
    function = getattr(locum, name)
    hints = typing.get_type_hints(function)
    assert "return" in hints
    assert set(inspect.signature(function).parameters) <= set(hints), name
    if name not in ("load_plan", "load_statistics", "save_plan"):  # their names say all
        assert inspect.getdoc(function), name


@pytest.mark.parametrize("name", [name for name in locum.__all__ if inspect.isclass(getattr(locum, name))])
def test_every_class_is_described(name):
    item = getattr(locum, name)
    assert item.__doc__ and not item.__doc__.startswith(f"{item.__name__}("), name  # not the one dataclass writes


def test_there_is_one_tree_of_errors():
    found = {item for item in vars(errors).values() if inspect.isclass(item) and issubclass(item, Exception)}
    assert {item for item in found if not issubclass(item, locum.LocumError)} == set()
    assert {item.__name__ for item in found} <= set(locum.__all__)
    for item in found:
        assert item.__name__ in errors.__doc__


def test_every_module_says_what_it_is():
    for name in MODULES:
        assert importlib.import_module(name).__doc__, name


NO_NETWORK = """
import os, socket
def refuse(*arguments, **options):
    raise AssertionError("importing locum went to the network")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
os.environ.pop("HF_HUB_OFFLINE", None)
import locum, locum.cli
import sys
assert "matplotlib" not in sys.modules
assert "lm_eval" not in sys.modules
assert "vllm" not in sys.modules
"""


@pytest.mark.journeys
def test_importing_takes_no_network():
    run = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", NO_NETWORK], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert run.stderr == ""
