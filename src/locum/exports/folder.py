"""A live model as an exported folder, with a card and notes that say which checkpoint it comes from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..checkpoints.application import save_checkpoint
from ..checkpoints.card import plain
from ..checkpoints.notes import notes_for_another, plan_of
from ..checkpoints.read import fingerprint_checkpoint
from ..files import provenance
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
    card = (
        f"---\nlibrary_name: transformers\ntags: [mixture-of-experts, compressed, locum]\n---\n# {plain(out.name)}\n\n"
        f"Written by Locum from {plain(model.name)}, {words}.\n"
    )
    save_checkpoint(live, tokenizer, out, None, card, model, _notes(model), write=write)


def _notes(model: Path) -> dict[str, Any]:
    theirs = {k: v for k, v in notes_for_another(model).items() if k.startswith("original")}
    plan = plan_of(model)
    says = {"fingerprint": fingerprint_checkpoint(model), "plan": None if plan is None else plan.id}
    return provenance(**theirs, exported_from=name_of(model), exported=says)
