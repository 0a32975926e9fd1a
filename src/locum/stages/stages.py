"""The stages: each a function from files to a file. The commands are generated from these signatures.

Options are keyword-only, carry their help in the annotation, and have one name and one default here and on the
command line. Options of methods and of recovery are those of their own dataclasses.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from ..budgets.target import parse_size, search
from ..checkpoints import checkpoint
from ..checkpoints.application import apply_plan, save_checkpoint
from ..checkpoints.card import model_card
from ..checkpoints.opening import check_openable, open_model
from ..containers.layout import active_parameters
from ..criteria.criterion import CRITERIA
from ..data.documents import parse_sources
from ..data.tokens import fingerprint_tokenizer, load_tokens
from ..errors import OptionError, PlanError, StatisticsError
from ..experts.stand_ins import check_statistics
from ..files import check_output, load_plan, load_statistics, provenance, save_plan, save_statistics
from ..measure.calibration import calibrate as calibrate_model
from ..methods import METHODS
from ..options import make_options
from ..plans.plan import Plan, make_plan, with_provenance, with_routing
from ..plans.plan import diff as diff_plans
from ..shapes import ModelShape
from ..stats.sums import STATISTICS, Statistics, check_needs, check_same_origin

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
ToObserve = Annotated[int, Help("tokens to observe, shared over domains by weight")]
Split = Annotated[str, Help("train, validation, test or all of the documents")]
Length = Annotated[int, Help("tokens in a block")]
BatchSize = Annotated[int, Help("blocks in a batch")]
Remove = Annotated[float | None, Help("fraction of the routed experts' parameters to remove, 0 to 1")]
Fit = Annotated[str | None, Help("largest size of the checkpoint's tensors, such as 16GiB")]


def _silent(stage: str, done: int, total: int) -> None:
    pass


def _timed(progress: Progress) -> Progress:
    """The same progress, with the seconds that the last layer took."""
    last = time.perf_counter()

    def report(stage: str, done: int, total: int) -> None:
        nonlocal last
        before, last = last, time.perf_counter()
        progress(f"{stage}: {last - before:.1f} s for the last layer", done, total)

    return report


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
    experts, active = checkpoint.expert_parameters(model, shape), checkpoint.active_parameters(model, shape)
    layouts = checkpoint.layouts_of(model)
    policies = {layer.name: layer.name in layouts and layouts[layer.name].routing for layer in shape.layers}
    routing = {name: str(policy) if policy else None for name, policy in policies.items()}
    return {
        "model": str(model),
        "model_type": shape.model_type,
        "compressed": checkpoint.is_compressed(config),
        "parameters": shape.parameters,
        "bytes": shape.bytes,
        "expert_parameters": experts,
        "active_parameters": active,
        "active_bytes": shape.bytes - (shape.parameters - active) * shape.expert_itemsize,
        "fingerprint": checkpoint.fingerprint_checkpoint(model),
        "layers": [{**dataclasses.asdict(layer), "routing": routing[layer.name]} for layer in shape.layers],
        "notes": list(shape.notes),
    }


def calibrate(
    model: Path,
    *,
    data: Data,
    out: Out,
    tokens: ToObserve = 131072,
    length: Length = 512,
    batch_size: BatchSize = 8,
    split: Split = "train",
    also: Annotated[Sequence[str], Help("statistics on demand to collect too; see locum list")] = (),
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
    out = check_output(_needed(out, "out"), force, inputs=[model, *paths])
    _check_number("batch-size", batch_size, 1)
    needs = check_needs((*check_needs(None), *([also] if isinstance(also, str) else also)))
    device = _device(device)
    shape = checkpoint.read_shape(model)
    check_openable(model, "calibrate the original checkpoint")
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
        open_model(model, device=device),
        blocks,
        batch_size=batch_size,
        needs=needs,
        provenance=origin,
        progress=lambda done, total: progress("calibrate", done, total),
        on_batch=lambda so_far, block: _save_partial(so_far, block, partial),
        start=_load_partial(partial, origin, blocks.fingerprint, needs),
    )
    save_statistics(statistics, out)
    partial.unlink(missing_ok=True)
    return statistics


def _save_partial(statistics: Statistics, next_block: int, path: Path) -> None:
    marked = dataclasses.replace(statistics, provenance={**statistics.provenance, "next_block": next_block})
    save_statistics(marked, path)


def _load_partial(
    path: Path, origin: dict[str, Any], data_fingerprint: str, needs: tuple[str, ...]
) -> tuple[Statistics, int] | None:
    """What an interrupted run with the same model, data and needs left behind, if anything."""
    if not path.is_file():
        return None
    statistics = load_statistics(path)
    try:
        check_same_origin(statistics.provenance, origin)
    except StatisticsError:
        return None
    if statistics.provenance["data_fingerprint"] != data_fingerprint or set(statistics.names) != set(needs):
        return None
    provenance = {k: v for k, v in statistics.provenance.items() if k != "next_block"}
    return dataclasses.replace(statistics, provenance=provenance), statistics.provenance["next_block"]


def plan(
    statistics: Sequence[Path],
    *,
    method: Annotated[str, Help("compression method; see locum list")] = "lightmoe",
    remove: Remove = None,
    fit: Fit = None,
    onto: Annotated[Path | None, Help("add the method's routing policy to the plan in this file")] = None,
    out: Out = None,
    force: Force = False,
    **options: Any,
) -> Plan:
    """Decide what becomes of every expert, from statistics alone. Several statistics files are added up.

    A method that needs no statistics takes a checkpoint folder as well.
    """
    files = [statistics] if isinstance(statistics, (str, Path, Statistics)) else list(statistics)
    out = None if out is None else check_output(out, force, inputs=[*files, onto])
    chosen = _chosen(method, options)
    _check_target(remove, fit, method=chosen)
    base = None if onto is None else onto if isinstance(onto, Plan) else load_plan(onto)
    if base is not None and chosen.saves != "active":
        raise OptionError(f"--onto adds a routing policy to a plan, and method {chosen.name} has none")
    shape, total, origin = _planned_from(files, chosen)
    chosen = _as_searched(chosen, options, total)
    made = {"method": chosen.name, "options": dataclasses.asdict(chosen)}

    def build(amount: float) -> Plan:
        return make_plan(shape, chosen.plan(total, shape, amount), **made)

    if chosen.saves == "active":
        result = build(1.0)
    else:
        result = search(build, shape, remove, None if fit is None else parse_size(fit))
    origin["target"] = {"remove": remove, "fit": fit}
    if base is not None:
        result = _joined(base, result, shape)
        origin |= {key: value for key, value in base.provenance.items() if key in (*origin, "statistics_file")}
    result = with_provenance(result, **provenance(**origin))
    if out is not None:
        save_plan(result, out)
    return result


def _joined(base: Plan, policy: Plan, shape: ModelShape) -> Plan:
    """The base plan with the policy's routing."""
    joined = with_routing(base.validate(shape), {layer.layer: layer.routing for layer in policy.layers}, shape)
    joined = dataclasses.replace(joined, method=f"{base.method} + {policy.method}", options=policy.options)
    return with_provenance(joined, onto={"plan": base.id, "method": base.method, "options": base.options})


def _planned_from(
    files: Sequence[Path | Statistics], chosen: Any
) -> tuple[ModelShape, Statistics | None, dict[str, Any]]:
    """Shape and statistics to plan from, and what the plan's provenance says of them."""
    folder = next((f for f in files if not isinstance(f, Statistics) and Path(f).is_dir()), None)
    if folder is None:
        loaded = [s if isinstance(s, Statistics) else load_statistics(s) for s in files]
        total = loaded[0]
        for more in loaded[1:]:
            total = total + more
        named = [str(s) for s in files if not isinstance(s, Statistics)]
        known = {key: total.provenance[key] for key in ("model_fingerprint", "data_fingerprint")}
        return total.shape, total, {"statistics_file": named[0] if len(named) == 1 else named} | known
    if chosen.needs() or len(files) > 1:
        made_by = "search" if hasattr(chosen, "explore") else "calibrate"
        raise OptionError(
            f"{folder} is a folder, and method {chosen.name} plans from statistics files; make one with locum {made_by}"
            if chosen.needs()
            else f"{folder} is a checkpoint; give it alone, or statistics files"
        )
    shape = checkpoint.read_shape(folder)
    check_openable(folder, "make plans for the original checkpoint")
    return shape, None, {"model_fingerprint": checkpoint.fingerprint_checkpoint(folder)}


def _as_searched(chosen: Any, given: dict[str, Any], statistics: Statistics | None) -> Any:
    """A searching method with the options that its statistics were searched with; others cannot be given any more."""
    search = None if statistics is None else statistics.provenance.get("search")
    if not hasattr(chosen, "explore") or search is None:
        return chosen
    if search["method"] != chosen.name:
        raise StatisticsError(
            f"the statistics were searched for method {search['method']}, not {chosen.name}; search again"
        )
    searched = {name: search["options"][name] for name in chosen.searched_with}
    for name, value in searched.items():
        if name in given and given[name] != value:
            raise StatisticsError(
                f"the statistics were searched with --{name.replace('_', '-')} {value}, the plan asks for {given[name]}; leave "
                f"that out to plan with what was found, or run `locum search` again"
            )
    return dataclasses.replace(chosen, **searched)


def shape_behind(path: Path) -> ModelShape:
    """The shape of the model that a statistics file or a checkpoint folder is of."""
    return checkpoint.read_shape(path) if Path(path).is_dir() else load_statistics(path).shape


def diff(a: Path, b: Path) -> list[str]:
    """What two plans do differently, one line per expert."""
    return diff_plans(load_plan(a), load_plan(b))


def apply(
    model: Path,
    *,
    plan: Annotated[Path, Help("the plan file")],
    out: Out,
    statistics: Annotated[
        Path | None, Help("statistics for a plan with constants or whitened adapters; default: those it was made from")
    ] = None,
    seed: Seed = 0,
    force: Force = False,
    progress: Progress = _silent,
) -> Path:
    """Carry out a plan: a checkpoint folder with weights, config, tokenizer, plan and model card."""
    model = Path(model)
    out = check_output(_needed(out, "out"), force, "folder", inputs=[model, plan, statistics])
    _check_number("seed", seed, 0, MOST_SEED)
    decided = plan if isinstance(plan, Plan) else load_plan(plan)
    shape = checkpoint.read_shape(model)
    check_openable(model, "apply the plan to the original checkpoint")
    decided.validate(shape)
    observed = _statistics_for(decided, statistics, model) if decided.needs else None
    tokenizer = checkpoint.load_tokenizer(model)
    live = open_model(model)
    count, timed = 0, _timed(progress)

    def step(layer: str) -> None:
        nonlocal count
        count += 1
        timed("apply", count, len(decided.layers))

    apply_plan(live, decided, observed, seed, step)
    made = provenance(
        original=str(model.resolve()),
        original_fingerprint=checkpoint.fingerprint_checkpoint(model),
        original_shape=shape.to_json(),
        plan=decided.id,
        seed=seed,
    )
    save_checkpoint(live, tokenizer, out, decided, model_card(decided, shape, out.name, made), model, made)
    return out


def _statistics_for(plan: Plan, statistics: Path | Statistics | None, model: Path) -> Statistics:
    """The statistics that carrying out a plan reads: those given, or those that the plan names."""
    source = statistics or plan.provenance.get("statistics_file")
    if source is None or isinstance(source, list) or (statistics is None and not Path(source).is_file()):
        gone = f" (made from {source}, which is not there)" if isinstance(source, str) else ""
        raise PlanError(
            f"the plan has constants or whitened adapters, which are made from statistics ({', '.join(plan.needs)}){gone}; "
            f"name them with --statistics"
        )
    loaded = source if isinstance(source, Statistics) else load_statistics(source)
    if loaded.shape.fingerprint != plan.shape_fingerprint:
        raise StatisticsError(
            f"the statistics were collected on another model ({loaded.shape.model_type}, {len(loaded.shape.layers)} MoE "
            f"layers) than {model}; name those that the plan was made from"
        )
    for layer in plan.layers:
        check_statistics(layer, loaded.layer(layer.layer))
    return loaded


def _chosen(method: str, options: dict[str, Any]) -> Any:
    """A method with its options. Raises OptionError for an unknown method, option or criterion."""
    chosen = make_options(METHODS[method], options)
    chosen.needs()  # knows the criterion
    return chosen


def _check_target(remove: float | None, fit: str | None, shape: ModelShape | None = None, method: Any = None) -> None:
    """Fail on a target that can never be met before an hour of calibration, not after."""
    if method is not None and method.saves == "active":
        if (remove, fit) != (None, None):
            raise OptionError(
                f"method {method.name} saves active parameters, not stored ones: every expert stays in the checkpoint, so "
                f"there is nothing to --remove or to --fit; its own options say how much it saves (locum list)"
            )
        return
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
        "active_parameters": [active_parameters(shape), active_parameters(shape, decided)],
        "bytes": [shape.bytes, size.bytes],
        "stock_layout": decided.is_stock(shape),
        "replaced_per_layer": [len(layer.replaced) for layer in decided.layers],
        "experts_per_layer": [len(layer.survivors) for layer in decided.layers],
    }
