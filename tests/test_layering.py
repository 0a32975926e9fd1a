"""The shape of the source itself: imports go down only, and the rules of docs/design.md that can be checked by reading."""

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
PURE = {
    *("errors", "registry", "options", "shapes", "layout", "plan", "statistics", "criteria", "selection", "budget"),
    *("routing", "products", "triton_products", "native", "low_rank"),
    *("stand_ins", "definitions", "genetic", "allocation", "gate_rules"),
}
EDGE = {"cli", "report", "charts", "demo", "quality", "tasks", "pipeline", "vllm_plugin", "__main__"}
EDGE |= {"verify", "file_checks", "loops", "export", "engines", "engine_run", "gguf_run", "remote_code", "substitution"}
EDGE |= {"bench", "bench_run", "bench_page"}
HEAVY = {"transformers", "accelerate", "safetensors", "peft", "datasets", "vllm", "lm_eval"}
SHOWING = {"click", "rich", "typer", "matplotlib"}
FORBIDDEN_NAMES = {"utils", "helpers", "common", "base", "manager", "factory", "misc"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(SRC).with_suffix("").parts)


def is_pure(name: str) -> bool:
    return name in PURE or name.startswith("methods.")


def is_edge(name: str) -> bool:
    return name.split(".")[0] in EDGE or name.startswith(("report_", "expert_maps"))


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


def inside(modules: set[str]) -> set[str]:
    return {m[1:] for m in modules if m.startswith(".")}


files = pytest.mark.parametrize("path", FILES, ids=name_of)


@files
def test_imports_go_down_only(path):
    name = name_of(path)
    if is_pure(name):
        every = imports(path, top_level_only=False)
        assert not outside(every) & (HEAVY | SHOWING)
        assert all(is_pure(m) or m == "methods" for m in inside(every)), inside(every)
    elif not is_edge(name) and name != "__init__":
        top = imports(path, top_level_only=True)
        assert not {m for m in inside(top) if is_edge(m)}
        assert not outside(top) & SHOWING


def test_every_pure_module_is_there():
    assert {name_of(p) for p in FILES} >= PURE


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
    if name_of(path) != "families":
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
    for package in {"vllm", "triton"} & outside(imports(path, top_level_only=True)):
        pytest.importorskip(package)
    if name != "__main__":
        importlib.import_module("locum" if name == "__init__" else f"locum.{name.removesuffix('.__init__')}")
