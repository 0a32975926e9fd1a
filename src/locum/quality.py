"""The stages after compression: recover, evaluate, report, and the demonstration of them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from . import artefacts, checkpoint
from .adapter import adapter_notes, base_of, write_adapter
from .apply import save_checkpoint
from .card import model_card
from .data import load_tokens
from .documents import parse_sources
from .errors import CheckpointError, OptionError, PlanError
from .evaluate import Row, read_rows, write_rows
from .evaluate import evaluate as evaluate_models
from .families import find_layers, read_expert
from .options import make_options
from .plan import KEPT, LayerPlan, Plan, make_plan
from .recover import RECIPES, check_recovery, recover_model
from .report import make_report
from .shapes import ModelShape
from .stages import (
    BatchSize,
    Data,
    Device,
    Force,
    Help,
    Length,
    Out,
    Progress,
    Seed,
    _check_number,
    _device,
    _needed,
    _silent,
)
from .stored import write_model
from .tasks import evaluate_tasks, find_tasks
from .train import STATE_FILE, Recovery, forget

LOG = "recovery.jsonl"


def read_notes(model: Path) -> dict[str, Any]:
    """What Locum wrote about a checkpoint when it made it; empty for any other checkpoint."""
    path = Path(model) / artefacts.NOTES
    return checkpoint.read_json(path) if path.is_file() else {}


def plan_of(model: Path) -> Plan | None:
    path = Path(model) / "plan.json"
    return artefacts.load_plan(path) if path.is_file() else None


def original_of(model: Path, given: Path | None, why: str) -> Path:
    """The original of a compressed checkpoint: as given, or as its notes say, provided it is still the same."""
    notes = read_notes(model)
    path = given if given is not None else notes.get("original")
    if path is None or (given is None and not Path(path).is_dir()):
        gone = f" (it was made from {path}, which is not there)" if path else ""
        raise OptionError(f"{why} of {model}{gone}; name the original checkpoint with --original")
    made_from, is_now = notes.get("original_fingerprint"), checkpoint.fingerprint_checkpoint(path)
    if made_from not in (None, is_now):
        raise CheckpointError(
            f"{path} is not what {model} was made from, or has changed since (fingerprint {is_now}, then {made_from}); "
            f"name the right one with --original"
        )
    return Path(path)


def _old_weights(model: Path, original: Path | None, decided: Plan | None, chosen: Recovery) -> Path | None:
    """Where the weights are that annealing fades out; None where none are needed."""
    if chosen.how != "annealed":
        return None
    if decided is None or not any(layer.replaced for layer in decided.layers):
        raise PlanError(f"{model} has no replaced experts, so there is nothing to anneal; use --how lora or --how full")
    if chosen.end_fraction == 0:
        return None
    source = original_of(model, original, "annealing needs the old weights")
    decided.validate(checkpoint.read_shape(source))
    return source


def recover(
    model: Path,
    *,
    data: Data,
    out: Out,
    original: Annotated[Path | None, Help("the checkpoint this one was made from; default: as its notes say")] = None,
    device: Device = "auto",
    force: Force = False,
    restart: Annotated[bool, Help("throw away what an interrupted run left instead of going on from it")] = False,
    adapter_only: Annotated[bool, Help("write vectors and routers alone, over the base (--how vectors)")] = False,
    validation_tokens: Annotated[int, Help("most tokens that a validation reads, shared over domains")] = 65536,
    progress: Progress = _silent,
    **options: Any,
) -> dict[str, Any]:
    """Train a compressed checkpoint back to strength. An interrupted run goes on where it stopped."""
    model = Path(model)
    paths = [source.path for source in parse_sources(data)]
    out = artefacts.check_output(_needed(out, "out"), force, "folder", inputs=[model, original, *paths])
    chosen: Recovery = make_options(Recovery, options)
    check_recovery(chosen)
    if adapter_only and RECIPES[chosen.how].changes_weights:
        raise OptionError(
            f"--adapter-only keeps the base's weights, and --how {chosen.how} trains them; use --how vectors"
        )
    _check_number("validation-tokens", validation_tokens, 1)
    device = _device(device)
    config = checkpoint.read_config(model)
    shape = checkpoint.read_shape(model)
    decided = plan_of(model)
    if decided is None and checkpoint.is_compressed(config):
        raise CheckpointError(
            f"{model} has no plan.json, so what stands in for what is not known; apply the plan again"
        )
    source = _old_weights(model, original, decided, chosen)
    tokenizer = checkpoint.load_tokenizer(model)
    blocks = load_tokens(data, tokenizer, split="train", length=chosen.length, seed=chosen.seed)
    validation = load_tokens(
        data, tokenizer, split="validation", length=chosen.length, tokens=validation_tokens, keep_partial=True
    )
    live = checkpoint.load_model(model, device=device)
    reads = None
    if source is not None:
        old = checkpoint.load_model(source, dtype=live.dtype, device=device)
        reads = {layer.shape.name: _reader(layer.experts) for layer in find_layers(old)}
    workdir = out.with_name(f".{out.name}.recover")
    try:
        live, summary = recover_model(
            live,
            decided or _keep_all(shape),
            blocks,
            validation,
            chosen,
            original_read=reads,
            workdir=workdir,
            log=workdir / LOG,
            progress=lambda done, total, loss: progress(f"recover: loss {loss:.3f}", done, total),
            restart=restart,
        )
    except BaseException:
        if not (workdir / STATE_FILE).is_file():  # nothing to go on from
            forget(workdir)
        raise
    notes = read_notes(model)
    before = checkpoint.read_shape(source) if source is not None else _original_shape(notes, shape)
    base = _base_of(model, decided, notes) if adapter_only else None
    notes |= artefacts.provenance(recovery={**dataclasses.asdict(chosen), **summary}, recovered_from=str(model))
    _save(live, tokenizer, out, decided or _keep_all(before), before, model, notes, workdir / LOG, base)
    forget(workdir)
    return {"out": str(out), **summary}


def _save(
    live: Any,
    tokenizer: Any,
    out: Path,
    plan: Plan,
    before: ModelShape,
    model: Path,
    notes: dict[str, Any],
    log: Path,
    base: Path | None,
) -> None:
    """Write a recovered checkpoint, or, given a base, the adapter over it. `before` is the original's shape."""
    notes.pop("adapter", None)  # of an adapter that was trained on
    if base is not None:
        notes["adapter"] = adapter_notes(live, base)
    card = model_card(plan, before, out.name, notes)
    write = write_model if base is None else write_adapter
    kept = plan if plan_of(model) is not None else None
    save_checkpoint(live, tokenizer, out, kept, card, model, notes, extra=[log], write=write)


def _base_of(model: Path, plan: Plan, notes: dict[str, Any]) -> Path:
    """What an adapter trained on `model` goes over: the original where the plan changes nothing but routing, and no
    weight was trained since."""
    if checkpoint.is_adapter(model):
        return base_of(model)
    if plan.keeps_experts and "recovery" not in notes and Path(notes.get("original") or "").is_dir():
        original = Path(notes["original"])
        if checkpoint.fingerprint_checkpoint(original) == notes.get("original_fingerprint"):
            return original
    return model


def _reader(experts: Any) -> Any:
    return lambda e: read_expert(experts, e)


def _keep_all(shape: ModelShape) -> Plan:
    return make_plan(shape, [LayerPlan(layer.name, (KEPT,) * layer.num_experts) for layer in shape.layers])


def _original_shape(notes: dict[str, Any], shape: ModelShape) -> ModelShape:
    return ModelShape.from_json(notes["original_shape"]) if "original_shape" in notes else shape


def evaluate(
    model: Path,
    *,
    data: Data = (),
    tasks: Annotated[str | None, Help("lm-eval tasks to score, separated by commas")] = None,
    task_path: Annotated[Path | None, Help("folder with further lm-eval task files")] = None,
    limit: Annotated[int | None, Help("items per task; default: all of them")] = None,
    against: Annotated[Path | None, Help("the original; default: as the checkpoint's notes say")] = None,
    json: Annotated[Path | None, Help("append the rows to this results file (JSON lines)")] = None,
    split: Annotated[str, Help("train, validation, test or all of the documents")] = "test",
    tokens: Annotated[int | None, Help("limit of tokens; default: all of them")] = None,
    length: Length = 256,
    batch_size: BatchSize = 8,
    resamples: Annotated[int, Help("bootstrap resamples behind the intervals")] = 1000,
    name: Annotated[str | None, Help("what to call the model in the results; default: its folder")] = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> list[Row]:
    """Loss, bits per byte and perplexity per domain, and distance from the original, with 95% intervals; the same for
    what the model scores on tasks with gold answers."""
    model = Path(model)
    _check_asked(data, tasks, task_path, limit)
    if json is not None:
        json = artefacts.check_output(json, force=True)
        if json.exists():
            read_rows(json)  # only to results can rows be added
    _check_number("batch-size", batch_size, 1)
    _check_number("resamples", resamples, 1)
    device = _device(device)
    checkpoint.read_shape(model)
    notes = read_notes(model)
    if against is None and Path(notes.get("original", "")).is_dir() and notes.get("original"):
        against = Path(notes["original"])
    if against is not None:
        checkpoint.read_shape(against)
        _check_vocabularies(model, against)
    tokenizer = checkpoint.load_tokenizer(model)
    asked = find_tasks(tasks, task_path) if tasks is not None else {}
    blocks = None
    if data:
        blocks = load_tokens(data, tokenizer, split=split, length=length, tokens=tokens, seed=seed, keep_partial=True)
    live = checkpoint.load_model(model, device=device)
    original = None if against is None else checkpoint.load_model(against, device=device)
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
        made = artefacts.provenance(data_fingerprint=blocks.fingerprint, split=split)
        rows += evaluate_models(live, blocks, **shared, provenance=made)
    if asked:
        rows += evaluate_tasks(live, tokenizer, asked, limit=limit, **shared, provenance=artefacts.provenance())
    about = {called: _about(model, plan, notes)}
    if against is not None:
        about["original"] = _about(Path(against), None, {})
    rows = [dataclasses.replace(row, provenance={**row.provenance, **about[row.model]}) for row in rows]
    if json is not None:
        write_rows(json, rows)
    return rows


def _check_asked(data: Any, tasks: str | None, task_path: Path | None, limit: int | None) -> None:
    if not data and tasks is None:
        raise OptionError("nothing to evaluate on; give --data (text), --tasks (questions with answers), or both")
    if data:
        parse_sources(data)
    if tasks is None and (task_path is not None or limit is not None):
        raise OptionError("--task-path and --limit are about tasks; name some with --tasks")
    if limit is not None:
        _check_number("limit", limit, 1)


def _check_vocabularies(model: Path, against: Path) -> None:
    ours, theirs = (checkpoint.read_config(p).get_text_config().vocab_size for p in (model, against))
    if ours != theirs:
        raise OptionError(
            f"{model} has a vocabulary of {ours} and {against} one of {theirs}; compare a model with the checkpoint it "
            f"was made from"
        )


def _about(model: Path, plan: Plan | None, notes: dict[str, Any]) -> dict[str, Any]:
    """What a results row says of the checkpoint behind it, so that reports find sizes and pictures."""
    shape = checkpoint.read_shape(model)
    made = {} if plan is None else plan.provenance
    about = {
        "checkpoint": str(model),
        "parameters": shape.parameters,
        "bytes": shape.bytes,
        "expert_parameters": checkpoint.expert_parameters(model, shape),
        "active_parameters": checkpoint.active_parameters(model, shape),
        "stage": "original" if plan is None else "recovered" if "recovery" in notes else "compressed",
        "method": None if plan is None else plan.method,
        "plan_file": str(model / "plan.json") if plan is not None else None,
        "recovery_log": str(model / LOG) if (model / LOG).is_file() else None,
        "statistics_file": made.get("statistics_file"),
    }
    return {key: value for key, value in about.items() if value is not None}


def report(
    results: Sequence[Path],
    *,
    out: Out,
    title: Annotated[str, Help("title of the page")] = "Locum report",
    force: Force = False,
) -> Path:
    """One self-contained HTML page from results files, statistics files (.safetensors) or both: pictures first."""
    files = [results] if isinstance(results, (str, Path)) else list(results)
    out = artefacts.check_output(_needed(out, "out"), force, inputs=files)
    statistics = [file for file in files if Path(file).suffix == ".safetensors"]
    rows = [file for file in files if file not in statistics]
    artefacts.write_text(out, make_report(rows, statistics=statistics, title=title))
    return out
