"""What Locum wrote beside a checkpoint when it made it: notes, plan, and where the original is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, OptionError
from ..files import NOTES
from ..places import Found, find, remember
from ..plans.plan import Plan
from ..plans.plan_file import load_plan
from ..shapes import ModelShape
from .inside import read_json
from .read import fingerprint_checkpoint

# What Locum reads of its own notes.
KINDS = {
    **dict.fromkeys(("original", "original_fingerprint", "plan", "recovered_from"), str),
    **dict.fromkeys(("original_shape", "adapter", "recovery", "rest"), dict),
    "seed": int,
}
WORDS = {str: "text", dict: "an object", int: "a whole number"}


def read_notes(model: Path) -> dict[str, Any]:
    """What Locum wrote about a checkpoint when it made it; empty for any other checkpoint."""
    path = Path(model) / NOTES
    notes = read_json(path) if path.is_file() else {}
    for name, kind in KINDS.items():
        if name in notes and not isinstance(notes[name], kind):
            raise CheckpointError(
                f"{path}: {name!r} is {notes[name]!r:.60}, not {WORDS[kind]}; restore what Locum wrote, or remove the entry"
            )
    if "original_shape" in notes:
        try:
            ModelShape.from_json(notes["original_shape"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: 'original_shape' is no shape ({error!r}); restore what Locum wrote"
            ) from error
    return notes


def notes_for_another(model: Path) -> dict[str, Any]:
    """The notes of a checkpoint for one that is made of it; from there their names lead to the same original."""
    notes = read_notes(model)
    found = named_original(model).place
    if found is not None and "original_fingerprint" in notes:
        remember(notes["original_fingerprint"], found)
    return notes


def plan_of(model: Path) -> Plan | None:
    path = Path(model) / "plan.json"
    return load_plan(path) if path.is_file() else None


def named_original(model: Path) -> Found:
    """Where the original is that a checkpoint's notes name: beside the checkpoint, or where it was last seen."""
    notes = read_notes(model)
    beside = Path(os.path.abspath(model)).parent
    return find(notes.get("original", ""), notes.get("original_fingerprint"), beside, fingerprint_checkpoint)


def original_of(model: Path, given: Path | None, why: str) -> Path:
    """The original of a compressed checkpoint: as given, or as its notes say, provided it is still the same."""
    notes = read_notes(model)
    found = named_original(model) if given is None else Found(Path(given))
    if (path := found.place or found.other) is None:
        named = notes.get("original")
        gone = f" (it was made from {named}, which is not beside it or where it was last seen)" if named else ""
        raise OptionError(f"{why} of {model}{gone}; name the original checkpoint with --original")
    made_from, is_now = notes.get("original_fingerprint"), fingerprint_checkpoint(path)
    if made_from not in (None, is_now):
        raise CheckpointError(
            f"{path} is not what {model} was made from, or has changed since (fingerprint {is_now}, then {made_from}); "
            f"name the right one with --original"
        )
    if made_from is not None:
        remember(made_from, path)
    return path
