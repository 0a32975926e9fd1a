"""How long the plans of every method take that plans from statistics alone, all from one file and without the model.

    python -m benchmarks.speed.plans [--tokens 16384] [--remove 0.25 0.5] [--threads 1] [--out results/plans.jsonl]

A copy of the bundled model is calibrated once, for all that these methods read with their default options, and then deleted. From
the file alone each method makes its plan for every fraction of the experts' parameters (one that saves no stored parameters makes
the one that its own options say), `prune` by every criterion that the file has statistics for. Left out by name: methods that read
weights or try removals on the model. `seconds` are those of all plans together, reading the file each time included.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import locum
from benchmarks.speed.timing import publish
from locum.bundled import MODEL, reference_data
from locum.criteria.criterion import CRITERIA
from locum.errors import LocumError
from locum.methods import METHODS, TARGETED, Method, SearchingMethod
from locum.plans.plan import Plan
from locum.stats.definitions import STATISTICS


def of_statistics_alone(method: Method) -> bool:
    searched = any(STATISTICS[name].searched for name in method.needs())
    return not (method.reads_weights or searched or isinstance(method, SearchingMethod))


def asked(remove: list[float], collected: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the arguments of every plan."""
    for name, cls in METHODS.items():
        if of_statistics_alone(cls()):
            yield from ((name, {"method": name, **how}) for how in targets(cls, remove))
    for score, criterion in CRITERIA.items():
        if set(criterion.needs) <= collected:
            yield from ((f"prune {score}", {"method": "prune", "score": score, "remove": x}) for x in remove)


def targets(cls: type[Method], remove: list[float]) -> list[dict[str, float]]:
    return [{"remove": x} for x in remove] if cls.saves in TARGETED else [{}]


def plans(file: Path, remove: list[float], collected: set[str]) -> tuple[dict[str, float], dict[str, str]]:
    """The seconds that the plans of each name took, and why the others were refused."""
    seconds: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, arguments in asked(remove, collected):
        begin = time.perf_counter()
        try:
            made = locum.plan(file, **arguments)
        except LocumError as error:
            refused[f"{name} {arguments.get('remove', '')}".strip()] = str(error)
        else:
            assert isinstance(made, Plan)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin
    return seconds, refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--remove", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="append the result to this file")
    options = parser.parse_args()
    chosen = {name: cls() for name, cls in METHODS.items()}
    needs = dict.fromkeys(need for m in chosen.values() if of_statistics_alone(m) for need in m.needs())
    also = [name for name in needs if STATISTICS[name].on_demand]
    with tempfile.TemporaryDirectory() as folder:
        copy, file = Path(folder) / "model", Path(folder) / "statistics.safetensors"
        shutil.copytree(MODEL, copy)
        begin = time.perf_counter()
        made = locum.calibrate(copy, data=reference_data(), tokens=options.tokens, also=also, out=file)
        collected = set(made.names)
        calibration = time.perf_counter() - begin
        shutil.rmtree(copy)
        begin, cpu = time.perf_counter(), time.process_time()
        seconds, refused = plans(file, options.remove, collected)
        result = {
            "benchmark": "plans",
            "seconds": round(time.perf_counter() - begin, 2),
            "processor_seconds": round(time.process_time() - cpu, 2),
            "calibration_seconds": round(calibration, 1),
            "file_bytes": file.stat().st_size,
            "tokens": options.tokens,
            "remove": options.remove,
            "plans": sum(1 for _ in asked(options.remove, collected)) - len(refused),
            "refused": refused,
            "by_name": {name: round(value, 3) for name, value in seconds.items()},
            "left_out": [name for name, method in chosen.items() if not of_statistics_alone(method)],
        }
    publish(result, options.threads, options.out)


if __name__ == "__main__":
    main()
