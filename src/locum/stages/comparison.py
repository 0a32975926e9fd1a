"""`compare`: methods side by side, at equal bytes, on the same text."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from transformers import PreTrainedModel

from ..budgets.target import Target
from ..checkpoints.convert import check_openable
from ..checkpoints.read import fingerprint_checkpoint, load_tokenizer
from ..checkpoints.skeleton import read_shape
from ..data.documents import Source, parse_sources
from ..data.tokens import Tokens, load_tokens
from ..errors import OptionError, PlanError, UnsupportedModel, unknown
from ..files import check_output, clear, provenance, write_text
from ..json_text import parse_json
from ..measure.loss import Output, block_sums, domains_of, rows_of
from ..measure.memory import peak_bytes
from ..measure.pairs import draw, mean_kl
from ..measure.rows import Row, write_rows
from ..methods import SearchingMethod
from ..places import name_of
from ..plans.plan import Plan
from ..reports.report import make_report
from ..runs import Work, resumable
from ..shapes import ModelShape
from ..stats.definitions import STATISTICS
from ..stats.statistics_file import load_statistics
from ..stats.sums import Statistics
from ..training.options import Recovery
from .application import carry_out
from .calibration import calibrate
from .candidates import Candidate, candidates_of, chance_of
from .compression import PREFIX, recovery_of
from .evaluation import about
from .opening import Precision, Stream, dtype_of, is_to_stream, open_to_run
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
    ToObserve,
    alone,
    check_number,
    device_of,
    needed,
    silent,
)
from .planning import as_searched, decided_from, read_weights
from .recovery import recover as recover_stage
from .searching import search, to_collect

OF_FOLDERS = ("checkpoint", "plan_file", "recovery_log", "statistics_file")  # which are gone
RESAMPLES = 1000
MOST_SEEDS = 1000


@alone
def compare(
    model: Path,
    *,
    data: Data,
    out: Out,
    methods: Annotated[
        str,
        Help(
            "all (but those that run every expert on every token), criteria (pruning by each), or names such as "
            "lightmoe,prune:score=ean; options after colons"
        ),
    ] = "all",
    remove: Annotated[
        str, Help("fractions of the routed experts' parameters to remove, separated by commas")
    ] = "0.25,0.5",
    bits: Annotated[
        str | None,
        Help(
            "every method in so many bits too, separated by commas: 8, 4, 3, 2 or names of formats; the bytes stay the same"
        ),
    ] = None,
    seeds: Annotated[int, Help("calibrations with different text, from --seed on")] = 3,
    leave_out: Annotated[
        str, Help("domains that calibration and training do not see, separated by commas; all are measured")
    ] = "",
    recover: Annotated[
        str | None, Help("measure each again after training it back, as locum recover --how; default: do not")
    ] = None,
    tokens: ToObserve = 65536,
    length: Length = 512,
    measured: Annotated[int, Help("tokens of the test split to measure on, shared over domains by weight")] = 65536,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    device: Device = "auto",
    stream: Stream = None,
    precision: Precision = "auto",
    force: Force = False,
    progress: Progress = silent,
    **options: Any,
) -> dict[str, Any]:
    """Methods side by side: every one with the same bytes, calibration text and test tokens, random pruning among them.

    No checkpoint stays; the folder gets results, a report with pictures and comparison.json, in which differences have 95%
    intervals over blocks and seeds drawn for all methods together. An interrupted comparison goes on after the last model that
    was measured. Every option of recover has the prefix recover_ here.
    """
    model, of_training = Path(model), {name.removeprefix(PREFIX): value for name, value in options.items()}
    sources = parse_sources(data)
    out = check_output(needed(out, "out"), force, "folder", inputs=[model, *(source.path for source in sources)])
    check_number("seed", seed, 0)
    check_number("seeds", seeds, 1, MOST_SEEDS)
    check_number("measured", measured, 1)
    check_openable(model, "compare methods on the original checkpoint")
    seen = [source for source in sources if source.domain not in leave_out.split(",")]
    _check_left_out(leave_out, sources, seen)
    shape = read_shape(model)
    asked = Asked(
        model=model,
        shape=shape,
        candidates=candidates_of(methods, bits, recover),
        amounts=_amounts(remove),
        seeds=tuple(range(seed, seed + seeds)),
        seen=tuple(seen),
        recovery=recovery_of(recover, of_training, seed),
        cut={"tokens": tokens, "length": length, "batch_size": batch_size, "device": device_of(device)},
    )
    tokenizer = load_tokenizer(model)
    blocks = load_tokens(data, tokenizer, split="test", length=length, tokens=measured, seed=seed, keep_partial=True)
    dtype = dtype_of(precision)
    streamed = is_to_stream([model, model], stream, asked.cut["device"], dtype)
    question = {**asked.words(), "test": blocks.fingerprint, "precision": precision}
    with resumable(out, question) as work:
        run = _Run(asked, blocks, work, lambda path: open_to_run(path, streamed, asked.cut["device"], dtype=dtype))
        run.go(progress)
        rows = _rows(run.results())
        if not rows:
            name, why = next((one["name"], one["refused"]) for one in run.results())
            others = len({one["name"] for one in run.results()}) - 1
            raise PlanError(f"none of {others + 1} methods can do what is asked here; {name}, the first: {why}")
        result = _summary(run.results(), asked, blocks, leave_out)
        run.tidy()
        write_rows(work.folder / "results.jsonl", rows, append=False)
        make_report([work.folder / "results.jsonl"], work.folder / "report.html", title=f"{out.name}: methods compared")
        write_text(work.folder / "comparison.json", json.dumps(result, indent=1))
    return {**result, "report": str(out / "report.html")}


# --- what is compared -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """Everything on which the numbers depend, but for the text that is measured on."""

    model: Path
    shape: ModelShape
    candidates: tuple[Candidate, ...]
    amounts: tuple[float, ...]
    seeds: tuple[int, ...]
    seen: tuple[Source, ...]  # the text of calibration and training
    recovery: Recovery | None
    cut: dict[str, Any]  # how calibration runs

    @property
    def states(self) -> tuple[str, ...]:
        return ("compressed",) if self.recovery is None else ("compressed", "recovered")

    def words(self) -> dict[str, Any]:
        """The question, for a run that goes on."""
        text = load_tokens(self.seen, load_tokenizer(self.model), split="train", length=self.cut["length"])
        return {
            "model": fingerprint_checkpoint(self.model),
            "candidates": [c.words() for c in self.candidates],
            "amounts": list(self.amounts),
            "seeds": list(self.seeds),
            "text": text.fingerprint,
            "recovery": None if self.recovery is None else self.recovery.to_json(),
            "cut": self.cut,
        }


def _amounts(remove: str) -> tuple[float, ...]:
    try:
        found = tuple(dict.fromkeys(float(word) for word in remove.split(",")))
    except ValueError:
        raise OptionError(f"--remove is {remove!r}; give fractions separated by commas, such as 0.25,0.5") from None
    for amount in found:
        Target(remove=amount)
    return found


def _check_left_out(leave_out: str, sources: Sequence[Source], seen: Sequence[Source]) -> None:
    domains = dict.fromkeys(source.domain for source in sources)
    for name in filter(None, leave_out.split(",")):
        if name not in domains:
            raise OptionError(unknown("domain for --leave-out", name, domains))
    if not seen:
        raise OptionError(f"--leave-out {leave_out} leaves no domain to calibrate on")


# --- measuring --------------------------------------------------------------------------------------------------


class _Run:
    """The steps of a comparison, in their order: for every seed its statistics, then every candidate at every amount."""

    def __init__(self, asked: Asked, blocks: Tokens, work: Work, load: Callable[[Path], PreTrainedModel]) -> None:
        self.asked, self.blocks, self.work, self.load = asked, blocks, work, load
        self._outputs: list[Output] = []  # it need not run again for every candidate

    @cached_property
    def original(self) -> PreTrainedModel:
        return self.load(self.asked.model)

    def go(self, progress: Progress) -> None:
        steps = list(self._steps())
        for number, (words, step) in enumerate(steps):
            progress(f"compare: {words}", number, len(steps))
            if number >= self.work.done:
                step()
                self.work.save(number + 1)
        progress("compare", len(steps), len(steps))

    def _steps(self) -> Iterator[tuple[str, Callable[[], None]]]:
        asked = self.asked
        for seed in asked.seeds:
            searching = [c for c in asked.candidates if isinstance(c.method, SearchingMethod)]
            yield f"calibrate, seed {seed}", functools.partial(self._calibrate, seed)
            for candidate in searching:
                yield f"search for {candidate.name}, seed {seed}", functools.partial(self._search, candidate, seed)
            for amount, candidate in itertools.product(asked.amounts, asked.candidates):
                yield (
                    f"{candidate.name} at {amount:g}, seed {seed}",
                    functools.partial(self._measure, candidate, amount, seed),
                )

    def _calibrate(self, seed: int) -> None:
        for left in self.work.folder.glob("statistics-*"):  # of the seed before
            clear(left)
        candidates = self.asked.candidates
        turning = [c for c in candidates if any(STATISTICS[name].turns for name in c.method.needs())]
        try:
            self._collect(candidates, seed)
        except UnsupportedModel as error:  # which of all statistics these alone can be refused with
            if not turning:
                raise
            for candidate in turning:
                write_text(self._refusal(seed, candidate), str(error))
            self._collect([c for c in candidates if c not in turning], seed)

    def _collect(self, candidates: Sequence[Candidate], seed: int) -> None:
        also = [name for c in candidates for name in (*to_collect(c.method), *c.read_besides)]
        options = {"data": self.asked.seen, "out": self._statistics(seed), "also": also, "gram": False, "seed": seed}
        calibrate(self.asked.model, force=True, **options, **self.asked.cut)

    def _search(self, candidate: Candidate, seed: int) -> None:
        options = {"data": self.asked.seen, "out": self._statistics(seed, candidate), "seed": seed, **candidate.given}
        try:
            search(self.asked.model, method=candidate.method.name, force=True, **options, **self.asked.cut)
        except (PlanError, UnsupportedModel) as error:  # the others are compared all the same
            write_text(self._refusal(seed, candidate), str(error))

    def _refusal(self, seed: int, candidate: Candidate) -> Path:
        """Where it stands why this model cannot be searched, or calibrated, for a candidate."""
        return self._statistics(seed, candidate).with_suffix(".txt")

    def _statistics(self, seed: int, candidate: Candidate | None = None) -> Path:
        of = "" if candidate is None else f"-{self.asked.candidates.index(candidate)}"
        return self.work.folder / f"statistics-{seed}{of}.safetensors"

    def _measure(self, candidate: Candidate, amount: int, seed: int) -> None:
        """One candidate: planned, made, measured, and the same after training. What it refuses to do is noted."""
        asked, folder = self.asked, self.work.folder
        checkpoint, trained = folder / "model", folder / "trained"
        label = {"name": candidate.name, "remove": amount, "seed": seed}
        searching = candidate if isinstance(candidate.method, SearchingMethod) else None
        try:
            if (refusal := self._refusal(seed, candidate)).exists():
                raise PlanError(refusal.read_text(encoding="utf-8"))
            statistics = load_statistics(self._statistics(seed, searching))
            plan = self._plan(candidate, amount, statistics)
            given = {"plan": plan, "statistics": statistics, "seed": seed, "force": True, "progress": silent}
            carry_out(asked.model, out=checkpoint, **given)
            made = [self._measured(checkpoint, plan, label, "compressed")]
            if asked.recovery is not None:
                training = {**asked.recovery.to_json(), "seed": seed, "device": asked.cut["device"]}
                recover_stage(checkpoint, data=asked.seen, original=asked.model, out=trained, force=True, **training)
                made.append(self._measured(trained, plan, label, "recovered"))
        except (PlanError, UnsupportedModel) as error:
            made = [{**label, "state": state, "refused": str(error)} for state in asked.states]
        lines = "".join(json.dumps(one) + "\n" for one in made)
        write_text(folder / f"measured-{self.work.done:05}.jsonl", lines)
        clear(checkpoint)
        clear(trained)

    def _plan(self, candidate: Candidate, amount: float, statistics: Statistics) -> Plan:
        """The largest plan that leaves no more bytes than this share of the experts' bytes less."""
        asked, chosen = self.asked, candidate.method
        weights = read_weights(asked.model, statistics) if chosen.reads_weights else None
        fit = asked.shape.bytes - int(amount * asked.shape.bytes_of_experts)
        chosen = as_searched(chosen, candidate.given, statistics)
        target = Target(fit=fit, said=f"--remove {amount:g} ({fit:,} bytes, as for every method)")
        return decided_from(
            chosen, chosen.score_experts(statistics, asked.shape, weights), asked.shape, target, candidate.few
        )

    def _measured(self, checkpoint: Path, plan: Plan, label: dict[str, Any], state: str) -> dict[str, Any]:
        start, size = time.perf_counter(), self.asked.cut["batch_size"]
        model, original = self.load(checkpoint), self.original
        sums_BY = block_sums(model, self.blocks, against=original, batch_size=size, of_original=self._outputs)
        told = {key: value for key, value in about(checkpoint, plan, {}, None).items() if key not in OF_FOLDERS}
        told |= {"stage": state, **provenance(data_fingerprint=self.blocks.fingerprint, split="test")}
        rows = rows_of(
            sums_BY,
            self.blocks,
            compared=True,
            batch_size=size,
            seed=label["seed"],
            resamples=RESAMPLES,
            model_name=f"{label['name']}, {label['remove']:g}" + (", recovered" if state == "recovered" else ""),
            against_name="original",
            plan=plan.id,
            provenance=told,
            seconds=time.perf_counter() - start,
            peak=peak_bytes(model.device),
        )
        rows = [row if row.model != "original" else self._of_original(row) for row in rows]
        return {
            **label,
            "state": state,
            "bytes": told["bytes"],
            "rows": [dataclasses.asdict(row) for row in rows],
            "sums": sums_BY.tolist(),
        }

    def _of_original(self, row: Row) -> Row:
        shape = self.asked.shape
        sizes = {"bytes": shape.bytes, "parameters": shape.parameters, "expert_parameters": shape.expert_parameters}
        return dataclasses.replace(row, provenance={**row.provenance, **sizes, "stage": "original", "method": None})

    def results(self) -> list[dict[str, Any]]:
        files = sorted(self.work.folder.glob("measured-*.jsonl"))
        return [parse_json(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]

    def tidy(self) -> None:
        """What is kept is one file of all that was measured."""
        results = self.results()
        write_text(self.work.folder / "measured.jsonl", "".join(json.dumps(one) + "\n" for one in results))
        for left in (*self.work.folder.glob("measured-*.jsonl"), *self.work.folder.glob("statistics-*")):
            clear(left)


def _rows(results: list[dict[str, Any]]) -> list[Row]:
    """All rows, those of the original once."""
    rows = [Row(**row) for one in results for row in one.get("rows", ())]
    first = next((one["rows"] for one in results if "rows" in one), [])
    known = [Row(**row) for row in first if row["model"] == "original"]
    return [*known, *(row for row in rows if row.model != "original")]


# --- what it says -----------------------------------------------------------------------------------------------


def _summary(results: list[dict[str, Any]], asked: Asked, blocks: Tokens, leave_out: str) -> dict[str, Any]:
    """Every amount and state with its candidates, the best first."""
    groups = []
    for amount, state in itertools.product(asked.amounts, asked.states):
        here = [one for one in results if (one["remove"], one["state"]) == (amount, state)]
        refused = {one["name"]: one["refused"] for one in here if "refused" in one}
        sums = {
            c.name: {one["seed"]: np.array(one["sums"]) for one in here if one["name"] == c.name}
            for c in asked.candidates
            if c.name not in refused
        }
        size = {one["name"]: one["bytes"] for one in here if "bytes" in one}
        rows, order = _ranked(
            [[of[seed] for seed in asked.seeds] for of in sums.values()], list(sums), blocks, leave_out
        )
        for row in rows:
            row["bytes"] = size[row["name"]]
        groups.append({"remove": amount, "state": state, "rows": rows, "refused": refused, "order_over_seeds": order})
    return {
        "model": name_of(asked.model),
        "bytes": asked.shape.bytes,
        "seeds": list(asked.seeds),
        "tokens": int(blocks.loss_mask_BS.sum()),
        "left_out": leave_out,
        "groups": groups,
    }


def _ranked(
    sums_CJBY: list[list[np.ndarray]], names: list[str], blocks: Tokens, leave_out: str
) -> tuple[list[dict[str, Any]], float | None]:
    if not names:
        return [], None
    domains = dict(domains_of(blocks))
    everywhere = draw(sums_CJBY)
    within = {
        domain: draw([[sums_BY[chosen_B] for sums_BY in of] for of in sums_CJBY])
        for domain, chosen_B in domains.items()
        if domain != "all"
    }
    left_out = [name for name in leave_out.split(",") if name]
    seen_B = np.any([chosen_B for domain, chosen_B in domains.items() if domain not in ("all", *left_out)], axis=0)
    seen = draw([[sums_BY[seen_B] for sums_BY in of] for of in sums_CJBY])
    best = sorted(range(len(names)), key=lambda c: everywhere.delta_C[c])
    rows = []
    for c, after in zip(best, [*best[1:], None], strict=True):
        chance = names.index(chance_of(names[c])) if chance_of(names[c]) in names else None
        worst = max(within, key=lambda domain: within[domain].delta_C[c])
        rows.append(
            {
                "name": names[c],
                "loss_delta": everywhere.of(c),
                "by_seed": everywhere.delta_CJ[c].tolist(),
                "kl": mean_kl(sums_CJBY[c]),
                "worst_domain": [worst, float(within[worst].delta_C[c])],
                "seen": seen.of(c),
                "left_out": {name: within[name].of(c) for name in left_out},
                "against_random": None if chance in (None, c) else everywhere.between(c, chance),
                "better_than_next": None if after is None else everywhere.sure(c, after),
            }
        )
    return rows, everywhere.order_over_seeds()
