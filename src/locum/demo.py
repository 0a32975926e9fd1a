"""The demonstration: the bundled, really trained MoE loses half of its expert weights and keeps most of its ability."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import artefacts, quality, stages
from .card import describe_size
from .evaluate import Row

REFERENCE = Path(__file__).parent / "reference"
MODEL = REFERENCE / "model"
REMOVE = 0.5
COMPRESSED = {
    "lightmoe": {"method": "lightmoe", "rank": 4},
    "reap": {"method": "prune", "score": "reap"},
    "replace": {"method": "replace", "rank": 4},
}


def reference_data() -> list[str]:
    """The bundled held-out text, one domain a file, as `--data` takes it."""
    return [f"{path.stem}={path}" for path in sorted((REFERENCE / "text").glob("*.txt")) if path.stem.islower()]


def run_demo(out: Path, steps: int, progress: stages.Progress) -> Path:
    """Compress in three ways, recover one, measure all against the original, write the report. Returns its path."""
    with artefacts.whole(out, "folder") as folder:
        _run(folder, steps, progress)
    report = quality.report(
        [out / "results.jsonl"], out=out / "report.html", title="Locum demo: half of the experts' weights"
    )
    return report


def _run(folder: Path, steps: int, progress: stages.Progress) -> None:
    data = reference_data()
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        start = time.perf_counter()
        work()
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    statistics = folder / "statistics.safetensors"
    timed("calibrate", lambda: stages.calibrate(MODEL, data=data, tokens=65536, out=statistics, progress=progress))
    for name, options in COMPRESSED.items():
        plan = folder / f"{name}.plan.json"

        def compress(plan: Path = plan, name: str = name, options: dict = options) -> None:
            stages.plan([statistics], remove=REMOVE, out=plan, **options)
            stages.apply(MODEL, plan=plan, out=folder / name)

        timed(name, compress)
    recovered = "lightmoe recovered"
    options = {"steps": steps, "batch_size": 4, "learning_rate": 1e-3, "rank": 4, "validate_every": max(steps // 4, 1)}
    timed(
        recovered,
        lambda: quality.recover(folder / "lightmoe", data=data, out=folder / recovered, progress=progress, **options),
    )
    rows: list[Row] = []
    for done, name in enumerate(("lightmoe", recovered, "reap", "replace")):
        progress("evaluate", done, 4)
        measured = quality.evaluate(folder / name, data=data, tokens=49152, against=MODEL, name=name)
        rows += measured if not rows else [row for row in measured if row.model != "original"]
    progress("evaluate", 4, 4)
    quality.write_rows(folder / "results.jsonl", rows)
    _print_table(rows, seconds)


def _print_table(rows: list[Row], seconds: dict[str, float]) -> None:
    """One line a model: size, bits per byte on every domain, seconds of work."""
    domains = list(dict.fromkeys(row.domain for row in rows))
    models = list(dict.fromkeys(row.model for row in rows))
    values = {(row.model, row.domain): row.value for row in rows if row.metric == "bits_per_byte"}
    sizes = {row.model: row.provenance["bytes"] for row in rows}
    table = Table("model", "size", *domains, "seconds", title="bits per byte on held-out text (lower is better)")
    for model in ["original", *[m for m in models if m != "original"]]:
        cells = [f"{values[model, domain]:.3f}" for domain in domains]
        spent = f"{seconds[model]:.0f}" if model in seconds else ""
        table.add_row(model, describe_size(sizes[model]), *cells, spent)
    Console(width=150).print(table)
