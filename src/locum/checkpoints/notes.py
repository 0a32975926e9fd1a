"""What Locum wrote beside a checkpoint when it made it: notes, plan, and where the original is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CheckpointError, OptionError
from ..files import NOTES
from ..plans.plan import Plan
from ..plans.plan_file import load_plan
from ..shapes import ModelShape
from .inside import read_json
from .read import fingerprint_checkpoint

# What Locum reads of its own notes.
KINDS = {
    **dict.fromkeys(("original", "original_fingerprint", "plan", "recovered_from"), str),
    **dict.fromkeys(("original_shape", "adapter", "recovery"), dict),
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


def plan_of(model: Path) -> Plan | None:
    path = Path(model) / "plan.json"
    return load_plan(path) if path.is_file() else None


def original_of(model: Path, given: Path | None, why: str) -> Path:
    """The original of a compressed checkpoint: as given, or as its notes say, provided it is still the same."""
    notes = read_notes(model)
    path = given if given is not None else notes.get("original")
    if path is None or (given is None and not Path(path).is_dir()):
        gone = f" (it was made from {path}, which is not there)" if path else ""
        raise OptionError(f"{why} of {model}{gone}; name the original checkpoint with --original")
    made_from, is_now = notes.get("original_fingerprint"), fingerprint_checkpoint(path)
    if made_from not in (None, is_now):
        raise CheckpointError(
            f"{path} is not what {model} was made from, or has changed since (fingerprint {is_now}, then {made_from}); "
            f"name the right one with --original"
        )
    return Path(path)
