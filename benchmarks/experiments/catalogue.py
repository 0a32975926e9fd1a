"""Every method and every criterion on the reference model at equal bytes, random pruning among them, nothing trained back.

    python -m benchmarks.experiments.catalogue run [--out build/catalogue]    `locum compare --methods all,criteria`; resumes
    python -m benchmarks.experiments.catalogue page                           docs/catalogue.svg, and the tables of docs/catalogue.md
    ... --model smolmoe                 criteria and methods that build quickly on SmolMoE, where it was built; a page of its own

Text is the bundled one, which the reference model never saw in training. Calibration reads the train split of six domains; figures are of
the test split of all eight, so two are of domains that calibration never saw. Three seeds of calibration. Nothing is chosen
here, so the validation split is not used.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

import locum
from benchmarks.experiments.equal_bytes import SUBJECTS, Subject, subject
from benchmarks.experiments.experiment import RESULTS
from benchmarks.reference.evaluate import environment
from benchmarks.speed.timing import commit
from locum.files import write_text

NAMES = {"reference": "catalogue", "smolmoe": "catalogue_smolmoe"}  # of the files, and of the page
PAGES = RESULTS.parents[1] / "docs"
BELOW = "## All of them"  # what the page says above is written by hand
LEAST = 2e-4  # nats per token, where the picture begins
ASKED = {"remove": "0.25,0.5", "seeds": 3, "leave_out": "math,plays", "tokens": 32768, "length": 256, "measured": 8192}
METHODS = {
    "reference": "all,criteria",
    "smolmoe": "prune,"  # those that are built quickly
    + ",".join(f"prune:score={name}" for name in ("frequency", "gate", "ean", "weighted_ean", "easy_ep", "ewn"))
    + ",mone,diep,narrow,m-smoe,con-moe",
}


def run(of: Subject, out: Path) -> None:
    """The comparison, and a file with it, what was asked and where it ran."""
    asked = {"methods": METHODS[of.name]} | ASKED
    progress = lambda words, done, of: print(f"{done}/{of} {words}", flush=True)  # noqa: E731
    found = locum.compare(of.folder, data=list(of.data), out=out, progress=progress, **asked)
    found.pop("report")
    write_text(file_of(of), json.dumps({"commit": commit(), **environment(), "asked": asked, **found}, indent=1) + "\n")


def file_of(of: Subject) -> Path:
    return RESULTS / f"{NAMES[of.name]}.json"


def table(found: dict[str, Any]) -> str:
    """Markdown: at each size all candidates, the best first."""
    lines = []
    for group in found["groups"]:
        order = group["order_over_seeds"]
        lines += [
            f"At {group['remove']:.0%} of the experts' bytes removed; Kendall's tau between the orders of two seeds {order:.2f}:",
            "",
            "| candidate | loss above the original | by seed | domains seen | math, never seen | plays, never seen | KL | below random by |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in group["rows"]:
            told = [row["name"], interval(row["loss_delta"]), ", ".join(f"{each:.3f}" for each in row["by_seed"])]
            told += [interval(row["seen"])] + [f"{row['left_out'][name][0]:.3f}" for name in ("math", "plays")]
            told += [f"{row['kl']:.3f}"]
            against = row["against_random"]
            told += ["" if against is None else interval([-against[0], -against[2], -against[1]])]
            lines.append(f"| {' | '.join(told)} |")
        lines += [f"\n{name} was refused: {why}" for name, why in group["refused"].items()]
        lines.append("")
    return "\n".join(lines)


def picture(found: dict[str, Any]) -> str:
    """SVG: what each candidate loses at both sizes, on a scale of logarithms; on domains that were seen, and on all eight."""
    rows = {group["remove"]: {row["name"]: row for row in group["rows"]} for group in found["groups"]}
    names, left, right, top, step = list(rows[0.5]), 190, 760, 60, 15
    bottom = top + step * len(names)

    def place(value: float) -> float:
        decades = (math.log10(max(value, LEAST)) - math.log10(LEAST)) / (math.log10(2) - math.log10(LEAST))
        return left + (right - left) * min(decades, 1.0)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + 20} {bottom + 20}" font-family="sans-serif" font-size="11">',
        f'<rect width="{right + 20}" height="{bottom + 20}" fill="#fff"/>',
        f'<text x="{left}" y="14">loss above the original, nats per token; dots: all eight domains, rings: the six that calibration saw</text>',
    ]
    for amount, colour, at in ((0.25, "#0072b2", left), (0.5, "#c8500a", left + 230)):
        lines.append(f'<text x="{at}" y="29" fill="{colour}">{amount:.0%} of the bytes of experts removed</text>')
    for tick in (0.001, 0.01, 0.1, 1.0):
        lines.append(f'<path d="M{place(tick):.1f} {top - 6}V{bottom}" stroke="#e6e9ee"/>')
        lines.append(f'<text x="{place(tick):.1f}" y="{top - 8}" text-anchor="middle" fill="#59616b">{tick:g}</text>')
    for i, name in enumerate(names):
        y = top + step * (i + 0.5)
        weight = ' font-weight="600"' if name == "prune:score=random" else ""
        lines.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end"{weight}>{name}</text>')
        for amount, colour in ((0.25, "#0072b2"), (0.5, "#c8500a")):
            row = rows[amount][name]
            for what, fill in (("loss_delta", colour), ("seen", "none")):
                x = place(row[what][0])
                lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{fill}" stroke="{colour}"/>')
    return "\n".join([*lines, "</svg>", ""])


def interval(of: list[float]) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("run", "page"))
    parser.add_argument("--model", choices=SUBJECTS, default="reference")
    parser.add_argument("--out", type=Path, default=Path("build/catalogue"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    of = subject(arguments.model)
    if arguments.phase == "run":
        run(of, arguments.out)
    found = json.loads(file_of(of).read_text())
    page = PAGES / f"{NAMES[of.name]}.md"
    write_text(page.with_suffix(".svg"), picture(found))
    written = page.read_text(encoding="utf-8").partition(BELOW)[0] if page.is_file() else ""
    write_text(page, f"{written}{BELOW}\n\n{table(found)}")


if __name__ == "__main__":
    main()
