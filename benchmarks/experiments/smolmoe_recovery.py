"""SmolMoE compressed and trained back with Locum's own commands: size, loss, time and memory, by method and way of recovery.

    python -m benchmarks.experiments.smolmoe_recovery select [--quick]    learning rates, on the validation split
    python -m benchmarks.experiments.smolmoe_recovery run [--quick]       the best of them, on test
                                                      [--seeds 0,1,2] [--recovery-steps 24]
    python -m benchmarks.experiments.smolmoe_recovery table

Calibration, training and measuring are on text that SmolMoE was not trained on, split by Locum into train, validation
and test. Every command is a process of its own, and what is told of memory is its greatest resident size. All methods
are given the same rates to choose from, at half of the experts, with seed 0. A job that is in the results is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub

from benchmarks.experiments.experiment import cell
from benchmarks.reference.evaluate import environment
from benchmarks.smolmoe.build import add_options, cached_model, recipe_of
from benchmarks.smolmoe.dense import smolmoe_folder
from benchmarks.smolmoe.results import commit
from benchmarks.smolmoe.text import write_files

RESULTS = Path(__file__).parents[1] / "results" / "smolmoe_recovery.jsonl"
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
LIGHTMOE = ["--method", "lightmoe", "--rank", "16"]
METHODS = {
    "LightMoE": (LIGHTMOE, "annealed"),
    "REAP + LoRA": (["--method", "prune", "--score", "reap"], "lora"),
    "LightMoE + LoRA": (LIGHTMOE, "lora"),
    "LightMoE, layer by layer": (LIGHTMOE, "layerwise"),
    "LightMoE, distilled": (LIGHTMOE, "kd"),
}
FRACTIONS = (0.25, 0.5)
CALIBRATED = 16_384  # tokens
MEASURED = 6_144  # tokens
TRAINING = ["--batch-size", "2", "--length", "256", "--schedule", "cosine", "--precision", "bf16"]
TRAINING += ["--rank", "16", "--validate-every", "0", "--validation-tokens", "4096"]


def locum(*arguments: Any) -> dict[str, float]:
    """One command in a process of its own: its seconds and its greatest resident size. Raises where it fails."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "locum", *map(str, arguments)])
    _, status, used = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"locum {arguments[0]} ended with {code}")
    return {"seconds": round(time.monotonic() - start, 1), "peak_bytes": used.ru_maxrss * 1024}


class Bench:
    """The jobs of one model, in a scratch folder that is thrown away."""

    def __init__(self, model: Path, specs: list[str], scratch: Path, steps: int, results: Path) -> None:
        self.model, self.scratch, self.steps, self.results = model, scratch, steps, results
        self.data = [word for spec in specs for word in ("--data", spec)]
        self.statistics = scratch / "statistics"
        self.about = {"benchmark": "smolmoe_recovery", "base": model.name, "commit": commit(), **environment()}

    def is_done(self, name: str, fraction: float, seed: int | None) -> bool:
        """Whether it is in the results, whoever put it there."""
        wanted = {"name": name, "fraction": fraction, "seed": seed, "steps": self.steps, "base": self.model.name}
        return any("all" in row and wanted.items() <= row.items() for row in rows_of(self.results))

    def select(self, name: str) -> None:
        """A method trained at every rate; what stands in the results is the validation loss before and after."""
        left = [rate for rate in RATES if (name, rate, self.steps) not in self.tried()]
        small = self._apply(name, 0.5)[0] if left else self.scratch
        for rate in left:
            out, used = self._recover(small, name, rate, 0)
            log = [json.loads(line) for line in (out / "recovery.jsonl").read_text().splitlines()]
            losses = [line["validation_loss"] for line in log if "validation_loss" in line]
            row = {"name": name, "fraction": 0.5, "seed": 0, "learning_rate": rate, "recover": used}
            self._write({**row, "validation_loss": {"before": losses[0], "after": losses[-1]}})

    def tried(self) -> dict[tuple[str, float, int], float]:
        """By method, learning rate and steps: the validation loss after training."""
        rows = [row for row in rows_of(self.results) if row["base"] == self.model.name and "validation_loss" in row]
        return {(r["name"], r["learning_rate"], r["steps"]): r["validation_loss"]["after"] for r in rows}

    def job(self, name: str, fraction: float, seeds: list[int]) -> None:
        """A plan applied and measured, and trained back and measured once for every seed."""
        if all(self.is_done(name, fraction, seed) for seed in (None, *seeds)):
            return
        tried = {rate: loss for (n, rate, steps), loss in self.tried().items() if (n, steps) == (name, self.steps)}
        if not tried:
            raise SystemExit(f"no learning rate was chosen for {name} with {self.steps} steps: run select first")
        small, used = self._apply(name, fraction)
        if not self.is_done(name, fraction, None):
            self._measure(small, name, fraction, None, {"apply": used})
        for seed in seeds:
            if not self.is_done(name, fraction, seed):
                rate = min(tried, key=tried.__getitem__)
                out, used = self._recover(small, name, rate, seed)
                self._measure(out, name, fraction, seed, {"learning_rate": rate, "recover": used})

    def _apply(self, name: str, fraction: float) -> tuple[Path, dict[str, float]]:
        plan, small = self.scratch / "plan.json", self.scratch / "small"
        if not self.statistics.is_file():
            made = locum("calibrate", self.model, *self.data, "--tokens", CALIBRATED, "--out", self.statistics)
            self._write({"name": "calibrate", "fraction": 0, "seed": None, "calibrate": made})
        locum("plan", self.statistics, *METHODS[name][0], "--remove", fraction, "--out", plan, "--force")
        return small, locum("apply", self.model, "--plan", plan, "--out", small, "--force")

    def _recover(self, small: Path, name: str, rate: float, seed: int) -> tuple[Path, dict[str, float]]:
        out = self.scratch / "recovered"
        words = ["--how", METHODS[name][1], "--steps", self.steps, "--learning-rate", rate, "--seed", seed]
        words += ["--original", self.model, "--out", out, "--force", "--restart"]
        return out, locum("recover", small, *self.data, *TRAINING, *words)

    def _measure(self, folder: Path, name: str, fraction: float, seed: int | None, used: dict[str, Any]) -> None:
        file = self.scratch / "rows.jsonl"
        words = ["--tokens", MEASURED, "--length", 256, "--resamples", 500, "--out", file, "--append"]
        against = [] if folder == self.model else ["--against", self.model]
        used["eval"] = locum("eval", folder, *self.data, *against, *words)
        found = [json.loads(line) for line in file.read_text().splitlines()]
        file.unlink()
        of_all = [row for row in found if row["domain"] == "all" and row["model"] != "original"]
        measured = {row["metric"]: {key: row[key] for key in ("value", "low", "high")} for row in of_all}
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        self._write({"name": name, "fraction": fraction, "seed": seed, "file_bytes": size, **used, "all": measured})

    def _write(self, row: dict[str, Any]) -> None:
        made = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "training": TRAINING}
        with self.results.open("a", encoding="ascii") as stream:
            stream.write(json.dumps({**self.about, **row, "steps": self.steps, **made}) + "\n")


def rows_of(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the original, then every method at every size, before and after training."""
    lines = [
        "| removed | method | file | bits per byte before training | after (seeds) | KL to the original after | most memory |",
        "|---|---|---|---|---|---|---|",
    ]
    jobs = dict.fromkeys((row["fraction"], row["name"]) for row in rows if "all" in row)
    for fraction, name in sorted(jobs):
        mine = [row for row in rows if (row["fraction"], row["name"]) == (fraction, name) and "all" in row]
        before, after = (
            [r for r in mine if (r["seed"] is None) == untrained and r["steps"] == mine[-1]["steps"]]
            for untrained in (True, False)
        )
        peak = max(
            use["peak_bytes"] for row in mine for use in row.values() if isinstance(use, dict) and "peak_bytes" in use
        )
        cells = [f"{fraction:.0%}" if fraction else "0", name, f"{mine[0]['file_bytes'] / 2**20:.0f} MiB"]
        cells.append(cell([row["all"]["bits_per_byte"] for row in before]))
        cells.append(f"{cell([row['all']['bits_per_byte'] for row in after])} ({len(after)})" if after else "")
        cells.append(cell([row["all"]["kl"] for row in after]) if after else "")
        lines.append("| " + " | ".join([*cells, f"{peak / 2**30:.1f} GiB"]) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("select", "run", "table"))
    add_options(parser)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument(
        "--fractions", type=float, nargs="+", default=list(FRACTIONS), help="of the experts' parameters"
    )
    parser.add_argument("--seeds", default="0,1,2", help="of the training back, with commas (0,1,2)")
    parser.add_argument("--recovery-steps", type=int, default=24, help="of 2 x 256 tokens (24)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines")
    options = parser.parse_args()
    if options.action != "table":
        recipe = recipe_of(options)
        model = cached_model(recipe)
        if not model.is_dir():
            print(
                f"smolmoe_recovery: {model} is not there; build it with: python -m benchmarks.smolmoe.build build",
                file=sys.stderr,
            )
            return 1
        specs = write_files(smolmoe_folder() / "text", list(recipe.domains))
        with tempfile.TemporaryDirectory() as scratch:
            bench = Bench(model, specs, Path(scratch), options.recovery_steps, options.results)
            if options.action == "select":
                for name in options.methods:
                    bench.select(name)
            else:
                if not bench.is_done("original", 0.0, None):
                    bench._measure(model, "original", 0.0, None, {})
                for seed in map(int, options.seeds.split(",")):  # a whole table of one seed before the next
                    for fraction in options.fractions:
                        for name in options.methods:
                            bench.job(name, fraction, [seed])
    print(table(rows_of(options.results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
