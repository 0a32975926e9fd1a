"""The stages: each a function from files to a file. The commands are generated from these signatures.

Options are keyword-only, carry their help in the annotation, and have one name and one default here and on the
command line. Options of methods and of recovery are those of their own dataclasses.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from . import artefacts, checkpoint
from .apply import apply_plan, save_checkpoint
from .budget import parse_size, search
from .calibrate import calibrate as calibrate_model
from .card import model_card
from .criteria import CRITERIA
from .data import fingerprint_tokenizer, load_tokens
from .documents import parse_sources
from .errors import OptionError, PlanError, StatisticsError, UnsupportedModel
from .methods import METHODS
from .options import make_options
from .plan import Plan, make_plan, with_provenance
from .plan import diff as diff_plans
from .shapes import ModelShape
from .statistics import STATISTICS, Statistics, check_same_origin, mean_output

MOST_SEED = 2**31 - 1
Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class Help:
    """One line of help for an option."""

    text: str


Data = Annotated[Sequence[str], Help("text, folder, JSONL, Parquet or datasets folder as [domain=]PATH[@WEIGHT]")]
Out = Annotated[Path | None, Help("where to write")]
Force = Annotated[bool, Help("replace an output that exists")]
Seed = Annotated[int, Help("seed of everything random")]
Device = Annotated[str, Help("auto, cpu, cuda, cuda:1, ...")]
Length = Annotated[int, Help("tokens in a block")]
BatchSize = Annotated[int, Help("blocks in a batch")]
Remove = Annotated[float | None, Help("fraction of the routed experts' parameters to remove, 0 to 1")]
Fit = Annotated[str | None, Help("largest size of the checkpoint's tensors, such as 16GiB")]


def _silent(stage: str, done: int, total: int) -> None:
    pass


def _device(name: str) -> str:
    """The device that a name means. Raises OptionError for one that is not there, before anything is loaded."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = "cpu" + "".join(f", cuda:{i}" for i in range(torch.cuda.device_count()))
        raise OptionError(
            f"--device {name} cannot be used ({str(error).splitlines()[0]:.80}); devices here: auto, {there}"
        ) from error
    return name


def _check_number(name: str, value: int, least: int, most: float = math.inf) -> None:
    if not least <= value <= most:
        end = "" if most == math.inf else f" to {most}"
        raise OptionError(f"--{name} is {value}; allowed: whole numbers from {least}{end}")


def inspect(model: Path) -> dict[str, Any]:
    """Layers, experts, routers and sizes of a checkpoint, from its config and file headers; no weight is read."""
    shape = checkpoint.read_shape(model)
    config = checkpoint.read_config(model)
    return {
        "model": str(model),
        "model_type": shape.model_type,
        "compressed": checkpoint.is_compressed(config),
        "parameters": shape.parameters,
        "bytes": shape.bytes,
        "expert_parameters": checkpoint.expert_parameters(model, shape),
        "fingerprint": checkpoint.fingerprint_checkpoint(model),
        "layers": [dataclasses.asdict(layer) for layer in shape.layers],
        "notes": list(shape.notes),
    }


def calibrate(
    model: Path,
    *,
    data: Data,
    out: Out,
    tokens: Annotated[int, Help("tokens to observe, shared over domains by weight")] = 131072,
    length: Length = 512,
    batch_size: BatchSize = 8,
    split: Annotated[str, Help("train, validation, test or all of the documents")] = "train",
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
    progress: Progress = _silent,
) -> Statistics:
    """One pass over text: what every router and expert does, as additive sums in one file.

    An interrupted pass goes on where it stopped when the same command is given again.
    """
    model = Path(model)
    paths = [source.path for source in parse_sources(data)]
    out = artefacts.check_output(_needed(out, "out"), force, inputs=[model, *paths])
    _check_number("batch-size", batch_size, 1)
    device = _device(device)
    shape = checkpoint.read_shape(model)
    if checkpoint.is_compressed(checkpoint.read_config(model)):
        raise UnsupportedModel(f"{model} is compressed already; calibrate the original checkpoint")
    tokenizer = checkpoint.load_tokenizer(model)
    blocks = load_tokens(data, tokenizer, split=split, length=length, tokens=tokens, seed=seed)
    origin = {
        "model_fingerprint": checkpoint.fingerprint_checkpoint(model),
        "tokenizer_fingerprint": fingerprint_tokenizer(tokenizer),
        "shape": shape.to_json(),
        "model": str(model),
        "sources": list(blocks.sources),
        "seed": seed,
    }
    partial = out.with_name(f".{out.name}.partial")
    statistics = calibrate_model(
        checkpoint.load_model(model, device=device),
        blocks,
        batch_size=batch_size,
        provenance=origin,
        progress=lambda done, total: progress("calibrate", done, total),
        on_batch=lambda so_far, block: _save_partial(so_far, block, partial),
        start=_load_partial(partial, origin, blocks.fingerprint),
    )
    artefacts.save_statistics(statistics, out)
    partial.unlink(missing_ok=True)
    return statistics


def _save_partial(statistics: Statistics, next_block: int, path: Path) -> None:
    marked = dataclasses.replace(statistics, provenance={**statistics.provenance, "next_block": next_block})
    artefacts.save_statistics(marked, path)


def _load_partial(path: Path, origin: dict[str, Any], data_fingerprint: str) -> tuple[Statistics, int] | None:
    """What an interrupted run with the same model and data left behind, if anything."""
    if not path.is_file():
        return None
    statistics = artefacts.load_statistics(path)
    try:
        check_same_origin(statistics.provenance, origin)
    except StatisticsError:
        return None
    if statistics.provenance["data_fingerprint"] != data_fingerprint:
        return None
    provenance = {k: v for k, v in statistics.provenance.items() if k != "next_block"}
    return dataclasses.replace(statistics, provenance=provenance), statistics.provenance["next_block"]


def plan(
    statistics: Sequence[Path],
    *,
    method: Annotated[str, Help("compression method; see locum list")] = "lightmoe",
    remove: Remove = None,
    fit: Fit = None,
    out: Out = None,
    force: Force = False,
    **options: Any,
) -> Plan:
    """Decide what becomes of every expert, from statistics alone. Several statistics files are added up."""
    files = [statistics] if isinstance(statistics, (str, Path, Statistics)) else list(statistics)
    out = None if out is None else artefacts.check_output(out, force, inputs=files)
    chosen = _chosen(method, options)
    _check_target(remove, fit)
    loaded = [s if isinstance(s, Statistics) else artefacts.load_statistics(s) for s in files]
    total = loaded[0]
    for more in loaded[1:]:
        total = total + more
    shape = total.shape
    made = {"method": chosen.name, "options": dataclasses.asdict(chosen)}

    def build(amount: float) -> Plan:
        return make_plan(shape, chosen.plan(total, shape, amount), **made)

    result = search(build, shape, remove, None if fit is None else parse_size(fit))
    named = [str(s) for s in files if not isinstance(s, Statistics)]
    result = with_provenance(
        result,
        **artefacts.provenance(
            target={"remove": remove, "fit": fit},
            statistics_file=named[0] if len(named) == 1 else named,
            model_fingerprint=total.provenance["model_fingerprint"],
            data_fingerprint=total.provenance["data_fingerprint"],
        ),
    )
    if out is not None:
        artefacts.save_plan(result, out)
    return result


def diff(a: Path, b: Path) -> list[str]:
    """What two plans do differently, one line per expert."""
    return diff_plans(artefacts.load_plan(a), artefacts.load_plan(b))


def apply(
    model: Path,
    *,
    plan: Annotated[Path, Help("the plan file")],
    out: Out,
    statistics: Annotated[
        Path | None, Help("statistics for a plan with constants; default: those it was made from")
    ] = None,
    seed: Seed = 0,
    force: Force = False,
    progress: Progress = _silent,
) -> Path:
    """Carry out a plan: a checkpoint folder with weights, config, tokenizer, plan and model card."""
    model = Path(model)
    out = artefacts.check_output(_needed(out, "out"), force, "folder", inputs=[model, plan, statistics])
    _check_number("seed", seed, 0, MOST_SEED)
    decided = plan if isinstance(plan, Plan) else artefacts.load_plan(plan)
    shape = checkpoint.read_shape(model)
    if checkpoint.is_compressed(checkpoint.read_config(model)):
        raise UnsupportedModel(f"{model} is compressed already; apply the plan to the original checkpoint")
    decided.validate(shape)
    means = _mean_outputs(decided, statistics, model) if decided.needs_constants else None
    tokenizer = checkpoint.load_tokenizer(model)
    live = checkpoint.load_model(model)
    count = 0

    def step(layer: str) -> None:
        nonlocal count
        count += 1
        progress("apply", count, len(decided.layers))

    apply_plan(live, decided, means, seed, step)
    made = artefacts.provenance(
        original=str(model.resolve()),
        original_fingerprint=checkpoint.fingerprint_checkpoint(model),
        original_shape=shape.to_json(),
        plan=decided.id,
        seed=seed,
    )
    save_checkpoint(live, tokenizer, out, decided, model_card(decided, shape, out.name, made), model, made)
    return out


def _mean_outputs(plan: Plan, statistics: Path | Statistics | None, model: Path) -> dict[str, torch.Tensor]:
    """The constants a plan asks for, from the statistics given or those that the plan names."""
    source = statistics or plan.provenance.get("statistics_file")
    if source is None or isinstance(source, list) or (statistics is None and not Path(source).is_file()):
        gone = f" (made from {source}, which is not there)" if isinstance(source, str) else ""
        raise PlanError(
            f"the plan has constants, which are mean outputs{gone}; name the statistics they come from with --statistics"
        )
    loaded = source if isinstance(source, Statistics) else artefacts.load_statistics(source)
    if loaded.shape.fingerprint != plan.shape_fingerprint:
        raise StatisticsError(
            f"the statistics were collected on another model ({loaded.shape.model_type}, {len(loaded.shape.layers)} MoE "
            f"layers) than {model}; name those that the plan was made from"
        )
    return {layer.name: mean_output(loaded.layer(layer.name)) for layer in loaded.shape.layers}


def compress(
    model: Path,
    *,
    data: Data,
    out: Out,
    method: Annotated[str, Help("compression method; see locum list")] = "lightmoe",
    remove: Remove = None,
    fit: Fit = None,
    tokens: Annotated[int, Help("tokens to observe, shared over domains by weight")] = 131072,
    length: Length = 512,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    device: Device = "auto",
    statistics: Annotated[
        Path | None, Help("use this statistics file, or write it there when it does not exist")
    ] = None,
    force: Force = False,
    progress: Progress = _silent,
    **options: Any,
) -> Path:
    """Calibrate, plan and apply in one."""
    model = Path(model)
    paths = [source.path for source in parse_sources(data)]
    out = artefacts.check_output(_needed(out, "out"), force, "folder", inputs=[model, statistics, *paths])
    _check_number("seed", seed, 0, MOST_SEED)
    _chosen(method, options)
    _check_target(remove, fit, checkpoint.read_shape(model))
    keep = statistics if statistics is not None else out.with_name(f".{out.name}.statistics.safetensors")
    if not Path(keep).is_file():
        calibrate(
            model,
            data=data,
            out=Path(keep),
            tokens=tokens,
            length=length,
            batch_size=batch_size,
            seed=seed,
            device=device,
            progress=progress,
        )
    try:
        loaded = artefacts.load_statistics(keep)
        _check_statistics_of(loaded, model, keep)
        decided = plan([loaded], method=method, remove=remove, fit=fit, **options)
        if statistics is not None:
            decided = with_provenance(decided, statistics_file=str(statistics))
        return apply(model, plan=decided, out=out, statistics=loaded, seed=seed, force=force, progress=progress)
    finally:
        if statistics is None:
            Path(keep).unlink(missing_ok=True)


def _chosen(method: str, options: dict[str, Any]) -> Any:
    """A method with its options. Raises OptionError for an unknown method, option or criterion."""
    chosen = make_options(METHODS[method], options)
    if hasattr(chosen, "score"):
        CRITERIA[chosen.score]
    return chosen


def _check_target(remove: float | None, fit: str | None, shape: ModelShape | None = None) -> None:
    """Fail on a target that can never be met before an hour of calibration, not after."""
    if (remove is None) == (fit is None):
        raise OptionError("give exactly one of --remove (a fraction, such as 0.5) and --fit (a size, such as 16GiB)")
    if remove is not None and not 0 < remove < 1:
        raise OptionError(
            f"--remove is {remove:g}; it is the fraction of expert parameters to remove: above 0, below 1"
        )
    if fit is not None and shape is not None:
        rest = shape.bytes - shape.expert_parameters * shape.expert_itemsize
        if parse_size(fit) < rest:
            raise OptionError(
                f"--fit {fit} is out of reach: what is not a routed expert has {rest:,} bytes alone; allow more than "
                f"that, up to {shape.bytes:,}, the size as it is"
            )


def _check_statistics_of(statistics: Statistics, model: Path, path: Path) -> None:
    """Statistics that are named for a model must be of that model and tokenizer."""
    ours = {
        "model": (statistics.provenance["model_fingerprint"], checkpoint.fingerprint_checkpoint(model)),
        "tokenizer": (
            statistics.provenance["tokenizer_fingerprint"],
            fingerprint_tokenizer(checkpoint.load_tokenizer(model)),
        ),
    }
    for what, (theirs, here) in ours.items():
        if theirs != here:
            raise StatisticsError(
                f"statistics {path} belong to another {what} (fingerprint {theirs}) than {model} ({here}); calibrate "
                f"this model, or make a plan from them with `locum plan` and apply that"
            )


def catalogue() -> dict[str, Any]:
    """Everything that is registered: methods with their options, criteria, statistics."""
    methods = {
        name: {
            "summary": _summary(cls),
            "paper": cls.paper,
            "options": {f.name: {"default": f.default, "help": f.metadata["help"]} for f in dataclasses.fields(cls)},
        }
        for name, cls in METHODS.items()
    }
    criteria = {name: {"paper": item.paper, "needs": list(item.needs)} for name, item in CRITERIA.items()}
    return {"methods": methods, "criteria": criteria, "statistics": sorted(STATISTICS)}


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _needed(value: Any, name: str) -> Path:
    if value is None:
        raise OptionError(f"--{name} is missing; say where to write")
    return Path(value)


def plan_summary(decided: Plan, shape: ModelShape) -> dict[str, Any]:
    """Sizes before and after, and what becomes of how many experts, for people and tests."""
    size = decided.size(shape)
    return {
        "method": decided.method,
        "plan": decided.id,
        "removed": decided.removed(shape),
        "parameters": [shape.parameters, size.parameters],
        "expert_parameters": [shape.expert_parameters, size.expert_parameters],
        "bytes": [shape.bytes, size.bytes],
        "stock_layout": decided.is_stock(shape),
        "replaced_per_layer": [len(layer.replaced) for layer in decided.layers],
        "experts_per_layer": [len(layer.survivors) for layer in decided.layers],
    }
