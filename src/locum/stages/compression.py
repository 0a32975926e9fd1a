"""`compress`: from a checkpoint to a smaller one in one call."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from .. import ranks
from ..budgets.target import Target
from ..checkpoints.read import fingerprint_checkpoint, load_tokenizer
from ..checkpoints.rest import pack_rest, saved_bytes
from ..checkpoints.rewrite import Rewriting
from ..checkpoints.side_files import side_files
from ..checkpoints.skeleton import open_source, read_shape, shape_in
from ..data.documents import parse_sources
from ..data.tokens import load_tokens
from ..errors import LocumError, OptionError, PlanError
from ..experts.parts.low_rank import LowRank
from ..files import check_output, check_room, clear, versions, write_text
from ..formats.schemes import Scheme, scheme_of
from ..measure.removals import SAMPLE
from ..methods import METHODS, SAVED, Method, SearchingMethod
from ..places import name_of, remember
from ..plans.bits import FewBits
from ..plans.plan import KEPT, LayerPlan, Plan, make_plan, with_provenance
from ..runs import beside, bytes_begun
from ..shapes import ModelShape
from ..stats.definitions import STATISTICS
from ..stats.statistics_file import load_statistics
from ..stats.sums import Statistics
from ..training.options import Recovery, make_recovery
from ..training.recovery import check_fits
from . import kept
from .application import Whole, apply, carry_out
from .calibration import calibrate, finished, for_all_ranks, read_text
from .checking import check_plan, estimated_check
from .dry_run import of_application
from .estimate import Estimate
from .inspection import even_statistics
from .options import (
    BatchSize,
    Bits,
    Data,
    Device,
    DryRun,
    Fit,
    Force,
    Group,
    Help,
    Length,
    Out,
    Preset,
    Progress,
    Quantise,
    Remove,
    Rest,
    Seed,
    ToObserve,
    alone,
    check_number,
    needed,
    silent,
)
from .planning import (
    check_statistics_of,
    check_target,
    chosen_method,
    decide,
    few_bits,
    of_weights,
    plan,
    planned,
    reads_text,
)
from .recovery import check_across_ranks
from .recovery import recover as recover_stage
from .rounds import Rounds, check_only_drops
from .searching import Sample, question_of, search, to_collect

PREFIX = "recover_"  # of an option of the training, beside those of the method


@alone
def compress(
    model: Path,
    *,
    data: Data = (),
    out: Out,
    method: Annotated[str, Help("compression method; see locum list")] = "lightmoe",
    preset: Preset = "best",
    remove: Remove = None,
    fit: Fit = None,
    bits: Bits = None,
    group: Group = 32,
    quantiser: Quantise = "gptq",
    rest: Rest = None,
    tokens: ToObserve = 131072,
    sample: Sample = SAMPLE,
    length: Length = 512,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    device: Device = "auto",
    statistics: Annotated[
        Path | None, Help("use this statistics file, or write it there when it does not exist")
    ] = None,
    rounds: Annotated[
        int, Help("drop experts in so many rounds, and estimate anew in each what those that are left are worth")
    ] = 1,
    recover: Annotated[str | None, Help("train the result back, as locum recover --how; default: do not")] = None,
    force: Force = False,
    dry_run: DryRun = False,
    progress: Progress = silent,
    **options: Any,
) -> Path | Estimate:
    """Calibrate (or search, for a method that searches), plan and apply in one, and recover if asked to.

    A method that needs no statistics needs no data. Every option of recover has the prefix recover_ here, as in
    --recover-steps 100. The seed of that training is --seed unless --recover-seed is given.

    The statistics are kept for the next run that asks the same of the same model and text, which then does not calibrate:
    those of the last 8 questions, 8 GiB in all, in the user's cache (locum/statistics). --dry-run does not know them, nor the
    time of a training: ask that of recover, for a smaller checkpoint that is there.

    --fit counts what --rest saves: it is the size of the whole result. The rest is packed last, after any training.

    Of several --rounds each removes an equal share, and --recover trains what each leaves. --statistics are those of the first.
    """
    model = Path(model)
    of_training = {name.removeprefix(PREFIX): value for name, value in options.items() if name.startswith(PREFIX)}
    options = {name: value for name, value in options.items() if not name.startswith(PREFIX)}
    chosen = chosen_method(method, options, preset)
    paths = [source.path for source in parse_sources(data)] if data or reads_text(chosen) or recover else []
    out = check_output(needed(out, "out"), force, "folder", inputs=[model, statistics, *paths])
    check_number("seed", seed, 0)
    recovery, few = recovery_of(recover, of_training, seed), few_bits(bits, group, quantiser, chosen)
    also, shape = _read_besides(few, chosen), read_shape(model)
    packed, saved = _packing(model, rest, group)
    target = check_target(remove, fit, method=chosen, shape=shape, few=few, saved=saved)
    _check_numbers(recovery, fit, model)
    check_rounds(rounds, chosen, shape, few, packed)
    copies = (1 if recovery is None else 2) + (rounds > 1) + (packed is not None)
    check_room(out, _least_bytes(shape, target, few) * copies, bytes_begun(out))
    asked = {"method": method, "preset": preset, "remove": remove, "fit": fit, **options}
    text = {"data": data, "tokens": tokens, "length": length, "seed": seed}
    observed = {**text, "batch_size": batch_size, "device": device, "progress": progress}
    keep = Path(statistics) if statistics is not None else beside(out, "statistics.safetensors")
    how = {"method": method, "preset": preset, "sample": sample, **options}
    if dry_run:
        is_known = not reads_text(chosen) or (statistics is not None and keep.is_file())
        before = [] if is_known else [_observe(model, chosen, how, also, out=keep, dry_run=True, **observed)]
        making = _making(model, chosen, target, out, few, saved, sample=sample, **observed)
        return Estimate.joined("compress", [*before, *making] * rounds)
    shared = {"data": data, "device": device, "seed": seed, "force": force, "progress": progress, "target": target}
    said = {"remove": remove, "fit": fit}
    decide_from = functools.partial(planned, chosen=chosen, options=options, target=target, said=said, few=few)
    if not reads_text(chosen) and rounds == 1:
        return _finish(model, decide_from([model]), None, out, recovery, packed, **shared)
    loaded = _named(keep, model) if reads_text(chosen) and statistics is not None else None
    if reads_text(chosen) and statistics is None:
        loaded = _made_before(keep, model, chosen, text, batch_size=batch_size, sample=sample, also=also)
    loaded = _observe(model, chosen, how, also, out=keep, **observed) if loaded is None else loaded
    if rounds > 1:
        question = {**loaded.origin.words(), **(loaded.asked or {}), **asked, "recovery": _said(recovery, model, data)}
        plan_for = Rounds(model, shape, target, rounds, beside(out, "rounds"), question)
        how_to_observe = functools.partial(_observe, chosen=chosen, how=how, also=also, **observed)
        made = _in_rounds(plan_for, loaded, how_to_observe, asked, out, recovery, shared)
    else:
        decided = decide_from([loaded], model=model if chosen.reads_weights else None)
        decided = check_plan(model, shape, decided, chosen, loaded, target, out=out, sample=sample, **observed)
        decided = decided if statistics is None else _naming(decided, loaded, statistics)
        made = _finish(model, decided, loaded, out, recovery, packed, **shared)
    if statistics is None and reads_text(chosen) and ranks.is_first():
        kept.keep(keep, loaded)  # until here, a run that was cut short goes on from them
    return made


def _observe(
    model: Path, chosen: Method, how: dict[str, Any], also: tuple[str, ...], **observed: Any
) -> Statistics | Estimate:
    """What the method and a quantiser need to know of the model, by a search or a calibration; or of its weights alone."""
    if not reads_text(chosen):
        return of_weights(model, chosen.needs())
    if isinstance(chosen, SearchingMethod):
        return search(model, **how, **observed)
    return calibrate(model, gram=False, also=(*to_collect(chosen), *also), **observed)


def _least_bytes(shape: ModelShape, target: Target | None, few: FewBits | None) -> int:
    """What is written at least."""
    if few is not None:
        return shape.bytes - shape.bytes_of_experts
    if target is None:
        return shape.bytes
    return shape.bytes - int(shape.bytes_of_experts * (1 if target.remove is None else target.remove))


def _making(
    model: Path, chosen: Method, target: Target | None, out: Path, few: FewBits | None, saved: int, **observed: Any
) -> list[Estimate]:
    """Of checking a plan, and of applying it, and of writing that once more where packing its rest saves bytes."""
    checks = estimated_check(model, read_shape(model), chosen, target, **observed)
    making = _applying(model, chosen, target, out, few)
    if not saved:
        return [*checks, making]
    twice = {name: 2 * getattr(making, name) for name in ("seconds", "read_bytes", "written_bytes")}
    return [*checks, dataclasses.replace(making, **twice | {"written_bytes": twice["written_bytes"] - saved})]


def _applying(model: Path, chosen: Method, target: Target | None, out: Path, few: FewBits | None) -> Estimate:
    """Of applying a plan. What the statistics will say is not known: it is made as if all experts mattered alike, or, where the
    method cannot plan from that, keeps every expert."""
    source = open_source(model)
    shape = shape_in(model, source)
    needs = chosen.needs() if not isinstance(chosen, SearchingMethod) else ()
    even = even_statistics(shape, (*needs, *(() if few is None else few.needs)))
    try:
        if chosen.reads_weights or isinstance(chosen, SearchingMethod):
            raise PlanError("it plans from what is not known yet")
        decided = decide(chosen, even if needs else None, shape, target, None, few)
        return of_application(Rewriting(source, shape, decided, even), decided, shape, out, side_files(model))
    except LocumError:
        layers = [LayerPlan(layer.name, (KEPT,) * layer.num_experts) for layer in shape.layers]
        decided = make_plan(shape, layers if few is None else few.applied(layers, shape))
        return of_application(Rewriting(source, shape, decided, even), decided, shape, out, side_files(model))


def _packing(model: Path, rest: str | None, group: int) -> tuple[Scheme | None, int]:
    """What is outside of the experts is to be in, and the bytes that this saves."""
    packed = None if rest is None else scheme_of(rest, group)
    return packed, 0 if packed is None else saved_bytes(open_source(model), packed)


def _read_besides(few: FewBits | None, chosen: Method) -> tuple[str, ...]:
    """The statistics that quantising reads besides those of the method. What cannot be is refused before anything runs."""
    if few is None:
        return ()
    more = tuple(name for name in few.needs if name not in chosen.needs() and STATISTICS[name].on_demand)
    if more and isinstance(chosen, SearchingMethod):
        raise OptionError(
            f"--quantiser {few.quantiser} reads {' and '.join(more)}, which this search does not collect; take --quantiser nearest"
        )
    return more


def _naming(decided: Plan, loaded: Statistics, path: Path) -> Plan:
    """A plan that says from which file the statistics are."""
    remember(loaded.id, path)
    return with_provenance(decided, statistics_file=name_of(path))


def _named(path: Path, model: Path) -> Statistics | None:
    """The statistics in a file that the user named, if it is there."""
    loaded = for_all_ranks(path, load_statistics(path) if ranks.is_first() and path.is_file() else None)
    if loaded is not None:
        check_statistics_of(loaded, model, path)
    return loaded


def _made_before(
    path: Path,
    model: Path,
    chosen: Method,
    text: dict[str, Any],
    *,
    batch_size: int,
    sample: int,
    also: tuple[str, ...],
) -> Statistics | None:
    """The statistics that an interrupted run left, or an earlier one, for the same question, if there are any."""
    if not ranks.told(path.exists() or kept.has_some(fingerprint_checkpoint(model))):
        return None
    _, origin = read_text(model, read_shape(model), split="train", **text)
    if isinstance(chosen, SearchingMethod):
        chosen = dataclasses.replace(chosen, seed=text["seed"])
    asked = question_of(chosen, batch_size=batch_size, sample=sample, also=also)
    found = finished(path, origin, asked)
    if found is None:
        place, found = kept.kept(origin, asked) if ranks.is_first() else (None, None)
        found = for_all_ranks(ranks.told(place), found)
    return found


def recovery_of(how: str | None, options: dict[str, Any], seed: int) -> Recovery | None:
    """How the result is trained back; None if that was not asked for."""
    if how is not None:
        recovery = make_recovery({"seed": seed, **options, "how": how}, PREFIX)
        check_across_ranks(recovery.way, "--recover")
        return recovery
    for name in options:
        flag = f"--{PREFIX}{name}".replace("_", "-")
        raise OptionError(f"{flag} is about training the result back; say how with --recover, or leave {flag} out")
    return None


def check_rounds(
    rounds: int, chosen: Method, shape: ModelShape, few: FewBits | None, packed: Scheme | None = None
) -> None:
    """Refuse what rounds cannot do, as far as it can be told before anything is measured. Raises OptionError."""
    check_number("rounds", rounds, 1, sum(layer.num_experts for layer in shape.layers))
    if rounds == 1:
        return
    for flag in ["--bits"] * (few is not None) + ["--rest"] * (packed is not None):
        raise OptionError(
            f"--rounds drop whole experts; leave {flag} out, and put what they leave into few bits afterwards"
        )
    if chosen.saves != "stored":
        raise OptionError(f"--rounds share what is to be removed, and method {chosen.name} saves {SAVED[chosen.saves]}")
    if not chosen.needs():
        raise OptionError(
            f"--rounds estimate anew what experts are worth, and method {chosen.name} estimates nothing; leave --rounds out"
        )
    if chosen.reads_weights or isinstance(chosen, SearchingMethod):
        return
    try:
        even = chosen.score_experts(even_statistics(shape, chosen.needs()), shape)
        tried = make_plan(shape, chosen.plan(even, shape, 0.5), method=chosen.name)
    except LocumError:  # it cannot plan from what says nothing; the first round tells
        return
    check_only_drops(rounds, tried)


def _in_rounds(
    rounds: Rounds,
    first: Statistics,
    observe: Callable[..., Statistics],
    asked: dict[str, Any],
    out: Path,
    recovery: Recovery | None,
    shared: dict[str, Any],
) -> Path:
    """What several rounds make, from the statistics of the first."""
    model, shape = rounds.model, rounds.shape
    how = {name: shared[name] for name in ("seed", "progress")} | {"statistics": None, "force": True}

    def statistics_of(subject: Path, file: Path) -> Statistics:
        if subject == model:
            return first
        return for_all_ranks(file, _whole(file)) or observe(subject, out=file)

    def planned(loaded: Statistics, subject: Path, target: dict[str, Any]) -> Plan:
        reads = subject if METHODS[asked["method"]].reads_weights else None
        return plan([loaded], model=reads, **{**asked, "remove": None, "fit": None, **target})

    def make(subject: Path, last: Plan, whole: Plan, place: Path) -> None:
        if recovery is None:
            carry_out(model, plan=whole, out=place, **how)
            return
        _finish(subject, last, None, place, recovery, None, of=Whole(model, shape, whole), **{**shared, "force": True})

    made = rounds.run(statistics_of, planned, make)
    if recovery is None:
        return _finish(model, made.whole, None, out, None, None, **shared)
    return _finish(made.subject, made.last, None, out, recovery, None, of=Whole(model, shape, made.whole), **shared)


def _whole(file: Path) -> Statistics | None:
    return load_statistics(file) if ranks.is_first() and file.is_file() else None


def _said(recovery: Recovery | None, model: Path, data: Data) -> dict[str, Any] | None:
    """A training and its text, as the question says it."""
    if recovery is None:
        return None
    blocks = load_tokens(data, load_tokenizer(model), split="train", length=recovery.length, seed=recovery.seed)
    return {**recovery.to_json(), "text": blocks.fingerprint}


def _finish(
    model: Path,
    decided: Plan,
    statistics: Statistics | None,
    out: Path,
    recovery: Recovery | None,
    packed: Scheme | None,
    **shared: Any,
) -> Path:
    """The result of a plan. `out` appears when all is done: what goes before it to be packed lies beside it till then."""
    if packed is None:
        return _make(model, decided, statistics, out, recovery, **shared)
    if decided.is_stock(read_shape(model)) and packed.name != "fp8":
        raise OptionError(
            f"the result is in the stock layout, and transformers does not find experts that are numbers beside layers in "
            f"{packed.words}; put experts into few bits too (--bits), take --rest fp8, or leave --rest out and then locum export "
            f"--to compressed-tensors"
        )
    folder = beside(out, "unpacked")
    place, question = folder / out.name, folder / "question.json"
    asked = {"plan": decided.id, "original": fingerprint_checkpoint(model), "versions": versions()}
    asked |= {"seed": shared["seed"], "recovery": _said(recovery, model, shared["data"])}
    text = json.dumps(asked)
    is_there = question.is_file() and question.read_text(encoding="utf-8") == text
    if recovery is None or not ranks.told(is_there):
        _make(model, decided, statistics, place, recovery, **{**shared, "force": True})
    if ranks.is_first():
        write_text(question, text)  # a training is not done again for what is left to do
        pack_rest(place, packed, out)
    ranks.wait()
    return out


def _make(
    model: Path,
    decided: Plan,
    statistics: Statistics | None,
    out: Path,
    recovery: Recovery | None,
    *,
    data: Data,
    device: str,
    seed: int,
    force: bool,
    progress: Progress,
    target: Target | None,
    of: Whole | None = None,
) -> Path:
    """Apply a plan and train the result if asked to; `out` appears when both are done. A training keeps to the target, too."""
    asked = {"plan": decided, "statistics": statistics, "seed": seed, "progress": progress}
    if recovery is None:
        return apply(model, out=out, force=force, **asked)
    draft, original = beside(out, "unrecovered"), model if of is None else of.model
    try:
        check_fits(recovery.way, decided, "--recover")
        _check_size(recovery, decided, read_shape(model), target)
        carry_out(model, out=draft, force=True, again=of is not None, of=of, **asked)
        training = {"data": data, "original": original, "device": device, "progress": progress, **recovery.to_json()}
        recover_stage(draft, out=out, force=force, **training)
        return out
    except LocumError:
        if ranks.is_first():
            clear(draft)
        raise


def _check_numbers(recovery: Recovery | None, fit: Any, model: Path) -> None:
    """Refuse a limit of a training that leaves no packed weights."""
    if recovery is not None and fit is not None and (source := open_source(model)).packed:
        raise OptionError(
            f"--recover makes numbers in {source.numbers} of all that {model} has packed, so no --fit holds; compress without "
            f"--recover, or give --remove in place of --fit"
        )


def _check_size(recovery: Recovery, decided: Plan, shape: ModelShape, target: Target | None) -> None:
    """Refuse a training that leaves more than --fit allows, and say what does what is asked.

    A smaller --fit would not, as its plan fills that. A plan for what is left of it, made first, has no more experts to train.
    """
    way = recovery.way
    after = way.becomes(decided, shape.layers)
    if target is None or target.fit is None or after is decided or target.excess(after, shape) <= 0:
        return
    before, size = (plan.size(shape).bytes - target.saved for plan in (decided, after))
    left = target.fit - (size - before)
    slots = [slot for layer in decided.layers for slot in layer.slots]
    parts, keeps_all = [part for slot in slots for part in slot.parts], all(slot.is_kept for slot in slots)
    trains_without = any(isinstance(part, LowRank) or (part.is_whole and not part.format) for part in parts)
    advice = ["give --recover-keep-size"] if hasattr(way, "keep_size") and trains_without else []
    if keeps_all and METHODS[decided.method].saves != "bytes":  # more room would change nothing
        advice.append(f"give --fit {size:,}")
    if not target.saved and left > shape.bytes - shape.bytes_of_experts:
        advice.append(
            f"give --fit {left:,} without --recover, and train what that makes, with the same options, by locum recover --how {way.name}"
        )
    elif not keeps_all or not advice:
        advice.append("give --remove in place of --fit: it does not count what a training adds")
    raise OptionError(
        f"--recover {way.name} adds {size - before:,} bytes that stay to the {before:,} of its plan, more than --fit allows "
        f"({target.fit:,}); {', or '.join(advice)}"
    )
