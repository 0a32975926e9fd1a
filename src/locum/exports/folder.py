"""A live model as an exported folder, with a card and notes that say which checkpoint it comes from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoints.application import save_checkpoint
from ..checkpoints.card import head_of, plain, what_it_is_from
from ..checkpoints.card_data import card_data
from ..checkpoints.notes import notes_for_another, plan_of
from ..checkpoints.read import fingerprint_checkpoint
from ..files import provenance
from ..models.families import opening_class
from ..models.stored import write_model
from ..places import name_of


def save_folder(
    live: PreTrainedModel,
    tokenizer: Any,
    model: Path,
    out: Path,
    words: str,
    write: Callable[[PreTrainedModel, Path], None] = write_model,
) -> None:
    """Write what became of the checkpoint `model`, whole or not at all. `words` go on from "Written by Locum from it,"."""
    card, notes = describe(live.config, model, out, words)
    save_checkpoint(lambda folder: write(live, folder), tokenizer, out, None, card, model, notes)


def describe(config: PreTrainedConfig, model: Path, out: Path, words: str) -> tuple[str, dict[str, Any]]:
    """The card and the notes of a folder `out` that is written from the checkpoint `model`."""
    data, notes = card_data(model, opening_class(config)), _notes(model)
    lines = [head_of(data), f"# {plain(out.name)}", "", f"Written by Locum from {plain(name_of(model))}, {words}.", ""]
    return "\n".join([*lines, *what_it_is_from(data, notes.get("original", name_of(model))), ""]), notes


def _notes(model: Path) -> dict[str, Any]:
    theirs = {k: v for k, v in notes_for_another(model).items() if k.startswith("original")}
    plan = plan_of(model)
    says = {"fingerprint": fingerprint_checkpoint(model), "plan": None if plan is None else plan.id}
    return provenance(**theirs, exported_from=name_of(model), exported=says)
