"""Recovery compared: LightMoE, Replace, pruning + LoRA and LoRA alone on the reference model, equal trainable parameters.

    python benchmarks/recovery.py select --shard 0/2     learning rates and end fractions, on the validation split
    python benchmarks/recovery.py test --shard 0/2       the chosen ones, three seeds, on the test split
    python benchmarks/recovery.py table                  Markdown from the results

Every job calibrates, trains and measures on the bundled text, which the reference model never saw: statistics and
training on its train split, choices on validation, figures on test. All methods train for the same number of steps on
the same batches and, through the rank of their adapters, (nearly) the same number of parameters; LightMoE sets it.
A job that is in the results file already is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import locum
from locum import artefacts, checkpoint
from locum.apply import apply_plan
from locum.data import load_tokens
from locum.demo import MODEL, reference_data
from locum.evaluate import evaluate
from locum.families import find_layers, read_expert
from locum.plan import Plan, make_plan
from locum.recover import count_trainable, recover_model
from locum.train import Recovery

RESULTS = Path(__file__).parent / "results"
STATISTICS = (
    Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "locum" / "recovery.statistics.safetensors"
)
SEEDS = (0, 1, 2)
FRACTIONS = (0.3, 0.5)
RATES = (1e-3, 3e-3, 1e-2)
END_FRACTIONS = (0.1, 0.2, 0.4)
LIGHTMOE_RANK = 4  # 4 of 256 is to this model what 16 of 2048 is to OLMoE-1B-7B, twice over
METHODS: dict[str, dict[str, Any]] = {
    "LightMoE": {"method": "lightmoe", "how": "annealed"},
    "Replace (w. shared)": {"method": "replace", "how": "lora", "fits_rank": True},
    "Replace (w/o shared)": {"method": "replace", "how": "lora", "fits_rank": True, "options": {"shared": False}},
    "REAP + LoRA": {"method": "prune", "how": "lora", "options": {"score": "reap"}},
    "frequency + LoRA": {"method": "prune", "how": "lora", "options": {"score": "frequency"}},
    "LoRA, uncompressed": {"method": None, "how": "lora"},
}


def statistics() -> Any:
    """The one statistics file that every plan is made from."""
    if not STATISTICS.is_file():
        STATISTICS.parent.mkdir(parents=True, exist_ok=True)
        locum.calibrate(MODEL, data=reference_data(), tokens=131072, out=STATISTICS)
    return artefacts.load_statistics(STATISTICS)


def trainable(decided: Plan | None, how: str, rank: int) -> int:
    model = checkpoint.skeleton(checkpoint.read_config(MODEL))
    if decided is not None:
        model = _planned_skeleton(model, decided)
    return count_trainable(model, decided, Recovery(how=how, rank=rank))


def _planned_skeleton(model: Any, decided: Plan) -> Any:
    """Sizes are all that counts here, so the plan is applied to random weights."""
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_()
    plain = dataclasses.replace(decided, layers=tuple(_without_svd(layer) for layer in decided.layers))
    return apply_plan(model, plain)


def _without_svd(layer: Any) -> Any:
    slots = tuple(dataclasses.replace(s, start="gaussian") for s in layer.slots)
    return dataclasses.replace(layer, slots=slots)


@functools.cache
def plan_for(name: str, fraction: float) -> tuple[Plan | None, int]:
    """The plan of a method at a fraction, and the adapter rank that matches LightMoE's trainable parameters."""
    about = METHODS[name]
    stats = statistics()
    lightmoe = locum.plan([stats], method="lightmoe", remove=fraction, rank=LIGHTMOE_RANK)
    if name == "LightMoE":
        return lightmoe, LIGHTMOE_RANK
    target = trainable(lightmoe, "annealed", LIGHTMOE_RANK)

    def made(rank: int) -> Plan | None:
        if about["method"] is None:
            return None
        given = dict(about.get("options", {}), **({"rank": rank} if about.get("fits_rank") else {}))
        return locum.plan([stats], method=about["method"], remove=fraction, **given)

    counts = {rank: trainable(made(rank), "lora", rank) for rank in range(4, 32)}
    rank = min(counts, key=lambda r: abs(counts[r] - target))
    return made(rank), rank


def run(name: str, fraction: float, seed: int, split: str, steps: int, **options: Any) -> list[dict[str, Any]]:
    """Compress, train and measure one model; rows for the results file."""
    about = METHODS[name]
    decided, rank = plan_for(name, fraction)
    tokenizer = checkpoint.load_tokenizer(MODEL)
    data = reference_data()
    blocks = load_tokens(data, tokenizer, split="train", length=256, seed=seed)
    limit = 49152 if split == "test" else 32768
    measured_on = load_tokens(data, tokenizer, split=split, length=256, tokens=limit, keep_partial=True)
    model = checkpoint.load_model(MODEL, dtype=torch.float32)
    original = checkpoint.load_model(MODEL, dtype=torch.float32)
    shape = checkpoint.shape_of(model)
    if decided is not None:
        apply_plan(model, decided, seed=seed)
    bare = make_plan(shape, []) if decided is None else decided
    before = (
        evaluate(model, measured_on, resamples=200, model_name=f"{name} before")
        if split == "test" and seed == 0
        else []
    )
    reads = {x.shape.name: _reader(x.experts) for x in find_layers(original)}
    chosen = Recovery(
        how=about["how"],
        steps=steps,
        rank=rank,
        batch_size=4,
        length=256,
        schedule="cosine",
        seed=seed,
        validate_every=0,
        **options,
    )
    start = time.perf_counter()
    model, summary = recover_model(model, decided, blocks, None, chosen, original_read=reads)
    seconds = time.perf_counter() - start
    against = original if split == "test" else None
    rows = evaluate(model, measured_on, against=against, seed=seed, model_name=name, plan=bare.id)
    size = bare.size(shape)
    made = artefacts.provenance(
        fraction=fraction,
        split=split,
        recovery=dataclasses.asdict(chosen),
        trainable_parameters=summary["trainable_parameters"],
        training_seconds=seconds,
        parameters=size.parameters,
        bytes=size.parameters * 2,
        expert_parameters=size.expert_parameters,
        removed=bare.removed(shape),
        method=name,
    )
    result = []
    for row in [*rows, *before]:
        if row.metric == "perplexity" or (row.model == "original" and name != "LoRA, uncompressed"):
            continue
        result.append({**dataclasses.asdict(row), "seed": seed, "provenance": made})
    return result


def _reader(experts: Any) -> Any:
    return lambda e: read_expert(experts, e)


def jobs_to_select() -> list[dict[str, Any]]:
    """Every method at every learning rate, one seed, half removed; LightMoE also at other end fractions."""
    jobs = [{"name": name, "fraction": 0.5, "seed": 0, "learning_rate": rate} for name in METHODS for rate in RATES]
    others = [end for end in END_FRACTIONS if end != Recovery.end_fraction]
    middle = {"name": "LightMoE", "fraction": 0.5, "seed": 0, "learning_rate": RATES[1]}
    return jobs + [{**middle, "end_fraction": end} for end in others]


def chosen_options(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each method the options with the lowest validation loss."""
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    for row in rows:
        if row["metric"] == "loss" and row["domain"] == "all" and row["model"] in METHODS:
            recovery = row["provenance"]["recovery"]
            options = {key: recovery[key] for key in ("learning_rate", "end_fraction")}
            if row["model"] not in best or row["value"] < best[row["model"]][0]:
                best[row["model"]] = (row["value"], options)
    return {name: options for name, (_, options) in best.items()}


def jobs_to_test() -> list[dict[str, Any]]:
    options = chosen_options(read(RESULTS / "recovery_selection.jsonl"))
    jobs = []
    for seed in SEEDS:
        for name in METHODS:
            for fraction in FRACTIONS if METHODS[name]["method"] else (0.5,):
                jobs.append({"name": name, "fraction": fraction, "seed": seed, **options[name]})
    return jobs


def read(path: Path) -> list[dict[str, Any]]:
    files = sorted(path.parent.glob(f"{path.stem}*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    made = row["provenance"]
    return (
        made["method"],
        made["fraction"],
        row["seed"],
        made["recovery"]["learning_rate"],
        made["recovery"]["end_fraction"],
    )


def work(phase: str, shard: str, steps: int) -> None:
    jobs = jobs_to_select() if phase == "select" else jobs_to_test()
    target = RESULTS / ("recovery_selection.jsonl" if phase == "select" else "recovery_test.jsonl")
    split = "validation" if phase == "select" else "test"
    index, count = map(int, shard.split("/"))
    part = target.with_name(f"{target.stem}.{index}.jsonl") if count > 1 else target
    done = {key_of(row) for row in read(target)}
    for job in jobs[index::count]:
        job = {"end_fraction": Recovery.end_fraction, **job}
        if (job["name"], job["fraction"], job["seed"], job["learning_rate"], job["end_fraction"]) in done:
            continue
        rows = run(job.pop("name"), job.pop("fraction"), job.pop("seed"), split, steps, **job)
        with part.open("a") as stream:
            stream.writelines(json.dumps(row, default=str) + "\n" for row in rows)
        head = next(r for r in rows if r["metric"] == "loss" and r["domain"] == "all" and r["model"] in METHODS)
        print(
            head["model"],
            key_of(head),
            f"loss {head['value']:.4f}",
            f"{rows[0]['provenance']['training_seconds']:.0f}s",
            flush=True,
        )


def join(name: str) -> None:
    """One results file from the shards'."""
    target = RESULTS / f"{name}.jsonl"
    rows = read(target)
    for part in RESULTS.glob(f"{name}.*.jsonl"):
        part.unlink()
    artefacts.write_text(target, "".join(json.dumps(row) + "\n" for row in rows))


def table() -> str:
    """Means over seeds on the test split, with the range that three seeds and the bootstrap leave."""
    rows = [r for r in read(RESULTS / "recovery_test.jsonl") if r["domain"] == "all"]
    lines = [
        "| removed | method | parameters | trained | bits per byte | KL to the original | top-1 agreement |",
        "|---|---|---|---|---|---|---|",
    ]
    original = [r for r in rows if r["model"] == "original" and r["metric"] == "bits_per_byte"]
    if original:
        o = original[0]
        lines.append(
            f"| 0 | original | {11_571_456:,} | | {o['value']:.3f} ({o['low']:.3f} to {o['high']:.3f}) | 0 | 1 |"
        )
    for fraction in (*FRACTIONS,):
        for name in METHODS:
            mine = [r for r in rows if r["model"] == name and r["provenance"]["fraction"] == fraction]
            if not mine:
                continue
            made = mine[0]["provenance"]
            cells = [_cell([r for r in mine if r["metric"] == m]) for m in ("bits_per_byte", "kl", "top1_agreement")]
            shown = f"{made['removed']:.0%}" if METHODS[name]["method"] else "0"
            lines.append(
                f"| {shown} | {name} | {made['parameters']:,} | {made['trainable_parameters']:,} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def _cell(rows: list[dict[str, Any]]) -> str:
    """Mean over seeds, and the widest of their bootstrap intervals."""
    values = np.array([r["value"] for r in rows])
    low, high = min(r["low"] for r in rows), max(r["high"] for r in rows)
    return f"{values.mean():.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("select", "test", "join", "table"))
    parser.add_argument("--shard", default="0/1", help="this process's part of the jobs, such as 0/2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    RESULTS.mkdir(exist_ok=True)
    if arguments.phase == "table":
        print(table())
    elif arguments.phase == "join":
        join("recovery_selection")
        join("recovery_test")
    else:
        work(arguments.phase, arguments.shard, arguments.steps)


if __name__ == "__main__":
    main()
