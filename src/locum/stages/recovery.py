"""`recover`: a compressed checkpoint is trained back to strength."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from transformers import PreTrainedModel

from .. import ranks
from ..checkpoints.application import save_checkpoint
from ..checkpoints.card import model_card
from ..checkpoints.card_data import card_data, validated
from ..checkpoints.load import load_model
from ..checkpoints.notes import named_original, notes_for_another, original_of, plan_of
from ..checkpoints.patch import adapter_notes, experts_in, write_adapter
from ..checkpoints.read import base_of, fingerprint_checkpoint, load_tokenizer, read_config
from ..checkpoints.side_files import side_files
from ..checkpoints.skeleton import expert_parameters_in, is_compressed, open_source, read_shape
from ..checkpoints.weight_files import is_adapter
from ..data.documents import parse_sources
from ..data.tokens import Tokens, load_tokens
from ..errors import CheckpointError, OptionError
from ..files import check_output, check_room, provenance
from ..measure.use import Use
from ..models.families import opening_class
from ..models.output_head import vocabulary
from ..models.stored import write_model
from ..places import name_of, remember
from ..plans.plan import Plan, keep_all
from ..runs import beside
from ..shapes import ModelShape
from ..stats.statistics_file import load_statistics
from ..training.context import Original
from ..training.from_files import original_experts
from ..training.kept_logits import keep_logits, kept_bytes
from ..training.layer import old_bytes
from ..training.one_by_one import waiting_bytes
from ..training.options import DEFAULT_WAY, Recovery, make_recovery
from ..training.recovery import batches_of, check_fits, count_trainable, recover_model
from ..training.states import STATE_ITEMSIZE, forget, has_state
from ..training.ways import WAYS, Way
from .dry_run import Training, of_recovery
from .estimate import Estimate
from .layerwise import Retrained, goes_by_layer, train_by_layer
from .opening import is_to_stream
from .options import Data, Device, DryRun, Force, Help, Out, Progress, alone, check_number, device_of, needed, silent
from .planning import check_statistics_of

LOG = "recovery.jsonl"
AROUND = 2**20  # bytes of what is written beside weights: headers, tokenizer, plan, card, log


@alone
def recover(
    model: Path,
    *,
    data: Data,
    out: Out,
    how: Annotated[str, Help("way to recover: what is trained, and how; see locum list")] = DEFAULT_WAY,
    original: Annotated[Path | None, Help("the checkpoint this one was made from; default: as its notes say")] = None,
    device: Device = "auto",
    stream: Annotated[
        bool | None,
        Help("hold one decoder layer in memory at a time, for --how layerwise; default: where the models do not fit"),
    ] = None,
    force: Force = False,
    restart: Annotated[bool, Help("throw away what an interrupted run left instead of going on from it")] = False,
    adapter_only: Annotated[
        bool, Help("write what was trained alone, over the base; for ways that train routers, vectors or a few experts")
    ] = False,
    statistics: Annotated[
        Path | None, Help("what experts are chosen by, for --how esft; default: the first 131,072 tokens of training")
    ] = None,
    validation_tokens: Annotated[int, Help("most tokens that a validation reads, shared over domains")] = 65536,
    dry_run: DryRun = False,
    progress: Progress = silent,
    **options: Any,
) -> dict[str, Any] | Estimate:
    """Train a compressed checkpoint back to strength. An interrupted run goes on where it stopped.

    `options` are those of every run (training/options.py) and those of the way (training/ways/).
    """
    model = Path(model)
    paths = [source.path for source in parse_sources(data)]
    out = check_output(needed(out, "out"), force, "folder", inputs=[model, original, statistics, *paths])
    chosen = make_recovery({"how": how, **options})
    check_across_ranks(chosen.way)
    if adapter_only:
        _check_adapter(chosen.way)
    check_number("validation-tokens", validation_tokens, 1)
    device, shape = device_of(device), read_shape(model)
    side_files(model)  # all of them may go along
    decided = _plan_of(model)
    check_fits(chosen.way, decided)
    source, is_read = None, chosen.way.needs_original(decided)
    if is_read or original is not None:  # one that is not needed is looked at too: it may be a mistake
        source = original_of(model, original, f"--how {how} needs the original")
        if decided is not None:
            decided.validate(read_shape(source))
    notes = notes_for_another(model)
    before = read_shape(source) if source is not None else _original_shape(notes, shape)
    base = _base_of(model, decided, notes) if adapter_only else None
    uses = None if statistics is None else _uses_in(Path(statistics), chosen.way, model)
    by_layer = goes_by_layer(chosen, stream)
    streamed = by_layer and is_to_stream([model, source], stream, device, torch.float32)
    whole = decided or keep_all(shape)
    after = whole.with_result(_becomes(whole.of_result(), chosen.way, shape, by_layer))
    trained = count_trainable(open_source(model).model, decided, chosen, uses)
    written = _written_bytes(model, shape, trained, chosen, by_layer, _old_bytes(decided, chosen.way, source, device))
    written += 0 if after is whole else after.size(before).bytes - whole.size(before).bytes
    workdir, logits = beside(out, "recover"), beside(out, "logits")
    begun = sum(file.stat().st_size for place in (workdir, logits) for file in place.glob("*"))
    check_room(out, written, begun)
    tokenizer, blocks, validation = _read_text(model, data, chosen, validation_tokens)
    if by_layer:
        check_room(out, written := written + waiting_bytes(shape, blocks, validation, chosen), begun)
    if dry_run:
        training = Training(decided, chosen, trained, source if is_read else None, by_layer, streamed)
        return of_recovery(model, training, blocks, validation, device, written, out)
    if restart and ranks.is_first():
        forget(workdir)
        forget(logits)
    ranks.wait()
    training = (whole.of_result(), blocks, validation, chosen)
    where = {"device": device, "workdir": workdir, "progress": _told(progress, chosen)}
    with _forgotten_unless_begun(workdir):
        if by_layer:
            shared = {"streamed": streamed, "trainable": trained, "log": workdir / LOG}
            live, summary = train_by_layer(model, source, *training, **shared, **where)
        else:
            read = source if is_read else None
            live, summary = _train(model, read, *training, uses=uses, logits=logits, **where)
    if ranks.is_first():  # the others have none of the model
        notes |= _notes_of(notes, {**chosen.to_json(), **summary}, blocks.domains, model)
        notes |= {} if after is whole else {"plan": after.id}
        _save(live, tokenizer, out, after, before, model, notes, workdir / LOG, base, paths)
    ranks.wait()
    return {"out": str(out), **summary}


def _read_text(model: Path, data: Data, options: Recovery, most: int) -> tuple[Any, Tokens, Tokens]:
    """The tokenizer, what is trained on, and what is validated on."""
    tokenizer, length = load_tokenizer(model), options.length
    blocks = load_tokens(data, tokenizer, split="train", length=length, seed=options.seed)
    validation = load_tokens(data, tokenizer, split="validation", length=length, tokens=most, keep_partial=True)
    return tokenizer, blocks, validation


def _becomes(plan: Plan, way: Way, shape: ModelShape, by_layer: bool) -> Plan:
    """The plan of the result. Raises OptionError where a training by layer, which rewrites files, cannot make it."""
    after = way.becomes(plan, shape.layers)
    if by_layer and after is not plan:
        raise OptionError(
            f"--how {way.name} writes into the files that are there, so no adapters stay beside weights in few bits "
            f"({', '.join(plan.formats)}); give --keep-size, or use --how kd or --how lora"
        )
    return after


@contextlib.contextmanager
def _forgotten_unless_begun(workdir: Path) -> Iterator[None]:
    """The folder of a training that ends before there is a state to go on from is removed."""
    try:
        yield
    except BaseException:
        if ranks.is_first() and not has_state(workdir):
            forget(workdir)
        raise


def _train(
    model: Path,
    original: Path | None,
    plan: Plan,
    blocks: Tokens,
    validation: Tokens,
    options: Recovery,
    *,
    device: str,
    workdir: Path,
    progress: Callable[[int, int, float], None],
    logits: Path,
    uses: Mapping[str, Use] | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The trained model, and the summary."""
    # Before the model that learns is there: only one of the two is in memory.
    kept = None if original is None else _kept_logits(original, model, blocks, options, device, logits)
    live = load_model(model, device=device)
    unchanged = kept if kept or original is None else _original(original, options.way, live)
    shared = {"original": unchanged, "workdir": workdir, "log": workdir / LOG, "progress": progress, "uses": uses}
    return recover_model(live, plan, blocks, validation, options, **shared)


def _kept_logits(
    original: Path, model: Path, blocks: Tokens, options: Recovery, device: str, folder: Path
) -> Original | None:
    """What the original predicts, where the way wants that kept in its place."""
    if not (top := options.way.top_logits):
        return None
    dtype = open_source(model).model.dtype
    size, mark = vocabulary(open_source(original).model), fingerprint_checkpoint(original)
    load = functools.partial(load_model, original, dtype=dtype, device=device)
    batches = batches_of(blocks, options)
    return Original({}, logits=keep_logits(folder, batches, top, options.way.temperature, mark, size, load))


def _plan_of(model: Path) -> Plan | None:
    """The plan that a checkpoint was made by; None for one that never was compressed."""
    if (decided := plan_of(model)) is None and is_compressed(read_config(model)):
        raise CheckpointError(
            f"{model} has no plan.json, so what stands in for what is not known; apply the plan again"
        )
    return decided


def _original(source: Path, way: Way, live: Any) -> Original:
    """The original as a way needs it: its experts, read one at a time, or all of it, in the dtype of the live model."""
    if way.experts_alone:
        return original_experts(source, live.dtype)
    return Original.of(load_model(source, dtype=live.dtype, device=live.device))


def _old_bytes(plan: Plan | None, way: Way, source: Path | None, device: str) -> int:
    """What old weights take on the disk, where they lie there until they have faded out."""
    is_mapped = source is not None and way.experts_alone and way.needs_original(plan) and device == "cpu"
    return old_bytes(plan, read_shape(source)) if is_mapped else 0


def _written_bytes(model: Path, shape: ModelShape, trained: int, options: Recovery, by_layer: bool, old: int) -> int:
    """The most that a training has on the disk at once: a state while it takes the place of the last one, with old weights or else
    with the result, beside kept logits; of one that goes layer by layer, the experts of all layers and the result."""
    result = shape.bytes + AROUND
    if by_layer:
        return result + expert_parameters_in(model, shape) * shape.expert_itemsize
    state = trained * STATE_ITEMSIZE if options.checkpoint_every else 0
    tokens = options.steps * options.accumulate * options.batch_size * options.length
    return max(2 * state + old, state + result) + kept_bytes(tokens, options.way.top_logits)


def _told(progress: Progress, options: Recovery) -> Callable[[int, int, float], None]:
    """Progress of a training: its loss, and tokens a second since the first step that is told of."""
    first: tuple[float, int] | None = None
    tokens = options.batch_size * options.length * options.accumulate

    def report(done: int, total: int, loss: float) -> None:
        nonlocal first
        now = time.perf_counter()
        first = first or (now, done)
        rate = f", {(done - first[1]) * tokens / (now - first[0]):,.0f} tokens a second" if done > first[1] else ""
        progress(f"recover: loss {loss:.3f}{rate}", done, total)

    return report


def _check_adapter(way: Way) -> None:
    """Refuse a way whose result no adapter holds."""
    if not way.fits_adapter:
        others = [f"--how {name}" for name, cls in WAYS.items() if cls.fits_adapter]
        raise OptionError(
            f"--adapter-only keeps the base's weights, and --how {way.name} trains them; use {' or '.join(others)}"
        )


def _uses_in(statistics: Path, way: Way, model: Path) -> dict[str, Use]:
    """How text uses the experts of a model, from statistics of it. Raises OptionError for a way that does not read it."""
    if not way.reads_use:
        others = [f"--how {name}" for name, cls in WAYS.items() if cls.reads_use]
        raise OptionError(
            f"--statistics says which experts to train, and --how {way.name} does not choose; use {' or '.join(others)}"
        )
    loaded = load_statistics(statistics)
    check_statistics_of(loaded, model, statistics)
    found = {}
    for shape in loaded.shape.layers:
        layer = loaded.layer(shape.name)
        found[shape.name] = Use(loaded.tokens, shape.top_k, layer["count"].double(), layer["gate_sum"].double())
    return found


def check_across_ranks(way: Way, flag: str = "--how") -> None:
    """Refuse a way that several ranks cannot share. Raises OptionError."""
    if ranks.count() > 1 and not way.across_ranks:
        shared = " or ".join(f"{flag} {name}" for name, cls in WAYS.items() if cls.across_ranks)
        raise OptionError(
            f"{flag} {way.name} trains in one process, these are {ranks.count()}; start one, or use {shared}"
        )


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
    data: list[Path],
) -> None:
    """Write a recovered checkpoint, or, given a base, the adapter over it. `before` is the original's shape."""
    notes.pop("adapter", None)  # of an adapter that was trained on
    experts = {}
    if base is not None:
        notes["recovery"].pop("numbers", None)  # its base is as it was
        experts = _with_those_before(model, notes["recovery"].get("trained_experts") or {})
        notes["adapter"] = adapter_notes(live, base, experts)
    notes["recovery"] = _counted(notes["recovery"])
    opens = opening_class(live.config)
    writer = live.write if isinstance(live, Retrained) else functools.partial(write_model, live)
    about = {"relation": "finetune", "over": base, "data": data, "name": out.name}
    data = card_data(model, opens, results=validated(notes["recovery"]), **about)
    card = model_card(plan, before, out.name, notes, opens, data)
    write = writer if base is None else functools.partial(write_adapter, live, experts=experts)
    is_told = plan_of(model) is not None or base is not None or not all(layer.is_identity for layer in plan.layers)
    kept = plan if is_told else None
    save_checkpoint(write, tokenizer, out, kept, card, model, notes, extra=[log])


def _with_those_before(model: Path, experts: dict[str, list[int]]) -> dict[str, list[int]]:
    """What an adapter brings: the experts that were trained, and those of the adapter that they were trained in."""
    before = experts_in(model) if is_adapter(model) else {}
    return {name: sorted({*before.get(name, ()), *experts.get(name, ())}) for name in {**before, **experts}}


def _counted(recovery: dict[str, Any]) -> dict[str, Any]:
    """What is noted of a training, with the number of trained experts in each layer; which ones its log says."""
    chosen = recovery.get("trained_experts")
    return recovery if chosen is None else recovery | {"trained_experts": {n: len(e) for n, e in chosen.items()}}


def _base_of(model: Path, plan: Plan | None, notes: dict[str, Any]) -> Path:
    """What an adapter trained on `model` goes over: the original where the plan changes nothing but routing, and no
    weight was trained since."""
    if is_adapter(model):
        return base_of(model)
    only_routing = plan is not None and plan.keeps_experts and "recovery" not in notes
    found = named_original(model).place if only_routing else None
    known = found is not None and fingerprint_checkpoint(found) == notes.get("original_fingerprint")
    return found if known else model


def _notes_of(before: dict[str, Any], recovery: dict[str, Any], domains: Iterable[str], model: Path) -> dict[str, Any]:
    """What is noted of a training: its summary, the domains of this training and of those before it, what packed weights became, and the
    original, which is the model itself where none was noted."""
    earlier, opened = before.get("recovery", {}), open_source(model)
    seen, numbers = earlier.get("domains"), opened.numbers if opened.packed else earlier.get("numbers")
    all_seen = dict.fromkeys(map(str, [*(seen if isinstance(seen, list) else ()), *domains]))
    original: dict[str, Any] = {}
    if "original" not in before:
        mark = fingerprint_checkpoint(model)
        original = {
            "original": name_of(model),
            "original_fingerprint": mark,
            "original_shape": read_shape(model).to_json(),
        }
        remember(mark, model)
    summary = {**recovery, **({"numbers": numbers} if numbers else {}), "domains": list(all_seen)}
    return provenance(recovery=summary, recovered_from=name_of(model), **original)


def _original_shape(notes: dict[str, Any], shape: ModelShape) -> ModelShape:
    return ModelShape.from_json(notes["original_shape"]) if "original_shape" in notes else shape
