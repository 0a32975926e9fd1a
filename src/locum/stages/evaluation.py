"""`evaluate`: loss, distance from the original and task scores of a checkpoint, as rows."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Annotated, Any

from .. import ranks
from ..checkpoints.notes import named_original, plan_of, read_notes
from ..checkpoints.read import load_tokenizer
from ..checkpoints.skeleton import active_parameters_in, check_vocabularies, expert_parameters_in, read_shape
from ..data.documents import parse_sources
from ..data.tokens import load_tokens
from ..errors import OptionError
from ..files import check_output, check_room, provenance
from ..measure.loss import MOST_RESAMPLES
from ..measure.loss import evaluate as evaluate_models
from ..measure.rows import Row, read_rows, write_rows
from ..measure.tasks import evaluate_tasks, find_tasks
from ..places import named_from
from ..plans.plan import Plan
from ..reports.card_results import open_card, write_card
from . import dry_run as dry_runs
from .estimate import Estimate
from .opening import Precision, Stream, dtype_of, is_to_stream, open_to_run
from .options import (
    BatchSize,
    Counted,
    Data,
    Device,
    DryRun,
    Force,
    Help,
    Length,
    Progress,
    Seed,
    alone,
    check_number,
    device_of,
    silent,
)
from .planning import statistics_behind
from .recovery import LOG

ROWS = 2**20  # bytes, more than rows take
logger = logging.getLogger(__name__)


@alone
def evaluate(
    model: Path,
    *,
    data: Data = (),
    tasks: Annotated[str | None, Help("lm-eval tasks to score, separated by commas")] = None,
    task_path: Annotated[Path | None, Help("folder with further lm-eval task files")] = None,
    limit: Annotated[int | None, Help("items per task; default: all of them")] = None,
    against: Annotated[Path | None, Help("the original; default: as the checkpoint's notes say")] = None,
    out: Annotated[
        Path | None, Help("write the rows to this results file (JSON lines), which locum report reads")
    ] = None,
    append: Annotated[bool, Help("add the rows to a results file that exists")] = False,
    card: Annotated[
        bool, Help("write what was lost into the model card of MODEL too, for hubs and for people")
    ] = False,
    split: Annotated[str, Help("train, validation, test or all of the documents")] = "test",
    tokens: Annotated[int | None, Help("limit of tokens; default: all of them")] = None,
    length: Length = 256,
    batch_size: BatchSize = 8,
    resamples: Annotated[int, Help("bootstrap resamples behind the intervals")] = 1000,
    name: Annotated[str | None, Help("what to call the model in the results; default: its folder")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    stream: Stream = None,
    precision: Precision = "auto",
    force: Force = False,
    dry_run: DryRun = False,
    progress: Progress = silent,
    json: Path | None = None,
) -> list[Row] | Estimate:
    """Loss, bits per byte and perplexity per domain, and distance from the original, with 95% intervals; the same for
    what the model scores on tasks with gold answers."""
    model = Path(model)
    _check_asked(data, tasks, task_path, limit, dry_run)
    if json is not None:
        logger.warning("evaluate(json=FILE) is out=FILE, append=True now")
        out, append = json, True
    out = _checked_output(out, append, force, [model, against])
    if card:
        open_card(model)
    check_number("batch-size", batch_size, 1)
    check_number("resamples", resamples, 1, MOST_RESAMPLES)
    device = device_of(device)
    read_shape(model)
    notes = read_notes(model)
    against = _original(model, notes) if against is None else against
    if against is not None:
        read_shape(against)
        check_vocabularies(model, against)
    tokenizer = load_tokenizer(model)
    asked = find_tasks(tasks, task_path) if tasks is not None else {}
    blocks = None
    if data:
        blocks = load_tokens(data, tokenizer, split=split, length=length, tokens=tokens, seed=seed, keep_partial=True)
    dtype = dtype_of(precision)
    streamed = is_to_stream([model, *([] if against is None else [against])], stream, device, dtype)
    _check_whole(asked, streamed)
    if dry_run:
        models = [(Path(path), read_shape(path)) for path in (model, against) if path is not None]
        return dry_runs.of_evaluation(models, blocks, dry_runs.Running(device, dtype, streamed, batch_size), out)
    live = open_to_run(model, streamed, device, dtype=dtype)
    original = None if against is None else open_to_run(against, streamed, device, dtype=dtype)
    called = name or model.resolve().name
    plan = plan_of(model)
    shared = {
        "against": original,
        "batch_size": batch_size,
        "seed": seed,
        "resamples": resamples,
        "model_name": called,
        "plan": None if plan is None else plan.id,
    }
    rows = []
    if blocks is not None:
        made = provenance(data_fingerprint=blocks.fingerprint, split=split, precision=precision)
        told = Counted(progress, "eval", len(blocks), blocks.length)
        shown = {"progress": told.blocks, "on_layer": told.layers}
        rows += evaluate_models(live, blocks, **shared, **shown, provenance=made)
    if asked:
        rows += evaluate_tasks(live, tokenizer, asked, limit=limit, **shared, provenance=provenance())
    beside = None if out is None else out.parent
    said = {called: about(model, plan, notes, beside)}
    if against is not None:
        said["original"] = about(Path(against), None, {}, beside)
    rows = [dataclasses.replace(row, provenance={**row.provenance, **said[row.model]}) for row in rows]
    if out is not None and ranks.is_first():
        write_rows(out, rows, append)
    if card and ranks.is_first():
        write_card(model, called, rows)
    return rows


def _checked_output(out: Path | None, append: bool, force: bool, inputs: list[Path | None]) -> Path | None:
    if append and out is None:
        raise OptionError("--append adds rows to a results file; name it with --out")
    if out is not None:
        out = check_output(out, force or append, inputs=inputs)
        check_room(out, ROWS)
        if append and out.exists():
            read_rows(out)  # only to results can rows be added
    return out


def _check_whole(tasks: dict[str, Any], streamed: bool) -> None:
    """Tasks want one whole model."""
    if tasks and ranks.count() > 1:
        raise OptionError("tasks are scored by one process: leave torchrun out, or --tasks")
    if tasks and streamed:
        raise OptionError("tasks are scored on whole models: give --no-stream, or leave --tasks out")


def _check_asked(data: Any, tasks: str | None, task_path: Path | None, limit: int | None, dry_run: bool) -> None:
    if dry_run and tasks is not None:
        raise OptionError("--dry-run measures passes over text; leave --tasks out, and give --data")
    if not data and tasks is None:
        raise OptionError("nothing to evaluate on; give --data (text), --tasks (questions with answers), or both")
    if data:
        parse_sources(data)
    if tasks is None and (task_path is not None or limit is not None):
        raise OptionError("--task-path and --limit are about tasks; name some with --tasks")
    if limit is not None:
        check_number("limit", limit, 1)


def _original(model: Path, notes: dict[str, Any]) -> Path | None:
    """The original that a checkpoint's notes name, with a word where it is not there as it was."""
    found = named_original(model)
    if found.place is None and "original" in notes:
        why = "is not there" if found.other is None else f"has changed since, or is another ({found.other})"
        logger.warning(
            "the original of %s, %s, %s: nothing is compared; name it with --against", model, notes["original"], why
        )
    return found.place


def about(model: Path, plan: Plan | None, notes: dict[str, Any], beside: Path | None) -> dict[str, Any]:
    """What a results row says of the checkpoint behind it, so that reports find sizes and pictures: files as a results
    file in the folder `beside` names them."""
    shape, folder = read_shape(model), named_from(model, beside)
    statistics = None if plan is None else statistics_behind(plan, Path(os.path.abspath(model)).parent)
    said = {
        "checkpoint": folder,
        "parameters": shape.parameters,
        "bytes": shape.bytes,
        "expert_parameters": expert_parameters_in(model, shape),
        "active_parameters": active_parameters_in(model, shape),
        "stage": "original" if plan is None else "recovered" if "recovery" in notes else "compressed",
        "method": None if plan is None else plan.method,
        "plan_file": f"{folder}/plan.json" if plan is not None else None,
        "recovery_log": f"{folder}/{LOG}" if (model / LOG).is_file() else None,
        "statistics_file": None if statistics is None else named_from(statistics, beside),
    }
    return {key: value for key, value in said.items() if value is not None}
