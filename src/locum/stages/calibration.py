"""`calibrate`: one pass over text becomes a statistics file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from transformers import PreTrainedModel

from .. import ranks
from ..checkpoints.convert import check_openable
from ..checkpoints.load import open_model
from ..checkpoints.read import fingerprint_checkpoint, load_tokenizer
from ..checkpoints.skeleton import read_shape
from ..data.documents import parse_sources
from ..data.tokens import Tokens, fingerprint_tokenizer, load_tokens
from ..errors import OptionError, StatisticsError
from ..experts.parts.low_rank import STARTS
from ..experts.quantisers import BORROWED
from ..files import check_output, check_room, clear, existing_folder, free_space
from ..measure.calibration import calibrate as calibrate_model
from ..measure.calibration import check_start, question
from ..places import name_of, remember
from ..runs import beside_for_rank, other_versions, set_aside
from ..shapes import ModelShape
from ..stats.origin import Origin
from ..stats.statistics_file import load_statistics, save_statistics
from ..stats.sums import Statistics, check_needs, is_pooled, nbytes
from . import dry_run as dry_runs
from .estimate import Estimate
from .opening import Precision, Stream, check_stock, dtype_of, free_bytes, is_to_stream, open_to_run
from .options import (
    BatchSize,
    Counted,
    Data,
    Device,
    DryRun,
    Force,
    Help,
    Length,
    Out,
    Progress,
    Seed,
    Split,
    ToObserve,
    alone,
    check_number,
    device_of,
    needed,
    silent,
)

WHITENED = STARTS["whitened"].needs


@alone
def calibrate(
    model: Path,
    *,
    data: Data,
    out: Out,
    tokens: ToObserve = 131072,
    length: Length = 512,
    batch_size: BatchSize = 8,
    split: Split = "train",
    gram: Annotated[
        bool, Help("collect the Gram matrices that whitened starts read; they take the most memory")
    ] = True,
    also: Annotated[Sequence[str], Help("statistics on demand to collect too; see locum list")] = (),
    seed: Seed = 0,
    device: Device = "auto",
    stream: Stream = None,
    precision: Precision = "auto",
    force: Force = False,
    dry_run: DryRun = False,
    progress: Progress = silent,
) -> Statistics | Estimate:
    """One pass over text: what every router and expert does, as additive sums in one file.

    An interrupted pass goes on where it stopped when the same command is given again.
    """
    model = Path(model)
    paths = [source.path for source in parse_sources(data)]
    out = check_output(needed(out, "out"), force, inputs=[model, *paths])
    check_number("batch-size", batch_size, 1)
    needs = with_defaults([*(WHITENED if gram else ()), *also])
    device = device_of(device)
    shape = read_shape(model)  # refuses what is not supported
    check_openable(model, "calibrate the original checkpoint")
    scratch = room_for(shape, needs, len({source.domain for source in parse_sources(data)}), out)
    dtype = dtype_of(precision)
    streamed = is_to_stream([model], stream, device, dtype)
    if streamed:
        check_stock(model)
    cut = {"split": split, "length": length, "tokens": tokens, "seed": seed}
    if dry_run:
        how = dry_runs.Running(device, dtype, streamed, batch_size)
        blocks, _ = read_text(model, shape, data, **cut)
        return dry_runs.of_calibration(model, shape, blocks, needs, how, out, scratch is not None)
    subject = prepare(model, shape, data, device=device, streamed=streamed, dtype=dtype, **cut)
    statistics = observe(subject, needs, out, batch_size=batch_size, scratch=scratch, progress=progress)
    if ranks.is_first():
        keep(statistics, out)
    ranks.wait()
    clear(beside_for_rank(out, "partial"))
    return statistics


def coverage(statistics: Statistics) -> dict[str, Any]:
    """How many tokens each expert saw, by layer, and who saw none or few: fewer than it borrows of its layer where numbers are chosen
    by Gram matrices (experts/quantisers.py), an eighth of the model's width. Empty where experts were not counted."""
    if "count" not in statistics.names:
        return {}
    shape = statistics.shape
    tokens = {layer.name: [int(n) for n in statistics.layer(layer.name)["count"].tolist()] for layer in shape.layers}
    few = {layer.name: math.ceil(BORROWED * layer.hidden_size) for layer in shape.layers}
    never = {name: [e for e, n in enumerate(counts) if n == 0] for name, counts in tokens.items()}
    seldom = {name: [e for e, n in enumerate(counts) if 0 < n < few[name]] for name, counts in tokens.items()}
    return {
        "tokens_per_expert": tokens,
        "never": {name: experts for name, experts in never.items() if experts},
        "few": {name: experts for name, experts in seldom.items() if experts},
        "few_is_below": max(few.values()),
    }


def keep(statistics: Statistics, out: Path) -> None:
    """Write statistics, and note where they are: plans name them by their id."""
    save_statistics(statistics, out)
    remember(statistics.id, out)


def room_for(shape: ModelShape, needs: tuple[str, ...], domains: int, out: Path) -> Path | None:
    """The folder where Gram matrices are added up: that of `out` where they would take more than a quarter of the memory that is
    free, else None. Raises OptionError for what neither memory nor disk can hold, before the model is loaded.

    Sums of every domain are held, and those of the one that is being run.
    """
    pooled = [name for name in needs if is_pooled(name)]
    check_room(out, 2 * nbytes(shape, needs, domains))  # as they are saved now and then, and in the end
    grams, free = nbytes(shape, pooled), free_bytes("cpu")
    apart = nbytes(shape, [name for name in needs if name not in pooled], domains + 1)
    if apart > free:
        raise OptionError(
            f"statistics of this model over {domains} domains take {apart / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB "
            f"are free; name fewer with --also, or calibrate fewer domains at a time"
        )
    if grams <= free // 4:
        return None
    if (needed := 2 * grams) > (room := free_space(out)):  # what is added up, and the file that is written
        raise OptionError(
            f"Gram matrices of this model take {needed / 2**30:.1f} GiB on the disk of {out}, and {room / 2**30:.1f} GiB are free; "
            f"choose another disk, or leave them out (calibrate --no-gram, and plan with --start svd)"
        )
    return existing_folder(out)


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and the text that it is looked at with, for calibration and for search."""

    live: PreTrainedModel
    blocks: Tokens
    origin: Origin
    words: dict[str, object]  # for provenance
    dtype: torch.dtype | None = None  # that was asked for; None: as the checkpoint has it


def prepare(
    model: Path,
    shape: ModelShape,
    data: Sequence[str],
    *,
    split: str,
    length: int,
    tokens: int,
    seed: int,
    device: str,
    streamed: bool = False,
    dtype: torch.dtype | None = None,
) -> Subject:
    """Tokenise the text, then open the model. `shape` is that of its files."""
    blocks, origin = read_text(model, shape, data, split=split, length=length, tokens=tokens, seed=seed)
    words = {"model": name_of(model), "sources": list(blocks.sources), "seed": seed}
    live = open_to_run(model, streamed, device, whole=open_model, dtype=dtype)
    return Subject(live, blocks, origin, words, dtype)


def read_text(model: Path, shape: ModelShape, data: Sequence[str], **cut: Any) -> tuple[Tokens, Origin]:
    """Text in a model's tokens, and what statistics of both would be of; no weights are loaded."""
    tokenizer = load_tokenizer(model)
    blocks = load_tokens(data, tokenizer, **cut)
    model_print, tokenizer_print = fingerprint_checkpoint(model), fingerprint_tokenizer(tokenizer)
    return blocks, Origin(shape, model_print, tokenizer_print, (blocks.fingerprint,))


def observe(
    subject: Subject,
    needs: tuple[str, ...],
    out: Path,
    *,
    batch_size: int,
    progress: Progress,
    scratch: Path | None = None,
) -> Statistics:
    """The pass. What it has now and then is in a file beside `out`, from which it goes on."""
    partial = beside_for_rank(out, "partial")
    told = Counted(progress, "calibrate", len(subject.blocks), subject.blocks.length)
    return calibrate_model(
        subject.live,
        subject.blocks,
        batch_size=batch_size,
        needs=needs,
        origin=subject.origin,
        provenance=subject.words,
        progress=told.blocks,
        on_layer=told.layers,
        on_batch=lambda so_far: save_statistics(so_far, partial),
        start=_left_behind(partial, subject, question(needs, batch_size, subject.dtype)),
        scratch=scratch,
        dtype=subject.dtype,
    )


def with_defaults(also: Sequence[str]) -> tuple[str, ...]:
    """The statistics that calibration collects anyway, and these."""
    return check_needs((*check_needs(None), *also))


def _left_behind(path: Path, subject: Subject, asked: Mapping[str, Any]) -> Statistics | None:
    """What an interrupted pass left behind, if this one can go on from it."""
    if not path.exists():
        return None
    try:
        start = load_statistics(path)
        check_start(start, subject.origin, asked, len(subject.blocks))
        _check_versions(start)
    except StatisticsError as error:
        set_aside(path, f"{path} cannot be gone on from: {_first_part(error)}")
        return None
    return start


def finished(path: Path, origin: Origin, asked: Mapping[str, Any]) -> Statistics | None:
    """Statistics that an interrupted run left behind whole, if they answer what this one asks."""
    return for_all_ranks(path, _finished(path, origin, asked) if ranks.is_first() else None)


def for_all_ranks(path: Path, found: Statistics | None) -> Statistics | None:
    """What the first rank found in a file, if it did; the others read it there."""
    if not ranks.told(found is not None):
        return None
    return found if ranks.is_first() else load_statistics(path)


def _finished(path: Path, origin: Origin, asked: Mapping[str, Any]) -> Statistics | None:
    if not path.exists():
        return None
    try:
        statistics = load_statistics(path)
        differ = statistics.unlike(origin, asked)
        _check_versions(statistics)
        missing = sorted(set(asked["needs"]) - set(statistics.names))
        if missing and not differ:
            differ = f"it lacks {', '.join(missing)}"
    except StatisticsError as error:
        differ = _first_part(error)
    if differ:
        set_aside(path, f"{path} cannot be used again: {differ}")
        return None
    return statistics


def _check_versions(statistics: Statistics) -> None:
    """Raise StatisticsError where other versions made these: their last bits may differ."""
    if differ := other_versions(statistics.provenance.get("versions")):
        raise StatisticsError(f"other versions made it: {differ}")


def _first_part(error: StatisticsError) -> str:
    """What is wrong, without what to do: that is done at once."""
    return str(error).partition(";")[0]
