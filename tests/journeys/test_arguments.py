"""What Python hands to a public function: natural forms work, and what has none is one line, before any work."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch

import locum
from locum.arguments import in_declared_forms
from locum.errors import OptionError

COMMANDS = """apply bench calibrate catalogue clean compare compress demo diff evaluate export frontier inspect plan recover report
    search show verify"""
FREE = ("progress", "options")  # a callable, and options that are checked where they are declared


@dataclass(frozen=True)
class Thing:
    name: str = "thing"


@in_declared_forms
def toy(
    model: Path,
    *,
    share: float | None = None,
    count: Annotated[int, "help"] = 3,
    words: Annotated[str | None, "help"] = None,
    flag: bool = False,
    sizes: Sequence[int] = (1, 8),
    things: Sequence[Path | Thing] | Thing = (),
    data: Sequence[str | Path] | Mapping[str, Any] = (),
    **options: Any,
) -> dict[str, Any]:
    return {**locals(), **options}


@pytest.mark.parametrize(
    ("name", "given", "taken"),
    [
        ("model", "a/b", Path("a/b")),
        ("share", None, None),
        ("share", 1, 1.0),
        ("share", np.float32(0.5), 0.5),
        ("share", Fraction(1, 4), 0.25),
        ("count", np.int64(4), 4),
        ("words", 4, "4"),
        ("words", torch.device("cuda", 1), "cuda:1"),
        ("words", np.int64(4), "4"),
        ("words", 0.5, "0.5"),
        ("words", [0.25, 0.5], "0.25,0.5"),
        ("words", ("prune", "mone"), "prune,mone"),
        ("sizes", 1, (1,)),
        ("sizes", [1, 2], (1, 2)),
        ("sizes", np.array([1, 2]), (1, 2)),
        ("sizes", range(2), (0, 1)),
        ("things", "a", (Path("a"),)),
        ("things", Thing(), (Thing(),)),
        ("things", ["a", Thing()], (Path("a"), Thing())),
        ("data", "a.txt", ("a.txt",)),
        ("data", Path("a.txt"), (Path("a.txt"),)),
        ("data", (name for name in ("a", "b")), ("a", "b")),
        ("data", {"a": "a.txt"}, {"a": "a.txt"}),
        ("more", [1], [1]),
    ],
)
def test_natural_forms_become_the_declared_ones(name: str, given: Any, taken: Any) -> None:
    found = toy(**{"model": "m", name: given})[name]
    assert (found, type(found)) == (taken, type(taken))


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("model", 3, "model is 3; it takes a path"),
        ("model", None, "model is None; it takes a path"),
        ("share", "0.5", "--share is '0.5'; it takes a number"),
        ("share", True, "--share is True; it takes a number"),
        ("count", 2.0, "--count is 2.0; it takes a whole number"),
        ("words", True, "--words is True; it takes text"),
        ("words", [object()], "--words is"),
        ("words", object(), "--words is a object; it takes text"),
        ("flag", 1, "--flag is 1; it takes true or false"),
        ("sizes", "1,8", "--sizes is '1,8'; it takes a whole number or several"),
        ("sizes", [1, "x" * 200], "...; it takes"),
        ("things", 3, "--things is 3; it takes a path or several or a Thing or several"),
        ("data", None, "--data is None; it takes text or several"),
    ],
)
def test_what_has_no_form_is_refused(name: str, given: Any, words: str) -> None:
    with pytest.raises(OptionError) as caught:
        toy(**{"model": "m", name: given})
    assert words in str(caught.value)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


PARAMETERS = [
    (name, parameter.name)
    for name in COMMANDS.split()
    for parameter in inspect.signature(getattr(locum, name)).parameters.values()
    if parameter.name not in FREE
]


def test_the_commands_are_what_is_public() -> None:
    """Other functions take a thing of Locum's own, or a path, and no option."""
    others = {"load_adapter", "load_model", "load_plan", "load_statistics", "make_plan", "optimize", "read_shape"}
    others |= {"save_plan", "save_statistics", "stand_in"}
    assert {name for name in locum.__all__ if inspect.isroutine(getattr(locum, name))} == {*COMMANDS.split(), *others}


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS, ids=[f"{f}-{p}" for f, p in PARAMETERS])
def test_every_argument_of_every_command_is_checked(name: str, parameter: str, tmp_path: Path, monkeypatch) -> None:
    """Whatever it is given: an error of Locum's own that names it, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    declared = inspect.signature(getattr(locum, name)).parameters
    needed = [p.name for p in declared.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    for wrong in (object(), [object()], b"bytes", 1j):
        with pytest.raises(OptionError, match=parameter.replace("_", "-")):
            getattr(locum, name)(**{**dict.fromkeys(needed, "m"), parameter: wrong})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "right"), [("remov", "--remove"), ("modell", "--model"), ("scor", "--score"), ("bit", "--bits")]
)
def test_a_name_that_is_nearly_right_may_be_the_commands(statistics_file: Path, wrong: str, right: str) -> None:
    with pytest.raises(OptionError, match=f"method prune has no option '--{wrong}': did you mean '{right}'") as caught:
        locum.plan(statistics_file, method="prune", **{wrong: 0.5})
    assert "--remove" not in str(caught.value).partition("allowed:")[2]  # of the method


@pytest.mark.parametrize("bits", [4, "4", np.int64(4)])
def test_bits_are_numbers_or_names(statistics_file: Path, bits: Any) -> None:
    made = locum.plan(statistics_file, method="prune", remove=0.5, bits=bits, quantiser="nearest")
    assert {part.format for layer in made.layers for slot in layer.slots for part in slot.parts} == {"int4-g32"}


def test_sizes_may_be_numbers(statistics_file: Path) -> None:
    whole = locum.plan(statistics_file, method="prune", fit="1GiB")
    assert locum.plan([statistics_file], method="prune", fit=2**30).layers == whole.layers
