"""`apply`: a plan and a checkpoint become a smaller checkpoint."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from .. import ranks
from ..budgets.target import parse_size
from ..checkpoints.application import complete_checkpoint
from ..checkpoints.card import model_card
from ..checkpoints.card_data import card_data
from ..checkpoints.convert import check_openable
from ..checkpoints.notes import read_notes
from ..checkpoints.read import fingerprint_checkpoint, load_tokenizer
from ..checkpoints.rewrite import Rewriting
from ..checkpoints.side_files import side_files
from ..checkpoints.skeleton import check_loadable, open_source, shape_in
from ..containers.build import check_statistics
from ..errors import CheckpointError, PlanError, StatisticsError
from ..files import check_output, fingerprint, provenance
from ..models.choosing import check_choosing
from ..models.families import opening_class
from ..places import name_of, remember
from ..plans.plan import Plan
from ..plans.plan_file import load_plan
from ..runs import resumable
from ..shapes import ModelShape
from ..stats.statistics_file import load_statistics
from ..stats.sums import Statistics
from .dry_run import of_application
from .estimate import Estimate
from .options import DryRun, Force, Help, Out, Progress, Seed, alone, check_number, needed, silent, timed
from .planning import statistics_behind


class Whole(NamedTuple):
    """An original and the plan over it that a checkpoint is said to be made by."""

    model: Path
    shape: ModelShape
    plan: Plan


DECISIVE = ("original_fingerprint", "plan", "statistics", "seed")  # notes on which every byte of the weights depends


@alone
def apply(
    model: Path,
    *,
    plan: Annotated[Path | Plan, Help("the plan file")],
    out: Out,
    statistics: Annotated[
        Path | Statistics | None,
        Help("statistics for a plan with parts made from them; default: those it was made from"),
    ] = None,
    shard_size: Annotated[str, Help("most bytes of tensors in a weight file")] = "5GiB",
    seed: Seed = 0,
    force: Force = False,
    dry_run: DryRun = False,
    progress: Progress = silent,
) -> Path | Estimate:
    """Carry out a plan: a checkpoint folder with weights, config, tokenizer, plan and model card.

    Files are rewritten, an expert at a time; what the plan does not touch keeps its bytes. An interrupted run goes on after
    the last layer that was done when the same command is given again.
    """
    options = {"plan": plan, "statistics": statistics, "shard_size": shard_size, "seed": seed, "progress": progress}
    return carry_out(Path(model), out=out, force=force, dry_run=dry_run, **options)


def carry_out(
    model: Path,
    *,
    plan: Path | Plan,
    out: Path | None,
    statistics: Path | Statistics | None,
    shard_size: str = "5GiB",
    seed: int,
    force: bool,
    progress: Progress,
    again: bool = True,
    dry_run: bool = False,
    of: Whole | None = None,
) -> Path | Estimate:
    """The work of `apply`. Unless it is to be done `again`, an output that is the same plan carried out already is left as it is.
    What is made of a checkpoint that rounds have left may say that it is `of` the original, by the plan of all rounds."""
    out = check_output(needed(out, "out"), force, "folder", inputs=[model, plan, statistics])
    check_number("seed", seed, 0)
    decided = plan if isinstance(plan, Plan) else load_plan(plan)
    check_number("shard-size", most := parse_size(shard_size), 1, math.inf)
    source = open_source(model)
    shape = shape_in(model, source)
    along = side_files(model)  # all of them may
    check_openable(model, "apply the plan to the original checkpoint")
    decided.validate(shape)
    check_choosing(source.layers, decided)
    beside = Path() if decided is plan else Path(plan).parent
    observed = statistics_for(decided, statistics, model, beside) if decided.needs else None
    tokenizer = load_tokenizer(model)
    check_loadable(model, source)
    origin = Whole(model, shape, decided) if of is None else of
    made = provenance(
        original=name_of(origin.model),
        original_fingerprint=fingerprint_checkpoint(origin.model),
        original_shape=origin.shape.to_json(),
        plan=origin.plan.id,
        seed=seed,
        **({} if observed is None else {"statistics": observed.id}),
    )
    if not again and ranks.told(is_made(out, made)):
        return out
    rewriting = Rewriting(source, shape, decided, observed, seed)
    if ranks.is_first():
        rewriting.check_space(out, along)
    if dry_run:
        return of_application(rewriting, decided, shape, out, along)
    count, told = 0, timed(progress)

    def step(layer: str) -> None:
        nonlocal count
        count += 1
        told("apply", count, len(decided.layers))

    remember(made["original_fingerprint"], origin.model)
    opens = opening_class(source.config)
    card = model_card(origin.plan, origin.shape, out.name, made, opens, card_data(origin.model, opens))
    files = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in source.files]
    asked = {**{name: made.get(name) for name in DECISIVE}, "shard_size": most, "files": fingerprint(*files)}
    with resumable(out, asked) as work:
        rewriting.write(work.folder, most, step, work.done, work.save)
        if ranks.is_first():
            complete_checkpoint(work.folder, tokenizer, origin.plan, card, model, made)
    return out


def is_made(out: Path, made: dict[str, Any]) -> bool:
    """Whether a folder is what would be made now, by its notes; its plan says by which command it was made."""
    with contextlib.suppress(CheckpointError):
        notes = read_notes(out)
        return all(notes.get(name) == made.get(name) for name in (*DECISIVE, "versions", "command"))
    return False


def statistics_for(plan: Plan, statistics: Path | Statistics | None, model: Path, beside: Path) -> Statistics:
    """The statistics that carrying out a plan reads: those given, or those that the plan names. It lies in `beside`."""
    source = statistics or statistics_behind(plan, beside)
    if source is None:
        named = plan.provenance.get("statistics_file")
        gone = (
            f" (made from {named}, which is not beside it or where it was last seen)" if isinstance(named, str) else ""
        )
        raise PlanError(
            f"the plan has parts that are made from statistics ({', '.join(plan.needs)}){gone}; "
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
