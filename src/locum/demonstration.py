"""The demonstration: the bundled, really trained MoE loses half of its expert weights and keeps most of its ability."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from . import bundled
from .files import NOTES, check_output, provenance, whole, write_text
from .measure.rows import Row, write_rows
from .stages.application import apply
from .stages.calibration import calibrate
from .stages.evaluation import evaluate
from .stages.options import Force, Help, Progress, alone, check_number, silent
from .stages.planning import plan
from .stages.recovery import recover
from .stages.reporting import report

REMOVE = 0.5
COMPRESSED = {
    "lightmoe": {"method": "lightmoe", "rank": 4},
    "reap": {"method": "prune", "score": "reap"},
}
# The same for every method, so that none is favoured: a way that trains whatever a plan made.
RECOVERY = {"how": "lora", "rank": 4, "batch_size": 4, "learning_rate": 1e-3, "validation_tokens": 8192}


@alone
def demo(
    *,
    out: Annotated[Path, Help("folder for everything the demonstration makes")] = Path("locum-demo"),
    steps: Annotated[int, Help("recovery steps of every method")] = 60,
    force: Force = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """The whole job on the bundled, really trained model: compress, recover, compare, report. Needs no network."""
    out = check_output(out, force, "folder")
    check_number("steps", steps, 1)
    with whole(out, "folder") as folder:
        models = _run(folder, steps, progress)
        write_text(folder / NOTES, json.dumps(provenance(steps=steps), indent=1))
    title = "Locum demo: half of the experts' weights"
    page = report([out / "results.jsonl"], out=out / "report.html", title=title)
    return {"report": str(page), "models": models}


def _run(folder: Path, steps: int, progress: Progress) -> list[dict[str, Any]]:
    data = bundled.reference_data()
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        start = time.perf_counter()
        work()
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    statistics = folder / "statistics.safetensors"
    timed("calibrate", lambda: calibrate(bundled.MODEL, data=data, tokens=32768, out=statistics, progress=progress))
    for name, options in COMPRESSED.items():
        decided = folder / f"{name}.plan.json"

        def compress(decided: Path = decided, name: str = name, options: dict = options) -> None:
            plan([statistics], remove=REMOVE, out=decided, **options)
            apply(bundled.MODEL, plan=decided, out=folder / name)

        timed(name, compress)
    recovery = {**RECOVERY, "steps": steps, "validate_every": 0}  # at both ends
    for name in COMPRESSED:

        def train(name: str = name) -> None:
            recover(folder / name, data=data, out=folder / f"{name} recovered", progress=progress, **recovery)

        timed(f"{name} recovered", train)
    rows: list[Row] = []
    models = [name + state for name in COMPRESSED for state in ("", " recovered")]
    for done, name in enumerate(models):
        progress("evaluate", done, len(models))
        measured = evaluate(folder / name, data=data, tokens=8192, against=bundled.MODEL, name=name)
        rows += measured if not rows else [row for row in measured if row.model != "original"]
    progress("evaluate", len(models), len(models))
    write_rows(folder / "results.jsonl", rows)
    return _summary(rows, seconds)


def _summary(rows: list[Row], seconds: dict[str, float]) -> list[dict[str, Any]]:
    """One entry a model, the original first: size, bits per byte on every domain, seconds of work."""
    models = sorted(dict.fromkeys(row.model for row in rows), key=lambda model: model != "original")
    return [
        {
            "model": model,
            "bytes": next(row.provenance["bytes"] for row in rows if row.model == model),
            "bits_per_byte": {r.domain: r.value for r in rows if (r.model, r.metric) == (model, "bits_per_byte")},
            "seconds": seconds.get(model),
        }
        for model in models
    ]
