"""The shape of the source itself: the rules of docs/design.md that can be checked by reading. Imports: test_house.py."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import types
from pathlib import Path

import pytest

import locum

SRC = Path(locum.__file__).parent
FILES = sorted(SRC.rglob("*.py"))
FORBIDDEN_NAMES = {"utils", "helpers", "common", "base", "manager", "factory", "misc"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(SRC).with_suffix("").parts)


def imports(path: Path, top_level_only: bool) -> set[str]:
    """Imported modules: "torch.nn" for others, ".plan" for Locum's own (names imported from a package count too)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = list(path.relative_to(SRC).parts[:-1])
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if not node.level and node.module and node.module.split(".")[0] != "locum":
                found.add(node.module)
                continue
            above = package[: len(package) - (node.level - 1)] if node.level else []
            module = [*above, *(node.module or "").removeprefix("locum").strip(".").split(".")]
            origin = ".".join(part for part in module if part)
            found |= {f".{origin}"} if origin else set()
            for alias in node.names:
                full = f"{origin}.{alias.name}".strip(".")
                if (SRC / Path(*full.split("."))).with_suffix(".py").is_file() or (
                    SRC / full.replace(".", "/")
                ).is_dir():
                    found.add(f".{full}")
    return found


def outside(modules: set[str]) -> set[str]:
    return {m.split(".")[0] for m in modules if not m.startswith(".")}


files = pytest.mark.parametrize("path", FILES, ids=name_of)


def lengths(path: Path):
    """Lines of every function from its docstring on: a signature may declare as many options as a command has."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.body[0].lineno + 1


@files
def test_files_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
    assert {name: lines for name, lines in lengths(path) if lines > 60} == {}


@files
def test_no_module_is_named_for_leftovers(path):
    assert not FORBIDDEN_NAMES & set(path.relative_to(SRC).with_suffix("").parts)


@files
def test_no_decision_by_name(path):
    """What differs between families and methods is in their own rows and files."""
    text = path.read_text(encoding="utf-8")
    if path.stem != "families":
        assert not re.findall(
            r"\b(?:if|elif|while|and|or|not)\s+[^\n#]*\b(?:family|model_type)\b\s*(?:==|!=|in\b)", text
        )
    assert not re.findall(r"\b(?:if|elif)\s+[^\n#]*\bmethod\b\s*(?:==|!=|in\s*[(\[{])", text)


@files
def test_nothing_is_left_for_later(path):
    left = r"\b(?:raise NotImplementedError|TODO|FIXME|XXX|HACK)\b"
    assert not re.findall(left, path.read_text(encoding="utf-8"))


@files
def test_every_module_says_what_it_is(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "a module without a docstring"


def test_public_names_are_exact():
    assert list(locum.__all__) == sorted(
        locum.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name)
    )
    for name in locum.__all__:
        assert hasattr(locum, name)
    leaked = {
        name
        for name, value in vars(locum).items()
        if not name.startswith("_") and name not in locum.__all__ and not isinstance(value, types.ModuleType)
    }
    assert leaked == set()


def test_public_functions_and_classes_are_documented():
    for name in locum.__all__:
        value = getattr(locum, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name


@files
def test_every_module_imports_on_its_own(path):
    name = name_of(path)
    if name == "__main__":
        return
    try:
        importlib.import_module("locum" if name == "__init__" else f"locum.{name.removesuffix('.__init__')}")
    except ModuleNotFoundError as error:
        if error.name not in ("vllm", "triton"):  # which need not be installed
            raise
        pytest.skip(f"needs {error.name}")
