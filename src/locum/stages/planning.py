"""`plan`: statistics become a plan; `diff`: two plans compared."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from ..arguments import in_declared_forms
from ..budgets.target import Target, check_met, meet_target, parse_size
from ..checkpoints.convert import check_openable
from ..checkpoints.experts_of import expert_readers, weights_events
from ..checkpoints.read import fingerprint_checkpoint, load_tokenizer
from ..checkpoints.skeleton import read_shape
from ..containers.layout import active_parameters, experts_per_token
from ..criteria.super_experts import NEEDS as SUPER_EXPERTS_NEED
from ..criteria.super_experts import super_experts
from ..data.tokens import fingerprint_tokenizer
from ..errors import OptionError, StatisticsError, unknown
from ..files import check_output, provenance
from ..methods import METHODS, SAVED, TARGETED, ExplainingMethod, Method, SearchingMethod, TargetMethod, Weights
from ..methods.levers import REMOVE_LESS, REMOVE_MORE, levers
from ..options import make_options
from ..places import find, name_of, remember
from ..plans.bits import FewBits
from ..plans.layer_plan import LayerPlan
from ..plans.plan import Plan, make_plan, with_provenance, with_routing
from ..plans.plan import diff as diff_plans
from ..plans.plan_file import load_plan, save_plan
from ..shapes import ModelShape
from ..stats.definitions import STATISTICS
from ..stats.events import WeightsEvent
from ..stats.origin import Origin
from ..stats.statistics_file import load_statistics, statistics_id
from ..stats.sums import Statistics
from .calibration import WHITENED
from .options import Bits, Fit, Force, Group, Help, Out, Preset, Quantise, Remove, alone

PRESETS = ("best", "paper")
OF_STATISTICS = ("statistics_file", "statistics", "domains")  # entries of provenance


@alone
def plan(
    statistics: Sequence[Path | Statistics] | Path | Statistics,
    *,
    method: Annotated[str, Help("compression method; see locum list")] = "lightmoe",
    preset: Preset = "best",
    remove: Remove = None,
    fit: Fit = None,
    model: Annotated[Path | None, Help("the checkpoint, for methods that read its weights")] = None,
    bits: Bits = None,
    group: Group = 32,
    quantiser: Quantise = "gptq",
    onto: Annotated[Path | Plan | None, Help("add the method's routing policy to the plan in this file")] = None,
    out: Out = None,
    force: Force = False,
    **options: Any,
) -> Plan:
    """Decide what becomes of every expert, from statistics alone. Several statistics files are added up.

    A method that needs no statistics takes a checkpoint folder as well, one that reads weights needs the checkpoint too. With
    --bits alone, as little is removed as the method can.
    """
    files = list(statistics)
    out = None if out is None else check_output(out, force, inputs=[*files, onto, model])
    chosen = chosen_method(method, options, preset, plan)
    few = few_bits(bits, group, quantiser, chosen)
    target = check_target(remove, fit, method=chosen, few=few)
    base = None if onto is None else onto if isinstance(onto, Plan) else load_plan(onto)
    if base is not None and chosen.saves not in ("active", "devices"):
        raise OptionError(f"--onto adds a routing policy to a plan, and method {chosen.name} has none")
    if base is not None and few is not None:
        raise OptionError(
            "--onto takes experts as the plan in that file has them; give --bits to the command that makes it"
        )
    said = {"remove": remove, "fit": fit}
    result = planned(files, chosen, options, target, said, few=few, base=base, model=model)
    if out is not None:
        save_plan(result, out)
    return result


def planned(
    files: Sequence[Path | Statistics],
    chosen: Method,
    options: dict[str, Any],
    target: Target | None,
    said: dict[str, Any],
    *,
    few: FewBits | None = None,
    base: Plan | None = None,
    model: Path | None = None,
) -> Plan:
    """The work of `plan`, for a method with these `options`. `said` is how provenance says the target."""
    folder = _folder_of(files, chosen, model)
    shape, total, origin = _planned_from(files, chosen)
    if total is not None:
        _check_whole(total, chosen)
    if few is not None:
        _check_quantiser(few, total)
    chosen = as_searched(chosen, options, total)
    weights = read_weights(folder, total) if chosen.reads_weights else None
    result = decide(chosen, total, shape, target, weights, few)
    origin["target"] = said
    origin |= _super_experts(total)
    if base is not None:
        result = _joined(base, result, shape)
        origin |= {key: value for key, value in base.provenance.items() if key in (*origin, *OF_STATISTICS)}
    return with_provenance(result, **provenance(**origin))


def _super_experts(statistics: Statistics | None) -> dict[str, Any]:
    """What a plan's provenance says of the experts that make massive activations, where statistics tell them."""
    if statistics is None or not set(SUPER_EXPERTS_NEED) <= set(statistics.names):
        return {}
    found = zip(statistics.shape.layers, super_experts(statistics, statistics.shape), strict=True)
    return {"super_experts": {layer.name: sorted(experts) for layer, experts in found if experts}}


def decide(
    chosen: Method,
    statistics: Statistics | None,
    shape: ModelShape,
    target: Target | None,
    weights: Weights | None = None,
    few: FewBits | None = None,
) -> Plan:
    """A method's plan for a target; None for a method whose own options say how much, and for few bits alone. It scores once.

    Sizes are those in few bits. A method that plans for a target itself does not know of them, and may do more than it must.
    """

    def meet(other: Method) -> Plan:
        return decided_from(other, other.score_experts(statistics, shape, weights), shape, target, few)

    return decided_from(chosen, chosen.score_experts(statistics, shape, weights), shape, target, few, meet)


def decided_from(
    chosen: Method,
    scored: Any,
    shape: ModelShape,
    target: Target | None,
    few: FewBits | None = None,
    meet: Callable[[Method], Plan] | None = None,
) -> Plan:
    """The same from what the method has scored. Where it misses the target, `meet` plans for it with other options, to advise."""
    more, less = (
        functools.partial(levers, chosen, known, meet) if meet else list for known in (REMOVE_MORE, REMOVE_LESS)
    )
    made = {"method": chosen.name, "options": dataclasses.asdict(chosen)}
    if target is not None and chosen.saves == "bytes":
        target = target.in_bytes(shape)

    def planned(layers: list[LayerPlan]) -> Plan:
        said = {chosen.name: chosen.explain(scored, layers)} if isinstance(chosen, ExplainingMethod) else {}
        return make_plan(shape, layers if few is None else few.applied(layers, shape), **made, provenance=said)

    def build(amount: float) -> Plan:
        return planned(chosen.plan(scored, shape, amount))

    if target is None:
        return build(0.0 if chosen.saves in TARGETED else 1.0)
    if isinstance(chosen, TargetMethod):
        return check_met(planned(chosen.plan_for(scored, shape, target)), shape, target, more, less)
    return meet_target(build, shape, target, more, less)


def read_weights(model: Path, statistics: Statistics | None) -> Weights:
    """A reader of a checkpoint's experts. Raises StatisticsError where the statistics are of another model."""
    if statistics is not None:
        theirs, here = statistics.origin.model_fingerprint, fingerprint_checkpoint(model)
        if theirs != here:
            raise StatisticsError(
                f"the statistics belong to another model (fingerprint {theirs}) than {model} ({here}), and the method "
                f"reads both; name the checkpoint that was calibrated"
            )
    return expert_readers(model)


def _folder_of(files: Sequence[Path | Statistics], chosen: Method, model: Path | None) -> Path | None:
    """The checkpoint whose weights a method reads, before anything is opened."""
    folders = [Path(f) for f in files if not isinstance(f, Statistics) and Path(f).is_dir()]
    if model is not None and not chosen.reads_weights:
        raise OptionError(f"method {chosen.name} reads no weights; leave --model out")
    if model is not None and folders:
        raise OptionError(
            f"{folders[0]} is a folder; give the checkpoint once, alone or with --model beside statistics"
        )
    if model is None and chosen.reads_weights and not folders:
        raise OptionError(f"method {chosen.name} reads the experts' weights; name their checkpoint with --model")
    return Path(model) if model is not None else next(iter(folders), None)


def _joined(base: Plan, policy: Plan, shape: ModelShape) -> Plan:
    """The base plan with the policy's routing on top of what it has."""
    joined = with_routing(base.validate(shape), {layer.layer: layer.routing for layer in policy.layers}, shape)
    joined = dataclasses.replace(joined, method=f"{base.method} + {policy.method}", options=policy.options)
    return with_provenance(joined, onto={"plan": base.id, "method": base.method, "options": base.options})


def _planned_from(
    files: Sequence[Path | Statistics], chosen: Method
) -> tuple[ModelShape, Statistics | None, dict[str, Any]]:
    """Shape and statistics to plan from, and what the plan's provenance says of them."""
    folder = next((f for f in files if not isinstance(f, Statistics) and Path(f).is_dir()), None)
    if folder is None:
        loaded = [s if isinstance(s, Statistics) else load_statistics(s) for s in files]
        total = loaded[0]
        for more in loaded[1:]:
            total = total + more
        named = [s for s in files if not isinstance(s, Statistics)]
        words = total.origin.words()
        known = {key: words[key] for key in ("model_fingerprint", "data_fingerprint")}
        known |= {"statistics": total.id, "domains": list(total.domains)}
        return total.shape, total, _named(named, total) | known
    if not reads_text(chosen) and chosen.needs() and len(files) == 1:
        total = of_weights(Path(folder), chosen.needs())
        return total.shape, total, {"model_fingerprint": total.origin.model_fingerprint}
    if chosen.needs() or len(files) > 1:
        alone = {name for name in chosen.needs() if STATISTICS[name].event is not WeightsEvent} == {*SUPER_EXPERTS_NEED}
        if alone and getattr(chosen, "protect", False):
            raise OptionError(
                f"{folder} is a folder, and only what calibration sees tells the Super Experts that {chosen.name} keeps; give "
                f"a statistics file, or plan from weights alone with --no-protect"
            )
        made_by = "search" if isinstance(chosen, SearchingMethod) else "calibrate"
        raise OptionError(
            f"{folder} is a folder, and method {chosen.name} plans from statistics files; make one with locum {made_by}"
            if chosen.needs()
            else f"{folder} is a checkpoint; give it alone, or statistics files"
        )
    shape = read_shape(folder)
    check_openable(folder, "make plans for the original checkpoint")
    return shape, None, {"model_fingerprint": fingerprint_checkpoint(folder)}


def reads_text(chosen: Method) -> bool:
    """Whether a method needs anything beside weights: statistics of text, or a search."""
    return any(STATISTICS[name].event is not WeightsEvent for name in chosen.needs())


def of_weights(folder: Path, names: tuple[str, ...]) -> Statistics:
    """Statistics of a checkpoint's weights, without any text."""
    shape = read_shape(folder)
    layers = {
        name: {need: STATISTICS[need].increment(event).double()[None] for need in dict.fromkeys(names)}
        for name, event in weights_events(folder)
    }
    return Statistics(("no text",), layers, Origin(shape, fingerprint_checkpoint(folder)), tokens=0)


def _named(files: Sequence[Path], statistics: Statistics) -> dict[str, Any]:
    """How provenance names the files that statistics were read from; where the only one is, is noted."""
    if len(files) == 1:
        remember(statistics.id, files[0])
    names = [name_of(file) for file in files]
    return {"statistics_file": names[0] if len(names) == 1 else names} if names else {}


def statistics_behind(plan: Plan, beside: Path) -> Path | None:
    """The statistics file that a plan was made from, if it is there. `beside` is the folder in which the plan lies."""
    named, mark = (plan.provenance.get(key) for key in ("statistics_file", "statistics"))
    named = named if isinstance(named, str) else ""
    return find(named, mark if isinstance(mark, str) else None, beside, statistics_id).place


def as_searched(chosen: Method, given: dict[str, Any], statistics: Statistics | None) -> Method:
    """A searching method with the options that its statistics were searched with; others cannot be given any more."""
    search = None if statistics is None else statistics.searched
    if not isinstance(chosen, SearchingMethod) or search is None:
        return chosen
    if search.name != chosen.name:
        raise StatisticsError(f"the statistics were searched for method {search.name}, not {chosen.name}; search again")
    searched = {name: search.options[name] for name in chosen.searched_with}
    for name, value in searched.items():
        if name in given and given[name] != value:
            raise StatisticsError(
                f"the statistics were searched with --{name.replace('_', '-')} {value}, the plan asks for {given[name]}; leave "
                f"that out to plan with what was found, or run `locum search` again"
            )
    return dataclasses.replace(chosen, **searched)


def _check_whole(statistics: Statistics, chosen: Method) -> None:
    """Everything that the method needs must be there, also what is read only when its plan is applied."""
    layer = statistics.layer(statistics.shape.layers[0].name)
    for name in chosen.needs():
        try:
            layer[name]
        except StatisticsError as error:
            if name in SUPER_EXPERTS_NEED and getattr(chosen, "protect", False):
                raise StatisticsError(
                    f"{error}; or plan with --no-protect, which looks for no Super Experts"
                ) from error
            if name not in WHITENED or "start" not in vars(chosen):
                raise
            raise StatisticsError(f"{error}; or plan with --start svd, which reads no Gram matrices") from error


def _check_quantiser(few: FewBits, statistics: Statistics | None) -> None:
    """What the quantiser reads when the plan is applied must be there."""
    advice = "or plan with --quantiser nearest, which reads no statistics"
    if few.needs and statistics is None:
        raise OptionError(f"--quantiser {few.quantiser} reads Gram matrices; plan from a statistics file, {advice}")
    layer = {} if statistics is None else statistics.layer(statistics.shape.layers[0].name)
    for name in few.needs:
        try:
            layer[name]
        except StatisticsError as error:
            raise StatisticsError(f"{error}; {advice}") from error


def shape_behind(path: Path) -> ModelShape:
    """The shape of the model that a statistics file or a checkpoint folder is of."""
    return read_shape(path) if Path(path).is_dir() else load_statistics(path).shape


@in_declared_forms
def diff(a: Path, b: Path) -> list[str]:
    """What two plans do differently, one line per expert."""
    return diff_plans(load_plan(a), load_plan(b))


def chosen_method(
    method: str, options: Mapping[str, Any], preset: str, stage: Callable[..., Any] | None = None
) -> Method:
    """A method with its options, on top of those of the preset. Raises OptionError for anything unknown, which may be meant for
    the stage."""
    if preset not in PRESETS:
        raise OptionError(unknown("preset", preset, PRESETS))
    beside = () if stage is None else inspect.signature(stage).parameters
    published = METHODS[method].published if preset == "paper" else {}
    chosen = make_options(METHODS[method], {**published, **options}, beside)
    chosen.needs()  # knows the criterion
    return chosen


def few_bits(bits: str | None, group: int, quantiser: str, chosen: Method) -> FewBits | None:
    """The bits that were asked for, if any. A method that chooses them itself refuses them."""
    if bits is not None and chosen.saves == "bytes":
        raise OptionError(f"method {chosen.name} chooses the bits of every expert itself; leave --bits out")
    few = FewBits.of(bits or "4", group, quantiser)  # checked in any case
    return few if bits else None


def check_target(
    remove: float | None,
    fit: str | None,
    *,
    method: Method,
    shape: ModelShape | None = None,
    few: FewBits | None = None,
    saved: int = 0,
) -> Target | None:
    """The target, None for a method that saves no stored parameters, and for few bits alone.

    One that can never be met fails before an hour of calibration, not after. `saved` bytes go outside of the experts.
    """
    if method.saves not in TARGETED:
        if (remove, fit) != (None, None):
            raise OptionError(
                f"method {method.name} saves {SAVED[method.saves]}, not stored ones: every expert stays in the checkpoint, so "
                f"there is nothing to --remove or to --fit; its own options say how much it saves (locum list)"
            )
        return None
    if few is not None and (remove, fit) == (None, None):
        return None
    target = Target(remove, None if fit is None else parse_size(fit), saved)
    if target.fit is not None and shape is not None:
        follow = shape.aside.expert_bytes * shape.layers[-1].num_experts + shape.aside.left_bytes
        most = shape.bytes - saved
        rest = most - shape.bytes_of_experts - follow
        if target.fit < rest:
            raise OptionError(
                f"--fit {fit} is out of reach: what is not a routed expert has {rest:,} bytes alone; allow more than "
                f"that, up to {most:,}, the size {'with the rest in few bits' if saved else 'as it is'}"
            )
    return target


def check_statistics_of(statistics: Statistics, model: Path, path: Path) -> None:
    """Statistics that are named for a model must be of that model and tokenizer."""
    ours = {
        "model": (statistics.origin.model_fingerprint, fingerprint_checkpoint(model)),
        "tokenizer": (statistics.origin.tokenizer_fingerprint, fingerprint_tokenizer(load_tokenizer(model))),
    }
    for what, (theirs, here) in ours.items():
        if theirs != here:
            raise StatisticsError(
                f"statistics {path} belong to another {what} (fingerprint {theirs}) than {model} ({here}); calibrate "
                f"this model, or make a plan from them with `locum plan` and apply that"
            )


def _lost(decided: Plan) -> list[str]:
    """The Super Experts that a plan does not keep whole."""
    found = decided.provenance.get("super_experts") or {}
    slots = {layer.layer: layer.slots for layer in decided.layers}
    pairs = ((name, e) for name, experts in found.items() if name in slots for e in experts)
    return [f"{name} expert {e}" for name, e in pairs if not slots[name][e].is_kept]


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
        "experts_per_token": experts_per_token(
            decided.selecting(shape), {layer.layer: layer.routing for layer in decided.layers}
        ),
        "routing": {layer.layer: str(layer.routing) for layer in decided.layers if layer.routing},
        "bytes": [shape.bytes, size.bytes],
        "stock_layout": decided.is_stock(shape),
        "formats": list(decided.formats),
        "dropped_per_layer": [len(layer.slots) - len(layer.survivors) for layer in decided.layers],
        "replaced_per_layer": [len(layer.replaced) for layer in decided.layers],
        "experts_per_layer": [len(layer.survivors) for layer in decided.layers],
        "super_experts": decided.provenance.get("super_experts"),
        "super_experts_lost": _lost(decided),
    }
