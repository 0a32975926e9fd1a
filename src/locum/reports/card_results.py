"""What was measured of a checkpoint, in its own model card: in the head as hubs read it, and as a table for people.

The head holds the numbers; the table is made from it, so what one evaluation wrote stays beside what the next one adds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..checkpoints.card import lost_section, plain, with_section
from ..checkpoints.card_data import CARD, result
from ..checkpoints.notes import plan_of, read_notes
from ..errors import CheckpointError, OptionError
from ..files import NOTES, check_place, write_text
from ..measure.rows import Row
from .models import ALL

WORDS = {"loss": "loss, nats per token", "bits_per_byte": "bits per byte", "perplexity": "perplexity"}
BESIDE = ("kl", "top1_agreement")  # distances from the original, which are said beside the loss
NEVER, UNKNOWN = "never seen", "not known"


def open_card(model: Path) -> ModelCard:
    """The card of a checkpoint. Raises for one that Locum did not make, and for a card that cannot be read."""
    card = model / CARD
    if not (model / NOTES).is_file() or not card.is_file():
        raise OptionError(
            f"--card writes into the card of a checkpoint that Locum made, and {model} has none; leave it out"
        )
    check_place(card)
    try:
        return ModelCard(card.read_text(encoding="utf-8"))
    except Exception as error:  # YAML that somebody edited
        said = str(error).split("\n")[0]
        raise CheckpointError(
            f"the metadata of {card} cannot be read ({said}); mend it, or leave --card out"
        ) from error


def write_card(model: Path, name: str, rows: Sequence[Row]) -> None:
    """Put the rows that are of `name` into the card of a checkpoint, in place of older ones of the same text."""
    card = open_card(model)
    results = _merged(card.data.eval_results or [], eval_results(name, rows))
    card.data.model_name, card.data.eval_results = card.data.get("model_name") or name, results
    card.text = with_section(card.text, lost_section(table_of(results, seen_by(model))))
    write_text(model / CARD, str(card))


def eval_results(name: str, rows: Sequence[Row]) -> list[EvalResult]:
    """Rows of a model as a hub's results, each with the original's value beside it where that was measured."""
    theirs = {(row.domain, row.metric): row.value for row in rows if row.model != name}
    ours = [row for row in rows if row.model == name and math.isfinite(row.value)]
    deltas = {row.domain: row for row in ours if row.metric == "loss_delta"}
    found = []
    for row in ours:
        if row.metric.endswith("_delta") or row.metric in BESIDE:
            continue
        more: dict[str, Any] = {"original": theirs.get((row.domain, row.metric)), "low": row.low, "high": row.high}
        if row.metric == "loss" and (delta := deltas.get(row.domain)):
            more |= {"change": delta.value, "change_low": delta.low, "change_high": delta.high}
        split = str(row.provenance.get("split", "test"))
        settings, words = row.provenance.get("evaluation"), WORDS.get(row.metric, row.metric)
        task = isinstance(settings, dict) and "task" in settings
        found.append(result(row.domain, split, row.metric, row.value, words, task, **more))
    return found


def _merged(old: Iterable[EvalResult], new: list[EvalResult]) -> list[EvalResult]:
    def key(x: EvalResult) -> tuple[Any, ...]:
        return tuple(map(str, (*x.unique_identifier, x.metric_type)))

    return list(({key(x): x for x in old} | {key(x): x for x in new}).values())


# --- the table --------------------------------------------------------------------------------------------------------


def seen_by(model: Path) -> dict[str, str] | None:
    """Which domains calibration or training saw, by name, in words; None where that is not known."""
    plan, recovery = plan_of(model), read_notes(model).get("recovery") or {}
    calibrated = None if plan is None else plan.provenance.get("domains")
    if plan is not None and calibrated is None and "data_fingerprint" in plan.provenance:  # of an earlier version
        return None
    seen: dict[str, list[str]] = {}
    for words, domains in (("calibration", calibrated), ("training", recovery.get("domains"))):
        for domain in domains if isinstance(domains, list) else ():
            seen.setdefault(str(domain), []).append(words)
    return {domain: f"seen by {' and '.join(by)}" for domain, by in seen.items()}


def table_of(results: Sequence[EvalResult], seen: dict[str, str] | None) -> list[str]:
    """Loss and bits per byte per domain, the original's first; then whatever else was scored."""
    texts: dict[tuple[str, str], dict[str, EvalResult]] = {}
    for x in results:
        key = str(x.dataset_config or x.dataset_name), str(x.dataset_split or "")
        texts.setdefault(key, {})[str(x.metric_type)] = x
    lines = []
    measured = {key: found for key, found in texts.items() if "loss" in found and "before" not in _args(found["loss"])}
    if measured:
        lines += [
            "| domain | split | seen | loss, original | this | change | bits per byte, original | this |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [_line(domain, split, found, seen) for (domain, split), found in measured.items()]
    others = [x for key, found in texts.items() if key not in measured for x in found.values()]
    if others:
        lines += ["", "| measured on | metric | before, or original | this |", "|---|---|---|---|"]
        for x in others:
            beside = _args(x).get("original", _args(x).get("before"))
            words = (x.dataset_name, x.metric_type, _number(beside), _number(x.metric_value))
            lines.append(f"| {' | '.join(plain(word) for word in words)} |")
    return lines


def _line(domain: str, split: str, found: dict[str, EvalResult], seen: dict[str, str] | None) -> str:
    mark = "" if domain == ALL else UNKNOWN if seen is None else seen.get(domain, NEVER)
    loss, bits = found.get("loss"), found.get("bits_per_byte")
    cells = [domain, split, mark]
    cells += [_number(_args(loss).get("original")), _number(loss and loss.metric_value), _change(_args(loss))]
    cells += [_number(_args(bits).get("original")), _number(bits and bits.metric_value)]
    return f"| {' | '.join(plain(cell) for cell in cells)} |"


def _change(args: dict[str, Any]) -> str:
    change, ends = args.get("change"), [args.get("change_low"), args.get("change_high")]
    if not isinstance(change, (int, float)):
        return ""
    return f"{change:+.4f}" + ("" if None in ends else f" ({_number(ends[0])} to {_number(ends[1])})")


def _args(found: EvalResult | None) -> dict[str, Any]:
    args = None if found is None else found.metric_args
    return args if isinstance(args, dict) else {}


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else "" if value is None else str(value)
