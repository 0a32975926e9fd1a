"""Every method and every criterion on the reference model at equal bytes, random pruning among them, nothing trained back.

    python -m benchmarks.experiments.catalogue run [--out build/catalogue]    `locum compare --methods all,criteria`; resumes
    python -m benchmarks.experiments.catalogue table

Text is the bundled one, which the reference model never saw in training. Calibration reads the train split of six domains; figures are of
the test split of all eight, so two are of domains that calibration never saw. Three seeds of calibration. Nothing is chosen
here, so the validation split is not used.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import locum
from benchmarks.experiments.experiment import RESULTS
from benchmarks.reference.evaluate import environment
from benchmarks.speed.timing import commit
from locum.bundled import MODEL, reference_data
from locum.files import write_text

FILE = RESULTS / "catalogue.json"
ASKED = {"methods": "all,criteria", "remove": "0.25,0.5", "seeds": 3, "leave_out": "math,plays"}
TOKENS = {"tokens": 32768, "length": 256, "measured": 8192}


def run(out: Path) -> dict[str, Any]:
    """The comparison, and beside its folder a file with what was asked and where it ran."""
    progress = lambda words, done, of: print(f"{done}/{of} {words}", flush=True)  # noqa: E731
    found = locum.compare(MODEL, data=reference_data(), out=out, progress=progress, **ASKED, **TOKENS)
    found.pop("report")
    write_text(
        FILE, json.dumps({"commit": commit(), **environment(), "asked": ASKED | TOKENS, **found}, indent=1) + "\n"
    )
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown: at each size all candidates, the best first."""
    lines = []
    for group in found["groups"]:
        order = group["order_over_seeds"]
        lines += [
            f"At {group['remove']:.0%} of the experts' bytes removed; Kendall's tau between the orders of two seeds {order:.2f}:",
            "",
            "| candidate | loss above the original | by seed | KL | worst domain | math, never seen | plays, never seen | below random by |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in group["rows"]:
            told = [row["name"], interval(row["loss_delta"]), ", ".join(f"{each:.3f}" for each in row["by_seed"])]
            told += [f"{row['kl']:.3f}", "{} {:.3f}".format(*row["worst_domain"])]
            told += [interval(row["left_out"][name]) for name in ("math", "plays")]
            against = row["against_random"]
            told += ["" if against is None else interval([-against[0], -against[2], -against[1]])]
            lines.append(f"| {' | '.join(told)} |")
        lines += [f"| {name} | refused: {why} |" for name, why in group["refused"].items()]
        lines.append("")
    return "\n".join(lines)


def interval(of: list[float]) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("run", "table"))
    parser.add_argument("--out", type=Path, default=Path("build/catalogue"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(table(run(arguments.out) if arguments.phase == "run" else json.loads(FILE.read_text())))


if __name__ == "__main__":
    main()
