"""What the heavy stages would take, measured: each runs its own work on the first layers of the checkpoint, up to the first one
with experts (checkpoints/beginning.py), and counts the other layers like the last of these.

    of_calibration, of_evaluation    the second of two batches
    of_search                        a calibration, then the method's search on one layer
    of_application                   one changed layer is made, and the largest other tensor copied, into a file without a name
    of_recovery                      the third of three steps, and a validation of one batch

Memory is the high-water mark of that, and what the other layers and the sums over all layers add to it.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from ..checkpoints.beginning import Beginning, begin_model
from ..checkpoints.rewrite import Rewriting, Step
from ..checkpoints.skeleton import read_shape
from ..data.tokens import Tokens, take
from ..files import existing_folder
from ..json_text import parse_json
from ..measure.calibration import calibrate
from ..measure.forward_times import ForwardTimes
from ..measure.loss import evaluate
from ..measure.memory import free_bytes, peak_bytes, start_peak
from ..measure.removals import CACHE_BYTES, ModelExplorer
from ..methods import CheckingMethod, Explorer, SearchingMethod
from ..models.families import find_layers
from ..models.layer_major import HELD, held_bytes
from ..plans.plan import LayerPlan, Plan
from ..shapes import ModelShape
from ..stats.sums import Statistics, is_pooled, nbytes
from ..training.context import Original
from ..training.from_files import original_experts
from ..training.layer import old_bytes
from ..training.one_by_one import number_of_batches
from ..training.options import Recovery
from ..training.recovery import recover_model
from .estimate import Estimate, disk_of

ONE_LAYER = "one decoder layer with experts, one batch of {} blocks"


@dataclasses.dataclass(frozen=True)
class Running:
    """How a stage that runs a model over text was asked to."""

    device: str
    dtype: torch.dtype | None
    streamed: bool
    batch_size: int

    @property
    def measured(self) -> str:
        return ONE_LAYER.format(self.batch_size)


def of_calibration(
    model: Path, shape: ModelShape, blocks: Tokens, needs: tuple[str, ...], how: Running, out: Path, on_disk: bool
) -> Estimate:
    """`on_disk`: Gram matrices are added up there."""
    _start(how.device)
    begun = begin_model(model, how.device, how.dtype)
    stamps: list[float] = []
    with ForwardTimes(begun.model, begun.layers) as times:
        calibrate(
            begun.model,
            _two_batches(blocks, how.batch_size),
            batch_size=how.batch_size,
            needs=needs,
            progress=lambda done, total: stamps.append(time.perf_counter()),
            dtype=how.dtype,
        )
    domains, pooled = len(blocks.domains), [name for name in needs if is_pooled(name)]
    sums = nbytes(shape, [name for name in needs if name not in pooled], domains + 1)
    sums += 0 if on_disk else nbytes(shape, pooled)
    count = sum(math.ceil(number / how.batch_size) for number in blocks.domain_B.bincount().tolist() if number)
    seconds = count * times.of_all(stamps[-1] - stamps[-2], begun.of)
    written = 2 * nbytes(shape, needs, domains) + (nbytes(shape, pooled) if on_disk else 0)
    return _of_passes("calibrate", [(begun, shape)], how, blocks.length, count, seconds, sums, written, out)


def of_search(
    calibrated: Estimate,
    model: Path,
    shape: ModelShape,
    blocks: Tokens,
    chosen: SearchingMethod,
    sample: int,
    how: Running,
    statistics: Statistics,
) -> Estimate:
    """A search after its calibration, which would give statistics such as these."""
    begun = begin_model(model, how.device, how.dtype)
    given = {"sample": sample, "batch_size": how.batch_size, "seed": chosen.seed}
    real = ModelExplorer(begun.model, blocks, **given, statistics=statistics)
    explorer = _Timed(real)
    phases: set[str] = set()
    with ForwardTimes(begun.model, begun.layers) as times:
        begin = time.perf_counter()
        chosen.explore(explorer, lambda phase, done, total: phases.add(phase))
        seconds = time.perf_counter() - begin
    layers = len(shape.layers)
    seconds -= explorer.whole_seconds - explorer.saved_seconds + explorer.once_seconds
    # A pass of a whole model begins at the layer that is asked about: it runs half of them in the mean.
    run = begun.of if how.streamed else (begun.of + 1) // 2
    searching = layers * (seconds + times.of_all(explorer.whole_seconds, run))
    searching += times.of_all(explorer.once_seconds, begun.of)
    cached = min(CACHE_BYTES, sum(8 * sample * layer.num_experts**2 for layer in shape.layers))
    states = begun.of * held_bytes(begun.model, sample)
    passes = 0
    if (
        how.streamed
    ):  # of reading every layer: each phase, the recordings, and candidates whose loss is asked, many at a time
        together = max(1, HELD // held_bytes(begun.model, max(batch.ids_BS.numel() for batch in real.batches)))
        of_layer, of_all = (
            sum(math.ceil(asked * len(real.batches) / together) for asked in each)
            for each in (
                [*explorer.asked_of_layer, explorer.stand_ins_of_layer],
                [*explorer.asked_of_all, explorer.noises * layers],
            )
        )
        passes = len(phases) + 2 + layers * of_layer + of_all
    tried = dataclasses.replace(
        calibrated,
        stage="try removals",
        measured="the whole search of one layer",
        seconds=searching + passes * begun.of * begun.layer_seconds,
        memory_bytes=_peak(how.device) + (0 if how.streamed else begun.missing_bytes) + cached + states,
        read_bytes=passes * shape.bytes,
        written_bytes=0,
    )
    return Estimate.joined("search", [calibrated, tried])


def of_check(
    model: Path, shape: ModelShape, blocks: Tokens, chosen: CheckingMethod, sample: int, seed: int, how: Running
) -> Estimate:
    """Of a check of plans on the model (checking.py), each in as many passes as there are layers, and one. Building layers is not counted."""
    begun = begin_model(model, how.device, how.dtype)
    explorer = ModelExplorer(begun.model, blocks, sample=sample, batch_size=how.batch_size, seed=seed)
    with ForwardTimes(begun.model, begun.layers) as times:
        explorer.divergences([{}])  # with a pass of the original
        begin = time.perf_counter()
        explorer.divergences([{}])
        taken = time.perf_counter() - begin
    count = (1 + chosen.checks) * (1 + len(shape.layers))
    together = max(1, HELD // held_bytes(begun.model, max(x.ids_BS.numel() for x in explorer.batches)))
    reads = math.ceil(count * len(explorer.batches) / together) if how.streamed else 1
    seconds = (1 + count) * times.of_all(taken, begun.of)
    return Estimate(
        "check",
        ONE_LAYER.format(how.batch_size),
        seconds + reads * begun.of * begun.layer_seconds,
        _peak(how.device) + (0 if how.streamed else begun.missing_bytes),
        reads * shape.bytes,
        0,
        free_bytes(how.device),
    )


def of_evaluation(
    models: Sequence[tuple[Path, ModelShape]], blocks: Tokens, how: Running, out: Path | None
) -> Estimate:
    """Of a model, or of one and its original."""
    _start(how.device)
    begun = [begin_model(model, how.device, how.dtype) for model, _ in models]
    stamps: list[float] = []
    with ForwardTimes(begun[0].model, begun[0].layers) as times:
        evaluate(
            begun[0].model,
            _two_batches(blocks, how.batch_size),
            against=begun[1].model if len(begun) > 1 else None,
            batch_size=how.batch_size,
            resamples=1,
            progress=lambda done, total: stamps.append(time.perf_counter()),
        )
    count = math.ceil(len(blocks) / how.batch_size)
    seconds = count * times.of_all(stamps[-1] - stamps[-2], begun[0].of)
    opened = [(one, shape) for one, (_, shape) in zip(begun, models, strict=True)]
    return _of_passes("eval", opened, how, blocks.length, count, seconds, 0, 0, out)


def of_application(
    rewriting: Rewriting, plan: Plan, shape: ModelShape, out: Path, side_files: Iterable[Path]
) -> Estimate:
    """Of writing what a plan makes."""
    _start("cpu")
    changed = [step for step in rewriting.steps if step.layer and _is_changed(plan, step.layer)]
    others = [step for step in rewriting.steps if step not in changed]
    seconds = read = 0.0
    with tempfile.TemporaryFile(dir=existing_folder(out)) as file:
        for steps in filter(None, (changed, others)):
            one, before = max(steps, key=lambda step: step.bytes), rewriting.read_bytes
            like_it = sum(step.bytes for step in steps) / max(one.bytes, 1)
            seconds += like_it * _seconds_of(one, file)
            read += like_it * (rewriting.read_bytes - before)
    return Estimate(
        "apply",
        "one layer that the plan changes, and one copied tensor" if changed else "one copied tensor",
        seconds,
        peak_bytes(torch.device("cpu")),
        round(read),
        rewriting.needed_space(side_files),
        psutil.virtual_memory().available,
        disk_of(out),
    )


@dataclasses.dataclass(frozen=True)
class Training:
    """A training that was asked for."""

    plan: Plan | None
    options: Recovery
    trained: int  # parameters
    original: Path | None  # where the way reads it
    by_layer: bool = False  # layerwise.py
    streamed: bool = False


def of_recovery(
    model: Path, training: Training, blocks: Tokens, validation: Tokens, device: str, written: int, out: Path
) -> Estimate:
    """Of a training whose result and states have `written` bytes."""
    _start(device)
    dtype = torch.float32 if training.by_layer else None
    begun, options = begin_model(model, device, dtype), training.options
    names, plan = {layer.shape.name for layer in find_layers(begun.model)}, training.plan
    if plan is not None:
        layers = tuple(layer for layer in plan.of_result().layers if layer.layer in names)
        plan = dataclasses.replace(plan, layers=layers)
    short = dataclasses.replace(options, steps=3, validate_every=0, checkpoint_every=0)
    few = some_blocks(validation, torch.arange(min(len(validation), options.batch_size)))
    original, theirs = _original(training, begun.model, device)
    with tempfile.TemporaryDirectory() as folder, ForwardTimes(begun.model, begun.layers) as times:
        log = Path(folder) / "log"
        _, said = recover_model(begun.model, plan, blocks, few, short, original, workdir=Path(folder), log=log)
        lines = map(parse_json, log.read_text(encoding="utf-8").splitlines())
        ends = [line["seconds"] for line in lines if line["event"] == "step"]
    step, each = times.of_all(ends[-1] - ends[-2], begun.of), times.of_all(said["seconds"] - ends[-1], begun.of)
    validated = 1 + options.steps // options.validate_every if options.validate_every else 2
    validations = validated * math.ceil(len(validation) / options.batch_size)
    # Kept logits are made once for every block, so they may take less.
    step += times.of_all(said.get("logits_seconds", 0) / short.steps, begun.of)
    moments = 4 * 4 * max(0, training.trained - said["trainable_parameters"])  # and gradients, and the best state
    activations = (begun.of - len(begun.layers)) * (0 if said["checkpointed"] else said["layer_activation_bytes"])
    read = read_shape(model).bytes + _read_of_original(training)
    others, rest = begun.missing_bytes + moments + activations, 0 if theirs is None else theirs.missing_bytes
    others = max(others, rest) if options.way.top_logits else others + rest  # kept logits: one model after the other
    passes = 1
    if training.by_layer:  # all batches wait at a layer
        count = number_of_batches(blocks, options) * options.batch_size * options.length + validation.ids_BS.numel()
        others = min(HELD, held_bytes(begun.model, count)) + (
            0 if training.streamed else others - moments - activations
        )
        passes = 2 if training.streamed else 1  # models are read for validation too
    return Estimate(
        "recover",
        f"three steps of {options.batch_size} blocks through the layers up to the first one with experts",
        options.steps * step + validations * each + passes * begun.of * begun.layer_seconds,
        _peak(device) + others,
        passes * read,
        written,
        free_bytes(device),
        disk_of(out),
    )


def _original(training: Training, live: Any, device: str) -> tuple[Original | None, Beginning | None]:
    if training.original is None:
        return None, None
    if training.options.way.experts_alone:
        return original_experts(training.original, live.dtype), None
    begun = begin_model(training.original, device, live.dtype)
    return Original.of(begun.model), begun


def _read_of_original(training: Training) -> int:
    if training.original is None:
        return 0
    shape = read_shape(training.original)
    return old_bytes(training.plan, shape) if training.options.way.experts_alone else shape.bytes


def _is_changed(plan: Plan, layer: str) -> bool:
    found = plan.layer(layer)
    return found is not None and not found.is_identity


def _seconds_of(step: Step, file: Any) -> float:
    begin = time.perf_counter()
    step.fill(_Nowhere(file))  # type: ignore[arg-type]
    file.flush()
    return time.perf_counter() - begin


class _Nowhere:
    """Takes what a ShardWriter takes, into a file that nobody will see."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, name: str, pieces: Iterable[Any], begin: int = 0) -> None:
        self._file.seek(0)
        for piece in pieces:
            self._file.write(piece)


class _Timed:
    """An explorer that adds up the seconds of questions that run the whole model, and notes how many candidates each has: those
    about one layer, and about all."""

    def __init__(self, explorer: Explorer) -> None:
        self._explorer, self.shape, self.whole_seconds, self.once_seconds = explorer, explorer.shape, 0.0, 0.0
        self.saved_seconds = 0.0  # of those that run the whole model: what was not run
        self.stand_ins_of_layer = self.noises = 0
        self.asked_of_layer: list[int] = []
        self.asked_of_all: list[int] = []
        self.statistics, self.together = explorer.statistics, explorer.together
        self.output_square, self.divergences = explorer.output_square, explorer.divergences
        self.output_error, self.block_error, self.prune = explorer.output_error, explorer.block_error, explorer.prune

    def loss_increase(self, layer: str, removed_CE: Tensor) -> Tensor:
        begin = time.perf_counter()
        self.asked_of_layer.append(len(removed_CE))
        try:
            return self._explorer.loss_increase(layer, removed_CE)
        finally:
            self.whole_seconds += time.perf_counter() - begin

    def stand_ins(self, plans: Sequence[LayerPlan], with_losses: bool) -> tuple[Tensor, Tensor]:
        error_CE, loss_C = self._explorer.stand_ins(plans, False)
        if with_losses:  # the last one, which is built already, stands for all
            self.stand_ins_of_layer += len(plans)
            begin = time.perf_counter()
            (last,) = self._explorer.divergences([{plans[-1].layer: plans[-1]}])
            taken = time.perf_counter() - begin
            self.whole_seconds += len(plans) * taken
            self.saved_seconds += (len(plans) - 1) * taken
            loss_C = last.expand(len(plans))
        return error_CE, loss_C

    def noise_price(self, size: float) -> Tensor:
        begin, self.noises = time.perf_counter(), self.noises + 1
        try:
            return self._explorer.noise_price(size)
        finally:
            self.whole_seconds += time.perf_counter() - begin

    def loss_without(self, candidates: Sequence[Mapping[str, Tensor]]) -> Tensor:
        return self._once(self._explorer.loss_without, candidates)

    def loss_merged(self, candidates: Sequence[Mapping[str, Tensor]]) -> Tensor:
        return self._once(self._explorer.loss_merged, candidates)

    def _once(self, ask: Callable[[Any], Tensor], candidates: Any) -> Tensor:
        begin = time.perf_counter()
        self.asked_of_all.append(len(candidates))
        try:
            return ask(candidates)
        finally:
            self.once_seconds += time.perf_counter() - begin


# --- what they share --------------------------------------------------------------------------------------------


def _of_passes(
    stage: str,
    opened: Sequence[tuple[Beginning, ModelShape]],
    how: Running,
    length: int,
    count: int,
    seconds: float,
    sums: int,
    written: int,
    out: Path | None,
) -> Estimate:
    """Of `count` batches that took so many seconds to compute, and `sums` that are held beside the models."""
    held = held_bytes(opened[0][0].model, how.batch_size * length)
    together = max(1, HELD // held)
    times_read = math.ceil(count / together) if how.streamed else 1
    memory = _peak(how.device) + sums + (min(count, together) * held if how.streamed else 0)
    read = 0
    for begun, shape in opened:
        memory += 0 if how.streamed else begun.missing_bytes
        read += times_read * shape.model.bytes
        seconds += times_read * begun.of * begun.layer_seconds
    disk = disk_of(out)
    return Estimate(stage, how.measured, seconds, memory, read, written, free_bytes(how.device), disk)


def _two_batches(blocks: Tokens, batch_size: int) -> Tokens:
    """Two whole batches of the first domain, with blocks again where it has few."""
    of_it_B = (blocks.domain_B == blocks.domain_B[0]).nonzero().flatten()
    chosen_B = of_it_B[torch.arange(2 * batch_size) % len(of_it_B)]
    return some_blocks(blocks, chosen_B)


def some_blocks(blocks: Tokens, chosen_B: Tensor) -> Tokens:
    return dataclasses.replace(blocks, **vars(take(blocks, chosen_B)))


def _start(device: str) -> None:
    start_peak(torch.device(device))


def _peak(device: str) -> int:
    return peak_bytes(torch.device(device))
