"""What `locum list` and `locum show` say: columns that keep to the width of the terminal, with nothing cut off."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from typing import Any

import click

from .results import emit

WIDEST = 100
FULL = 105  # characters of a docstring's line, with the next word, that ends because that had no place


def show_catalogue(result: dict[str, dict[str, Any]], as_json: bool) -> None:
    """Of one kind a line for each name; of several their names."""

    def human(kinds: dict[str, dict[str, Any]]) -> None:
        rows = {kind: ", ".join(things) for kind, things in kinds.items()}
        if len(kinds) == 1:
            rows = {name: thing["summary"] for things in kinds.values() for name, thing in things.items()}
        click.echo(_columns(rows))
        click.echo(
            "\n"
            + _wrapped(
                f"locum list KIND (such as {next(iter(kinds))}) says a line of each; locum show NAME all of one", ""
            )
        )

    emit(result, as_json, human)


def show_descriptions(result: list[dict[str, Any]], as_json: bool) -> None:
    emit(result, as_json, lambda things: click.echo("\n\n".join(_description(thing) for thing in things)))


def _description(thing: dict[str, Any]) -> str:
    """A registered thing: what it is, its formula as it stands, facts and notes, options."""
    said = dict(thing)
    head, formula = f"{said.pop('kind')} {said.pop('name')}: {said.pop('summary')}", said.pop("formula")
    notes, options = said.pop("notes"), said.pop("options")
    rows = {key: ", ".join(value) if isinstance(value, list) else str(value) for key, value in (said | notes).items()}
    parts = [
        _wrapped(head),
        _indented(formula),
        _columns({key: value for key, value in rows.items() if value}),
    ]
    if options:
        parts.append("options\n" + _columns({_flag(name): _about(option) for name, option in options.items()}))
    return "\n\n".join(part for part in parts if part)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _about(option: dict[str, Any]) -> str:
    choices = f" ({', '.join(option['choices'])})" if "choices" in option else ""
    return f"{option['help']}{choices}  [default: {option['default']}]"


def _columns(rows: dict[str, str]) -> str:
    """Two columns; the second is wrapped under itself."""
    indent = max(map(len, rows), default=0) + 4
    return "\n".join(_wrapped(f"  {name:<{indent - 2}}{text}", " " * indent) for name, text in rows.items())


def _wrapped(text: str, indent: str = "    ", widest: int = WIDEST) -> str:
    """Text in lines that the terminal holds, the first of them as it begins, the others after `indent`."""
    width = min(shutil.get_terminal_size().columns, widest)
    keep = {"break_long_words": False, "break_on_hyphens": False, "replace_whitespace": False}
    return textwrap.fill(text, width, subsequent_indent=indent, **keep)


def _whole_lines(formula: str) -> list[str]:
    """The lines, those of one paragraph of text as one: a full line with the same indent before it means that it goes on."""
    found: list[str] = []
    last = 0  # characters of the line before, as it stands
    for line in formula.splitlines():
        indent = len(line) - len(line.lstrip())
        begins = re.match(r"[\d*-]+[.)]? ", line.lstrip())
        goes_on = bool(line.strip()) and last + 1 + len(line.split()[0]) >= FULL
        if goes_on and not begins and indent == len(found[-1]) - len(found[-1].lstrip()):
            found[-1] += " " + line.lstrip()
        else:
            found.append(line)
        last = len(line)
    return found


def _indented(formula: str) -> str:
    """Every line of a formula as it stands, wrapped only where the terminal is too narrow for it."""
    lines = (f"  {line}".rstrip() for line in _whole_lines(formula))
    return "\n".join(_wrapped(line, " " * (len(line) - len(line.lstrip()) + 4), sys.maxsize) for line in lines)
