"""The stages after compression: recover, evaluate, report, and the demonstration of them all."""

from __future__ import annotations

import dataclasses
import json as json_module
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from . import artefacts, checkpoint
from .apply import save_checkpoint
from .card import model_card
from .data import load_tokens, parse_sources
from .errors import CheckpointError, OptionError, PlanError
from .evaluate import Row, read_rows, write_rows
from .evaluate import evaluate as evaluate_models
from .families import find_layers, read_expert
from .options import make_options
from .plan import KEPT, LayerPlan, Plan, make_plan
from .recover import Recovery, recover_model
from .shapes import ModelShape
from .stages import BatchSize, Data, Device, Force, Help, Length, Out, Progress, Seed, _device, _needed, _silent

LOG = "recovery.jsonl"


def read_notes(model: Path) -> dict[str, Any]:
    """What Locum wrote about a checkpoint when it made it; empty for any other checkpoint."""
    path = Path(model) / artefacts.NOTES
    return json_module.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def plan_of(model: Path) -> Plan | None:
    path = Path(model) / "plan.json"
    return artefacts.load_plan(path) if path.is_file() else None


def original_of(model: Path, given: Path | None, why: str) -> Path:
    """The original of a compressed checkpoint: as given, or as its notes say, provided it is still the same."""
    if given is not None:
        return Path(given)
    notes = read_notes(model)
    path = notes.get("original")
    if path is None or not Path(path).is_dir():
        raise OptionError(f"{why}; name the original checkpoint with --original")
    if checkpoint.fingerprint_checkpoint(path) != notes.get("original_fingerprint"):
        raise CheckpointError(f"{path} is not what {model} was made from any more; name the right one with --original")
    return Path(path)


def recover(
    model: Path,
    *,
    data: Data,
    out: Out,
    original: Annotated[Path | None, Help("the checkpoint this one was made from; default: as its notes say")] = None,
    device: Device = "auto",
    force: Force = False,
    restart: Annotated[bool, Help("throw away what an interrupted run left instead of going on from it")] = False,
    progress: Progress = _silent,
    **options: Any,
) -> dict[str, Any]:
    """Train a compressed checkpoint back to strength. An interrupted run goes on where it stopped."""
    model = Path(model)
    out = artefacts.check_output(_needed(out, "out"), force, "folder")
    chosen: Recovery = make_options(Recovery, options)
    parse_sources(data)
    config = checkpoint.read_config(model)
    shape = checkpoint.read_shape(model)
    decided = plan_of(model)
    if decided is None and checkpoint.is_compressed(config):
        raise CheckpointError(
            f"{model} has no plan.json, so what stands in for what is not known; apply the plan again"
        )
    source = None
    if chosen.how == "annealed":
        if decided is None or not any(layer.replaced for layer in decided.layers):
            raise PlanError(
                f"{model} has no replaced experts, so there is nothing to anneal; use --how lora or --how full"
            )
        source = original_of(model, original, "annealing needs the old weights")
        decided.validate(checkpoint.read_shape(source))
    tokenizer = checkpoint.load_tokenizer(model)
    blocks = load_tokens(data, tokenizer, split="train", length=chosen.length, seed=chosen.seed)
    validation = load_tokens(data, tokenizer, split="validation", length=chosen.length, keep_partial=True)
    live = checkpoint.load_model(model, device=_device(device))
    reads = None
    if source is not None:
        old = checkpoint.load_model(source, dtype=live.dtype, device=_device(device))
        reads = {layer.shape.name: _reader(layer.experts) for layer in find_layers(old)}
    workdir = out.with_name(f".{out.name}.recover")
    workdir.mkdir(parents=True, exist_ok=True)
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
    notes = read_notes(model)
    made = {
        **notes,
        **artefacts.provenance(recovery={**dataclasses.asdict(chosen), **summary}, recovered_from=str(model)),
    }
    before = checkpoint.read_shape(source) if source is not None else _original_shape(notes, shape)
    card = model_card(decided or _keep_all(before), before, out.name, made)
    save_checkpoint(live, tokenizer, out, decided, card, model, made, extra=[workdir / LOG])
    shutil.rmtree(workdir)
    return {"out": str(out), **summary}


def _reader(experts: Any) -> Any:
    return lambda e: read_expert(experts, e)


def _keep_all(shape: ModelShape) -> Plan:
    return make_plan(shape, [LayerPlan(layer.name, (KEPT,) * layer.num_experts) for layer in shape.layers])


def _original_shape(notes: dict[str, Any], shape: ModelShape) -> ModelShape:
    return ModelShape.from_json(notes["original_shape"]) if "original_shape" in notes else shape


def evaluate(
    model: Path,
    *,
    data: Data,
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
    """Loss, bits per byte and perplexity per domain, and distance from the original, with 95% intervals."""
    model = Path(model)
    if json is not None:
        json = artefacts.check_output(json, force=True)
    parse_sources(data)
    checkpoint.read_shape(model)
    notes = read_notes(model)
    if against is None and Path(notes.get("original", "")).is_dir() and notes.get("original"):
        against = Path(notes["original"])
    if against is not None:
        checkpoint.read_shape(against)
    tokenizer = checkpoint.load_tokenizer(model)
    blocks = load_tokens(data, tokenizer, split=split, length=length, tokens=tokens, seed=seed, keep_partial=True)
    live = checkpoint.load_model(model, device=_device(device))
    original = None if against is None else checkpoint.load_model(against, device=_device(device))
    called = name or model.resolve().name
    plan = plan_of(model)
    rows = evaluate_models(
        live,
        blocks,
        against=original,
        batch_size=batch_size,
        seed=seed,
        resamples=resamples,
        model_name=called,
        plan=None if plan is None else plan.id,
        provenance=artefacts.provenance(data_fingerprint=blocks.fingerprint, split=split),
    )
    about = {called: _about(model, plan, notes)}
    if against is not None:
        about["original"] = _about(Path(against), None, {})
    rows = [dataclasses.replace(row, provenance={**row.provenance, **about[row.model]}) for row in rows]
    if json is not None:
        write_rows(json, rows)
    return rows


def _about(model: Path, plan: Plan | None, notes: dict[str, Any]) -> dict[str, Any]:
    """What a results row says of the checkpoint behind it, so that reports find sizes and pictures."""
    shape = checkpoint.read_shape(model)
    made = {} if plan is None else plan.provenance
    about = {
        "checkpoint": str(model),
        "parameters": shape.parameters,
        "bytes": shape.bytes,
        "expert_parameters": sum(  # what is stored for routed experts, containers included
            entry_numel for entry_numel in checkpoint.expert_numels(model)
        ),
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
    force: Force = True,
) -> Path:
    """One self-contained HTML page from results files: pictures first."""
    from .report import make_report

    out = artefacts.check_output(_needed(out, "out"), force)
    files = [results] if isinstance(results, (str, Path)) else list(results)
    for file in files:
        read_rows(file)
    artefacts.write_text(out, make_report(list(files), title=title))
    return out


def demo(
    *,
    out: Annotated[Path, Help("folder for everything the demonstration makes")] = Path("locum-demo"),
    steps: Annotated[int, Help("recovery steps")] = 300,
    force: Force = False,
    progress: Progress = _silent,
) -> Path:
    """The whole job on the bundled, really trained model: compress, recover, compare, report. Needs no network."""
    from .demo import run_demo

    return run_demo(artefacts.check_output(out, force, "folder"), steps, progress)
