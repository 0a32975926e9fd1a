"""The order of the house: every import points to the same room or to one above it in this list, also inside functions."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from pathlib import Path

import locum

ROOMS = """errors options arguments registry json_text ranks cache places files runs shapes bundled; stats data; formats kernels; experts; plans;
    criteria budgets methods; containers; models checkpoints; measure training reports; stages;
    engines exports verification speed; demonstration registries cli __init__ __main__"""
SRC = Path(locum.__file__).parent
FILES = {".".join(path.relative_to(SRC).with_suffix("").parts): path for path in sorted(SRC.rglob("*.py"))}
MODULES = {name.removesuffix(".__init__") for name in FILES}


def imports(name: str) -> list[tuple[str, str]]:
    """(module of Locum, name taken from it or "") of every import of a file; `import locum` alone is what a user writes."""
    found = []
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(a.name.removeprefix("locum."), "") for a in node.names if a.name.startswith("locum.")]
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "locum"):
            above = name.split(".")[: -node.level] if node.level else []
            origin = ".".join([*above, *(node.module or "").split(".")]).removeprefix("locum").strip(".")
            for alias in node.names:
                inner = f"{origin}.{alias.name}".strip(".")
                found.append((inner, "") if inner in MODULES else (origin, alias.name))
    return found


def test_imports_keep_the_order_of_the_house():
    edges = [(name, module, taken) for name in FILES for module, taken in imports(name)]
    place = {room: index for index, room in enumerate(ROOMS.replace(";", " ").split())}
    assert {name.split(".")[0] for name in FILES} == set(place), "a room is missing from the list, or is no more"
    upward = [(a, b) for a, b, _ in edges if place[(b or "__init__").split(".")[0]] > place[a.split(".")[0]]]
    private = [(a, b, taken) for a, b, taken in edges if taken.startswith("_") or b.split(".")[-1].startswith("_")]
    graph = {name: {b for a, b, _ in edges if a == name and b != name.removesuffix(".__init__")} for name in FILES}
    circle = next(iter(circles({name.removesuffix(".__init__"): after for name, after in graph.items()})), [])
    print(f"circles {bool(circle):d}, upward imports {len(upward)}, private imports across files {len(private)}")
    assert (circle, upward, private) == ([], [], []), (circle, upward, private)


HOUSE = {
    **{"T": "tokens", "K": "top-k", "P": "pairs (token, expert)", "Q": "pairs of ", "E": "experts", "D": "model width"},
    **{"F": "expert width", "G": "2F with a gate", "R": "rank", "N": "stacked items", "L": "layers", "V": "vocabulary"},
    **{"B": "blocks", "S": "tokens of a block", "C": "candidates", "Z": "domains"},
}


def test_letters_of_shapes_mean_one_thing():
    legends = {
        name: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for name, path in FILES.items()
    }
    said = [
        (name, letter, meaning)
        for name, text in legends.items()
        for letter, meaning in re.findall(r"\b([A-Z]) ([^,]+)", " ".join(text.partition("Letters: ")[2].split()))
    ]
    assert len(said) > 200
    assert [x for x in said if x[1] in HOUSE and not x[2].startswith(HOUSE[x[1]].partition(",")[0])] == []
    design = " ".join((SRC.parents[1] / "docs" / "design.md").read_text(encoding="utf-8").split())
    assert [letter for letter, meaning in HOUSE.items() if f"`{letter}` {meaning}" not in design] == []


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [error.args[1]]
    return []


def test_json_is_read_in_one_place():
    """`json.loads` alone ends in a traceback for deep text. The scripts that engines' own interpreters run have no Locum."""
    reads = {name for name, path in FILES.items() if re.search(r"\bjson\.loads?\(", path.read_text(encoding="utf-8"))}
    assert reads == {"json_text", "engines.run", "engines.timing"}


def test_names_shadow_nothing():
    leaves = {name.removesuffix(".__init__").split(".")[-1] for name in FILES} - {"__init__", "__main__"}
    assert not leaves & sys.stdlib_module_names, "a module of the standard library has this name"
    assert not {name for name in locum.__all__ if name in MODULES}, "a function hides the module of its name"
