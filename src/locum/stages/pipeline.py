"""Stages made of other stages: search (calibrate, then try removals) and compress (all the way to a checkpoint)."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Annotated, Any

from ..checkpoints import checkpoint
from ..checkpoints.opening import check_openable, open_model
from ..data.documents import parse_sources
from ..data.tokens import fingerprint_tokenizer, load_tokens
from ..errors import LocumError, OptionError, PlanError, UnsupportedModel
from ..files import check_output, load_statistics, provenance, save_statistics
from ..measure.remembered import RememberedAnswers
from ..measure.removals import SAMPLE, ModelExplorer
from ..options import make_options
from ..plans.plan import Plan, with_provenance
from ..shapes import ModelShape
from ..stats.definitions import SearchEvent
from ..stats.sums import STATISTICS, Statistics
from ..training.loop import Recovery
from ..training.recovery import check_recovery
from . import quality
from .stages import (
    MOST_SEED,
    BatchSize,
    Data,
    Device,
    Fit,
    Force,
    Help,
    Length,
    Out,
    Progress,
    Remove,
    Seed,
    Split,
    ToObserve,
    _check_number,
    _check_statistics_of,
    _check_target,
    _chosen,
    _device,
    _needed,
    _silent,
    _timed,
    apply,
    calibrate,
    plan,
)

Sample = Annotated[int, Help("tokens on which removals are tried, for methods that search")]


def search(
    model: Path,
    *,
    data: Data,
    out: Out,
    method: Annotated[str, Help("a method that searches; see locum list")] = "moe-i2",
    tokens: ToObserve = 131072,
    sample: Sample = SAMPLE,
    length: Length = 512,
    batch_size: BatchSize = 8,
    split: Split = "train",
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
    progress: Progress = _silent,
    **options: Any,
) -> Statistics:
    """Calibrate, and let a method try removals on the model: statistics that its plans then read, in one file.

    An interrupted search goes on where it stopped when the same command is given again.
    """
    model = Path(model)
    chosen = _chosen(method, options)
    if not hasattr(chosen, "explore"):
        raise OptionError(f"method {chosen.name} does not search; use locum calibrate, and make its plan from that")
    paths = [source.path for source in parse_sources(data)]
    out = check_output(_needed(out, "out"), force, inputs=[model, *paths])
    for name, value in (("batch-size", batch_size), ("sample", sample)):
        _check_number(name, value, 1)
    _check_number("seed", seed, 0, MOST_SEED)
    if "seed" in (field.name for field in dataclasses.fields(chosen)):
        chosen = dataclasses.replace(chosen, seed=seed)
    device = _device(device)
    _check_droppable(model, checkpoint.read_shape(model))
    tokenizer = checkpoint.load_tokenizer(model)
    blocks = load_tokens(data, tokenizer, split=split, length=length, tokens=tokens, seed=seed)
    identity = {
        "model_fingerprint": checkpoint.fingerprint_checkpoint(model),
        "tokenizer_fingerprint": fingerprint_tokenizer(tokenizer),
        "data_fingerprint": blocks.fingerprint,
        "method": chosen.name,
        "options": dataclasses.asdict(chosen),
        "sample": sample,
        "batch_size": batch_size,
        "seed": seed,
    }
    calibrated = out.with_name(f".{out.name}.calibrated")
    statistics = _reusable(calibrated, identity, _to_collect(chosen)) or calibrate(
        model,
        data=data,
        out=calibrated,
        tokens=tokens,
        length=length,
        batch_size=batch_size,
        split=split,
        also=_to_collect(chosen),
        seed=seed,
        device=device,
        force=True,
        progress=progress,
    )
    explorer = ModelExplorer(open_model(model, device), blocks, sample=sample, batch_size=batch_size, seed=seed)
    answers = RememberedAnswers(explorer, out.with_name(f".{out.name}.answers"), identity)
    try:
        found = chosen.explore(answers, _timed(progress))
    except BaseException:
        answers.save()
        raise
    result = _with_found(statistics, found)
    made = provenance(search={key: identity[key] for key in ("method", "options", "sample", "seed")})
    result = dataclasses.replace(result, provenance={**statistics.provenance, **made})
    save_statistics(result, out)
    for left in (calibrated, answers.path):
        left.unlink(missing_ok=True)
    return result


def _check_droppable(model: Path, shape: ModelShape) -> None:
    check_openable(model, "search on the original checkpoint")
    for layer in shape.layers:
        if layer.refuse_dropping:
            raise UnsupportedModel(f"{model}: removals cannot be tried on this model: {layer.refuse_dropping}")


def _to_collect(chosen: Any) -> tuple[str, ...]:
    """Those of a method's needs that calibration gives."""
    return tuple(name for name in chosen.needs() if not STATISTICS[name].searched)


def _reusable(path: Path, identity: dict[str, Any], needs: tuple[str, ...]) -> Statistics | None:
    """The calibration that an interrupted search left behind, if it is what this one needs."""
    try:
        statistics = load_statistics(path)
    except LocumError:
        return None
    keys = ("model_fingerprint", "tokenizer_fingerprint", "data_fingerprint")
    same = all(statistics.provenance[key] == identity[key] for key in keys)
    return statistics if same and set(needs) <= set(statistics.names) else None


def _with_found(statistics: Statistics, found: dict[str, dict[str, Any]]) -> Statistics:
    """Statistics with what a search found. It has no domains, so the first one holds it and the sum over all is it."""
    layers: dict[str, dict[str, Any]] = {}
    for name, named in statistics.layers.items():
        layers[name] = dict(named)
        for key in found[name]:
            value = STATISTICS[key].increment(SearchEvent(found[name])).double().cpu()
            layers[name][key] = value.new_zeros(len(statistics.domains), *value.shape)
            layers[name][key][0] = value
    return dataclasses.replace(statistics, layers=layers)


def compress(
    model: Path,
    *,
    data: Data = (),
    out: Out,
    method: Annotated[str, Help("compression method; see locum list")] = "lightmoe",
    remove: Remove = None,
    fit: Fit = None,
    tokens: ToObserve = 131072,
    sample: Sample = SAMPLE,
    length: Length = 512,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    device: Device = "auto",
    statistics: Annotated[
        Path | None, Help("use this statistics file, or write it there when it does not exist")
    ] = None,
    recover: Annotated[str | None, Help("train the result back, as locum recover --how; default: do not")] = None,
    recover_steps: Annotated[int, Help("optimizer steps of that training")] = Recovery.steps,
    recover_learning_rate: Annotated[float, Help("highest learning rate of that training")] = Recovery.learning_rate,
    force: Force = False,
    progress: Progress = _silent,
    **options: Any,
) -> Path:
    """Calibrate (or search, for a method that searches), plan and apply in one, and recover if asked to.

    A method that needs no statistics needs no data.
    """
    model = Path(model)
    chosen = _chosen(method, options)
    paths = [source.path for source in parse_sources(data)] if data or chosen.needs() or recover else []
    out = check_output(_needed(out, "out"), force, "folder", inputs=[model, statistics, *paths])
    _check_number("seed", seed, 0, MOST_SEED)
    recovery = {"how": recover, "steps": recover_steps, "learning_rate": recover_learning_rate, "seed": seed}
    if recover is not None:
        _check_number("recover-steps", recover_steps, 1)
        check_recovery(make_options(Recovery, recovery))
    _check_target(remove, fit, checkpoint.read_shape(model), chosen)
    asked = {"method": method, "remove": remove, "fit": fit, **options}
    shared = {"seed": seed, "force": force, "progress": progress}
    training = None if recover is None else {"data": data, "device": device, **recovery}
    if not chosen.needs():
        return _finish(model, plan([model], **asked), None, out, training, **shared)
    keep = statistics if statistics is not None else out.with_name(f".{out.name}.statistics.safetensors")
    if not Path(keep).is_file():
        observed = {"tokens": tokens, "length": length, "batch_size": batch_size, "seed": seed, "device": device}
        observed |= {"data": data, "out": Path(keep), "progress": progress}
        if hasattr(chosen, "explore"):
            search(model, method=method, sample=sample, **observed, **options)
        else:
            calibrate(model, also=_to_collect(chosen), **observed)
    try:
        loaded = load_statistics(keep)
        _check_statistics_of(loaded, model, keep)
        decided = plan([loaded], **asked)
        if statistics is not None:
            decided = with_provenance(decided, statistics_file=str(statistics))
        return _finish(model, decided, loaded, out, training, **shared)
    finally:
        if statistics is None:
            Path(keep).unlink(missing_ok=True)


def _finish(
    model: Path,
    decided: Plan,
    statistics: Statistics | None,
    out: Path,
    training: dict[str, Any] | None,
    *,
    seed: int,
    force: bool,
    progress: Progress,
) -> Path:
    """Apply a plan and train the result if asked to; `out` appears when both are done."""
    if training is None:
        return apply(model, plan=decided, out=out, statistics=statistics, seed=seed, force=force, progress=progress)
    if training["how"] == "annealed" and not any(layer.replaced for layer in decided.layers):
        raise PlanError(
            "the plan only drops or keeps experts, so there is nothing to anneal; use --recover lora or full"
        )
    draft = out.with_name(f".{out.name}.unrecovered")
    try:
        apply(model, plan=decided, out=draft, statistics=statistics, seed=seed, force=True, progress=progress)
        quality.recover(draft, out=out, original=model, force=force, progress=progress, **training)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out
