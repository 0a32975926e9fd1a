"""`calibrate`: one pass over text becomes a statistics file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from ..checkpoints.convert import check_openable
from ..checkpoints.load import open_model
from ..checkpoints.read import fingerprint_checkpoint, load_tokenizer
from ..checkpoints.skeleton import read_shape
from ..data.documents import parse_sources
from ..data.tokens import fingerprint_tokenizer, load_tokens
from ..errors import StatisticsError
from ..files import check_output
from ..measure.calibration import calibrate as calibrate_model
from ..stats.statistics_file import load_statistics, save_statistics
from ..stats.sums import Statistics, check_needs, check_same_origin
from .options import (
    BatchSize,
    Data,
    Device,
    Force,
    Help,
    Length,
    Out,
    Progress,
    Seed,
    Split,
    ToObserve,
    check_number,
    device_of,
    needed,
    silent,
)


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
    progress: Progress = silent,
) -> Statistics:
    """One pass over text: what every router and expert does, as additive sums in one file.

    An interrupted pass goes on where it stopped when the same command is given again.
    """
    model = Path(model)
    paths = [source.path for source in parse_sources(data)]
    out = check_output(needed(out, "out"), force, inputs=[model, *paths])
    check_number("batch-size", batch_size, 1)
    needs = check_needs((*check_needs(None), *([also] if isinstance(also, str) else also)))
    device = device_of(device)
    shape = read_shape(model)
    check_openable(model, "calibrate the original checkpoint")
    tokenizer = load_tokenizer(model)
    blocks = load_tokens(data, tokenizer, split=split, length=length, tokens=tokens, seed=seed)
    origin = {
        "model_fingerprint": fingerprint_checkpoint(model),
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
