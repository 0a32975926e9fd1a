"""What the comparisons of trained models share: jobs, choices on validation, figures on test, rows that say all of it.

An experiment is a grid: arms (what is done to the model) times settings (how much, or on which text). Learning rates are
chosen per arm on the validation split with one seed; the chosen ones run with three seeds and are measured on test. All
arms of a setting see the same batches. Text is the bundled one, which the reference model never saw in training.
A job that is in the results files already is not run again, so an interrupted experiment goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import locum
from locum import files
from locum.bundled import MODEL, reference_data
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.checkpoints.read import fingerprint_checkpoint, load_tokenizer, read_config
from locum.checkpoints.skeleton import read_shape, skeleton
from locum.data.documents import parse_sources
from locum.data.tokens import load_tokens
from locum.experts.parts.low_rank import LowRank
from locum.measure.loss import evaluate
from locum.options import option_fields
from locum.plans.plan import LayerPlan, Plan, Slot, make_plan
from locum.runs import reserved
from locum.training.context import Original
from locum.training.options import Recovery, make_recovery
from locum.training.recovery import count_trainable, recover_model
from locum.training.ways import WAYS

RESULTS = Path(__file__).parents[1] / "results"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "locum"
SEEDS = (0, 1, 2)
LENGTH = 256
CALIBRATED = 131072  # tokens
MEASURED = {"validation": 32768, "test": 49152}  # tokens
OF_WAYS = {name: {item.name: item.default for item in option_fields(cls)} for name, cls in WAYS.items()}
OF_ALL = {option: default for options in OF_WAYS.values() for option, default in options.items()}
DEFAULTS = {item.name: item.default for item in option_fields(Recovery)} | OF_ALL
COLUMNS = ("bits_per_byte", "kl", "top1_agreement")


Choices = dict[tuple[str, Any], dict[str, Any]]  # options of recovery by arm and setting


@dataclass(frozen=True)
class Experiment:
    """A grid of jobs. `run(name, setting, seed, split, steps, **options)` does one and returns its rows."""

    name: str
    arms: tuple[str, ...]
    run: Callable[..., list[dict[str, Any]]]
    to_select: Callable[[], Iterable[dict[str, Any]]]
    to_test: Callable[[Choices], Iterable[dict[str, Any]]]  # given what was chosen on validation
    table: Callable[[list[dict[str, Any]]], str]
    varied: tuple[str, ...] = ("learning_rate",)  # options of recovery that are chosen on validation
    setting: str = "fraction"  # what the rows call a setting

    def file(self, phase: str) -> Path:
        return RESULTS / f"{self.name}_{'selection' if phase == 'select' else 'test'}.jsonl"

    def key_of_row(self, row: dict[str, Any]) -> tuple[Any, ...]:
        made = row["provenance"]
        return (
            made["method"],
            made[self.setting],
            row["seed"],
            *(made["recovery"].get(option, DEFAULTS.get(option)) for option in self.varied),
        )

    def key_of_job(self, job: dict[str, Any]) -> tuple[Any, ...]:
        options = ((DEFAULTS | job)[option] for option in self.varied)
        return (job["name"], job[self.setting], job["seed"], *options)


def made_once(name: str, make: Callable[..., object], **asked: Any) -> Path:
    """What `make(MODEL, data=, out=, **asked)` writes, kept in the cache under a name that tells the whole question.

    That is what was asked, of which model and text, by which sources of Locum and on which versions of what it uses.
    """
    sources = sorted(path for path in Path(locum.__file__).parent.rglob("*") if path.suffix in (".py", ".cpp"))
    texts = [Path(source.path) for source in parse_sources(reference_data())]
    whole = {"asked": asked, "model": fingerprint_checkpoint(MODEL), "versions": files.provenance()["versions"]}
    contents = [path.read_bytes() for path in (*sources, *texts)]
    question = files.fingerprint(json.dumps(whole, sort_keys=True), *contents)
    path = CACHE / f"{name}.{question}.safetensors"
    with reserved(path, wait=True):  # shards of an experiment ask for the same
        if not path.is_file():
            make(MODEL, data=reference_data(), out=path, **asked)
    return path


@functools.cache
def statistics() -> Any:
    """The one statistics file that plans are made from, with the Grams that whitened starts read and the outputs of all experts on all
    tokens, by which HC-SMoE clusters."""
    also = ["every_output_sum"]
    return locum.load_statistics(made_once("statistics", locum.calibrate, tokens=CALIBRATED, also=also))


def trainable(decided: Plan | None, how: str, rank: int) -> int:
    model = skeleton(read_config(MODEL))
    if decided is not None:
        model = _planned_skeleton(model, decided)
    return count_trainable(model, decided, make_recovery({"how": how, "rank": rank}))


def _planned_skeleton(model: Any, decided: Plan) -> Any:
    """Sizes are all that counts here, so the plan is applied to random weights."""
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_()
    plain = dataclasses.replace(decided, layers=tuple(_without_svd(layer) for layer in decided.layers))
    return apply_plan(model, plain)


def _without_svd(layer: LayerPlan) -> LayerPlan:
    return dataclasses.replace(layer, slots=tuple(_plain(slot) for slot in layer.slots))


def _plain(slot: Slot) -> Slot:
    parts = (dataclasses.replace(p, start="gaussian") if isinstance(p, LowRank) else p for p in slot.parts)
    return dataclasses.replace(slot, parts=tuple(parts))


def train_and_measure(
    name: str,
    decided: Plan | None,
    chosen: Recovery,
    split: str,
    extra: dict[str, Any],
    sources: Sequence[str] = (),
    plan_statistics: Any = None,
    keep_original: bool = False,
) -> list[dict[str, Any]]:
    """Apply a plan to the reference model, train, measure; the rows of one job.

    On the test split the original is measured beside it, and the model also before training (seed 0). `plan_statistics` are
    those that building the plan reads; `keep_original` leaves the original's own rows in.
    """
    tokenizer, seed = load_tokenizer(MODEL), chosen.seed
    data = list(sources) or reference_data()
    blocks = load_tokens(data, tokenizer, split="train", length=LENGTH, seed=seed)
    measured_on = load_tokens(data, tokenizer, split=split, length=LENGTH, tokens=MEASURED[split], keep_partial=True)
    model, original = (load_model(MODEL, dtype=torch.float32) for _ in range(2))
    shape = read_shape(MODEL)
    if decided is not None:
        apply_plan(model, decided, plan_statistics, seed=seed)
    bare = make_plan(shape, []) if decided is None else decided
    testing = split == "test"
    before = evaluate(model, measured_on, seed=seed, model_name=f"{name} before") if testing and not seed else []
    start = time.perf_counter()
    model, summary = recover_model(model, decided, blocks, None, chosen, Original.of(original))
    seconds = time.perf_counter() - start
    against = original if testing else None
    rows = evaluate(model, measured_on, against=against, seed=seed, model_name=name, plan=bare.id)
    size = bare.size(shape)
    made = files.provenance(
        split=split,
        recovery=chosen.to_json(),
        trainable_parameters=summary["trainable_parameters"],
        training_seconds=seconds,
        parameters=size.parameters,
        bytes=size.bytes,
        expert_parameters=size.expert_parameters,
        removed=bare.removed(shape),
        method=name,
        **extra,
    )
    rows = [row for row in [*rows, *before] if row.metric != "perplexity"]
    rows = [row for row in rows if row.model != "original" or keep_original]
    return [{**dataclasses.asdict(row), "seed": seed, "provenance": {**row.provenance, **made}} for row in rows]


def recovery(how: str, steps: int, seed: int, **options: Any) -> Recovery:
    """Options of recovery that all comparisons have in common."""
    common = {"batch_size": 4, "length": LENGTH, "schedule": "cosine", "validate_every": 0}
    # Rows of older runs name the options of all ways.
    own = {name: value for name, value in options.items() if name not in OF_ALL or name in OF_WAYS[how]}
    return make_recovery({"how": how, "steps": steps, "seed": seed, **common, **own})


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a results file and of the shards that are not joined yet."""
    files = sorted(path.parent.glob(f"{path.stem}*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def chosen_options(experiment: Experiment) -> Choices:
    """For each arm, in each setting that choices were made in, the options with the lowest validation loss."""
    best: dict[tuple[str, Any], tuple[float, dict[str, Any]]] = {}
    for row in read(experiment.file("select")):
        if row["metric"] == "loss" and row["domain"] == "all" and row["model"] in experiment.arms:
            key = (row["model"], row["provenance"][experiment.setting])
            options = {name: row["provenance"]["recovery"][name] for name in experiment.varied}
            if key not in best or row["value"] < best[key][0]:
                best[key] = (row["value"], options)
    return {key: options for key, (_, options) in best.items()}


def work(experiment: Experiment, phase: str, shard: str, steps: int) -> None:
    """Run this process's share of the jobs that are not done, a line of rows a job."""
    jobs = list(experiment.to_select() if phase == "select" else experiment.to_test(chosen_options(experiment)))
    target, split = experiment.file(phase), "validation" if phase == "select" else "test"
    index, count = map(int, shard.split("/"))
    part = target.with_name(f"{target.stem}.{index}.jsonl") if count > 1 else target
    done = {experiment.key_of_row(row) for row in read(target)}
    for job in jobs[index::count]:
        if experiment.key_of_job(job) in done:
            continue
        rows = experiment.run(**job, split=split, steps=steps)
        with part.open("a") as stream:
            stream.writelines(json.dumps(row, default=str) + "\n" for row in rows)
        head = next(r for r in rows if r["metric"] == "loss" and r["domain"] == "all" and r["model"] in experiment.arms)
        seconds = head["provenance"]["training_seconds"]
        print(head["model"], experiment.key_of_row(head), f"loss {head['value']:.4f}", f"{seconds:.0f}s", flush=True)


def join(experiment: Experiment) -> None:
    """One results file a phase from the shards'."""
    for phase in ("select", "test"):
        target = experiment.file(phase)
        rows = read(target)
        for part in RESULTS.glob(f"{target.stem}.*.jsonl"):
            part.unlink()
        files.write_text(target, "".join(json.dumps(row) + "\n" for row in rows))


def cell(rows: list[dict[str, Any]]) -> str:
    """Mean over seeds, and the widest of their bootstrap intervals."""
    values = np.array([r["value"] for r in rows])
    low, high = min(r["low"] for r in rows), max(r["high"] for r in rows)
    return f"{values.mean():.3f} ({low:.3f} to {high:.3f})"


def main(experiment: Experiment, about: str, steps: int = 100) -> None:
    """The command line of an experiment."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("select", "test", "join", "table"))
    parser.add_argument("--shard", default="0/1", help="this process's part of the jobs, such as 0/2")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    RESULTS.mkdir(exist_ok=True)
    if arguments.phase == "table":
        print(experiment.table(read(experiment.file("test"))))
    elif arguments.phase == "join":
        join(experiment)
    else:
        work(experiment, arguments.phase, arguments.shard, arguments.steps)
