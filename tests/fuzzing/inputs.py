"""One input, from the seed and its number alone: a copy of the world with something damaged, and a command line."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random

from . import json_damages, tensor_damages, text_damages  # noqa: F401 (they register their damages)
from .damages import damage
from .kinds import KINDS, OPTIONS, ROUND
from .values import oddities, typed


@dataclass(frozen=True)
class Input:
    """What is tried: the arguments of the command line, and what in them or in the files is damaged."""

    number: int
    kind: str
    arguments: tuple[str, ...]
    line: str  # the same command line as it works where nothing is damaged
    damaged: str  # in words

    @property
    def shown(self) -> str:
        """The command line as it can be typed."""
        return f"locum {shlex.join(self.arguments)}"


def kind_of(number: int) -> str:
    """The kind that an input is of."""
    return ROUND[number % len(ROUND)]


def lay_out(world: Path, place: Path) -> None:
    """A copy of the world, with what cannot be copied."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(world, place)
    oddities(place)


def make_input(seed: int, number: int, place: Path) -> Input:
    """Input `number` of a seed, carried out in `place`, a fresh copy of the world."""
    draw, kind = Random(f"{seed} {number}"), kind_of(number)
    if kind == OPTIONS:
        made = typed(draw)
        return Input(number, kind, made.arguments, made.line, made.words)
    reading = draw.choice(KINDS[kind])
    file, line = draw.choice(reading.files), draw.choice(reading.lines)
    content = "weights" if reading.content == "json" and file.endswith(".safetensors") else reading.content
    words = damage(place / file, content, draw)
    return Input(number, kind, tuple(shlex.split(line)), line, f"{file.rpartition('/')[0]}/{words}".lstrip("/"))
