"""`search`: calibrate, then let a method try removals on the model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

from .. import ranks
from ..checkpoints.convert import check_openable
from ..checkpoints.skeleton import read_shape
from ..data.documents import parse_sources
from ..errors import OptionError, UnsupportedModel
from ..files import check_output, clear, provenance, versions
from ..json_text import parse_json
from ..measure.calibration import question
from ..measure.remembered import RememberedAnswers
from ..measure.removals import SAMPLE, ModelExplorer
from ..methods import CheckedMethod, Method, SearchingMethod
from ..runs import beside, beside_for_rank
from ..shapes import ModelShape
from ..stats.definitions import STATISTICS
from ..stats.events import SearchEvent
from ..stats.origin import SearchedBy
from ..stats.statistics_file import save_statistics
from ..stats.sums import Statistics
from . import dry_run as dry_runs
from .calibration import finished, keep, observe, prepare, read_text, room_for, with_defaults
from .estimate import Estimate
from .inspection import even_statistics
from .opening import Stream, check_stock, is_to_stream
from .options import (
    BatchSize,
    Data,
    Device,
    DryRun,
    Force,
    Help,
    Length,
    Out,
    Preset,
    Progress,
    Seed,
    Split,
    ToObserve,
    alone,
    check_number,
    device_of,
    needed,
    silent,
    timed,
)
from .planning import chosen_method

Sample = Annotated[int, Help("tokens on which removals are tried, for methods that search")]


@alone
def search(
    model: Path,
    *,
    data: Data,
    out: Out,
    method: Annotated[str, Help("a method that searches; see locum list")] = "moe-i2",
    preset: Preset = "best",
    tokens: ToObserve = 131072,
    sample: Sample = SAMPLE,
    length: Length = 512,
    batch_size: BatchSize = 8,
    split: Split = "train",
    seed: Seed = 0,
    device: Device = "auto",
    stream: Stream = None,
    force: Force = False,
    dry_run: DryRun = False,
    progress: Progress = silent,
    **options: Any,
) -> Statistics | Estimate:
    """Calibrate, and let a method try removals on the model: statistics that its plans then read, in one file.

    An interrupted search goes on where it stopped when the same command is given again.
    """
    model = Path(model)
    chosen = chosen_method(method, options, preset, search)
    if not isinstance(chosen, SearchingMethod):
        raise OptionError(f"method {chosen.name} does not search; use locum calibrate, and make its plan from that")
    sources = parse_sources(data)
    out = check_output(needed(out, "out"), force, inputs=[model, *(source.path for source in sources)])
    for name, value in (("batch-size", batch_size), ("sample", sample)):
        check_number(name, value, 1)
    check_number("seed", seed, 0)
    chosen = dataclasses.replace(chosen, seed=seed)
    device = device_of(device)
    shape = read_shape(model)
    _check_droppable(model, shape)
    if isinstance(chosen, CheckedMethod):
        chosen.check(shape)
    needs = with_defaults(to_collect(chosen))
    scratch = room_for(shape, needs, len({source.domain for source in sources}), out)
    streamed = is_to_stream([model], stream, device)
    if streamed:
        check_stock(model)
    cut = {"split": split, "length": length, "tokens": tokens, "seed": seed}
    if dry_run:
        how = dry_runs.Running(device, None, streamed, batch_size)
        blocks, _ = read_text(model, shape, data, **cut)
        calibrated = dry_runs.of_calibration(model, shape, blocks, needs, how, out, scratch is not None)
        even = even_statistics(shape, to_collect(chosen))
        return dry_runs.of_search(calibrated, model, shape, blocks, chosen, sample, how, even)
    subject = prepare(model, shape, data, device=device, streamed=streamed, **cut)
    asked = question_of(chosen, batch_size=batch_size, sample=sample)
    calibrated = beside(out, "calibrated")
    statistics = finished(calibrated, subject.origin, question(needs, batch_size))
    if statistics is None:
        statistics = observe(subject, needs, calibrated, batch_size=batch_size, scratch=scratch, progress=progress)
        if ranks.is_first():
            save_statistics(statistics, calibrated)
        ranks.wait()
        clear(beside_for_rank(calibrated, "partial"))
    given = {"sample": sample, "batch_size": batch_size, "seed": seed, "statistics": statistics}
    explorer = ModelExplorer(subject.live, subject.blocks, **given)
    question_now = {**subject.origin.words(), **asked, "versions": versions()}
    answers = RememberedAnswers(explorer, beside_for_rank(out, "answers"), question_now)
    try:
        found = chosen.explore(answers, timed(progress))
    except BaseException:
        answers.save()
        raise
    result = dataclasses.replace(
        with_found(statistics, found),
        searched=SearchedBy(chosen.name, dataclasses.asdict(chosen)),
        asked=asked,
        provenance={**statistics.provenance, **provenance(sample=sample)},
    )
    if ranks.is_first():
        keep(result, out)
    ranks.wait()
    return result


def _check_droppable(model: Path, shape: ModelShape) -> None:
    check_openable(model, "search on the original checkpoint")
    for layer in shape.layers:
        if layer.refuse_dropping:
            raise UnsupportedModel(f"{model}: removals cannot be tried on this model: {layer.refuse_dropping}")


def to_collect(chosen: Method) -> tuple[str, ...]:
    """Those of a method's needs that calibration gives."""
    return tuple(name for name in chosen.needs() if not STATISTICS[name].searched)


def question_of(chosen: Method, *, batch_size: int, sample: int, also: tuple[str, ...] = ()) -> dict[str, Any]:
    """What statistics for a method depend on, beside their origin. A method that searches has its seed as an option."""
    asked = question(with_defaults((*to_collect(chosen), *also)), batch_size)
    if isinstance(chosen, SearchingMethod):
        asked |= {"method": chosen.name, "options": dataclasses.asdict(chosen), "sample": sample}
    return parse_json(json.dumps(asked))


def with_found(statistics: Statistics, found: dict[str, dict[str, Any]]) -> Statistics:
    """Statistics with what a search found. It has no domains, so the first one holds it and the sum over all is it."""
    layers: dict[str, dict[str, Any]] = {}
    for name, named in statistics.layers.items():
        layers[name] = dict(named)
        for key in found[name]:
            value = STATISTICS[key].increment(SearchEvent(found[name])).double().cpu()
            layers[name][key] = value.new_zeros(len(statistics.domains), *value.shape)
            layers[name][key][0] = value
    return dataclasses.replace(statistics, layers=layers)
