"""The whole matrix of families and checks for the installed transformers: `make families`.

    PYTHONPATH=tests python -m families.matrix           run everything, write the results and docs/families.md
    PYTHONPATH=tests python -m families.matrix --docs    only write docs/families.md from the results there are
    PYTHONPATH=tests python -m families.matrix --check NAME   only this check, put beside the results there are

Results are one JSON file per version of transformers, `benchmarks/results/families-VERSION.json`. The page is made from
them alone, so that a test can tell whether it is current.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers

from families.case import Case, NotApplicable
from families.checks import CHECKS
from families.tiny_families import adapted_families, all_families, main_type, other_families, refused_with, tiny_config
from locum.errors import LocumError
from locum.models.families import family_of, model_class

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "families.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--docs", action="store_true", help="only write docs/families.md from the results there are")
    parser.add_argument("--check", choices=CHECKS, help="only this one, put beside the results there are")
    parser.add_argument("families", nargs="*", help="only these, and write nothing")
    options = parser.parse_args()
    failed = False
    if not options.docs:
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        checks = (options.check,) if options.check else tuple(CHECKS)
        results = run(tuple(options.families) or all_families(), checks)
        failed = any(
            verdict.startswith("failed") for row in results["families"].values() for verdict in row["checks"].values()
        )
        if options.families:
            return int(failed)
        file = RESULTS / f"families-{transformers.__version__}.json"
        before = json.loads(file.read_text()) if file.exists() else {"families": {}}
        if options.check:
            results = joined(before, results)
        print(*(changes(before, results) or ["nothing changed"]), sep="\n")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(all_results()))
    return int(failed)


# --- running ----------------------------------------------------------------------------------------------------


def run(families: tuple[str, ...], checks: tuple[str, ...]) -> dict[str, Any]:
    start = time.monotonic()
    rows = {}
    for family in families:
        begin = time.monotonic()
        rows[family] = run_family(family, checks)
        bad = {name: v for name, v in rows[family]["checks"].items() if v.startswith("failed")}
        print(f"{family:22} {time.monotonic() - begin:5.1f} s  {bad or summary(rows[family]['checks'])}", flush=True)
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__.partition("+")[0],
        "minutes": round((time.monotonic() - start) / 60, 1),
        "families": rows,
        "without the interface": {
            **{name: f"adapted: {family_of(name).undecorated}" for name in adapted_families()},
            **{name: f"refused: {refused_with(name)}" for name in other_families()},
        },
    }


def joined(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Results of some checks put into those there are, in the order of the checks."""
    families = {}
    for name, row in before["families"].items():
        checks = row["checks"] | after["families"][name]["checks"]
        families[name] = row | {"checks": {check: checks[check] for check in CHECKS if check in checks}}
    return before | {"minutes": round(before["minutes"] + after["minutes"], 1), "families": families}


def run_family(family: str, names: tuple[str, ...]) -> dict[str, Any]:
    case = Case(family)
    checks = {name: verdict(name, case) for name in names}
    row: dict[str, Any] = {
        "model_type": main_type(family),
        "class": model_class(tiny_config(main_type(family))).__name__,
    }
    rule = family_of(main_type(family))
    row["row"] = sorted(name for name, value in vars(rule).items() if value != type(rule)().__dict__[name])
    if not rule.refuse and "failed" not in checks.get("inspect", ""):
        shape = case.shape.layers[0]
        row["router"] = shape.router_kind
        row["renormalised"] = shape.renormalised
        row["groups"] = shape.num_groups
        row["shared"] = bool(shape.shared_experts)
    return row | {"checks": checks}


def verdict(name: str, case: Case) -> str:
    try:
        CHECKS[name](case)
    except NotApplicable as reason:
        return f"not applicable: {reason}"
    except LocumError as reason:
        rule = family_of(main_type(case.family))
        stated = rule.refuse or rule.refuse_dropping
        return (
            f"refused: {stated}"
            if stated and stated in str(reason)
            else f"failed: refused with no stated reason: {reason}"
        )
    except Exception as error:  # whatever happens is a result
        traceback.print_exc()
        return f"failed: {type(error).__name__}: {' '.join(str(error).split()):.200}"
    return "passed"


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    lines = []
    for family in sorted({*before["families"], *after["families"]}):
        one, two = (side["families"].get(family, {}).get("checks", {}) for side in (before, after))
        for name in sorted({*one, *two}):
            if one.get(name) != two.get(name):
                lines.append(f"{family}, {name}: {one.get(name, 'not there')} -> {two.get(name, 'not there')}")
    return lines


# --- the page ---------------------------------------------------------------------------------------------------


def all_results() -> list[dict[str, Any]]:
    """Every version's results, the newest first."""
    files = RESULTS.glob("families-*.json")
    found = [json.loads(file.read_text()) for file in files]
    return sorted(found, key=lambda result: [int(part) for part in result["transformers"].split(".")], reverse=True)


def summary(checks: dict[str, str]) -> str:
    kinds = {verdict.partition(":")[0] for verdict in checks.values()}
    if kinds <= {"passed", "not applicable"}:
        return "all"
    if "failed" in kinds:
        return "fails: " + ", ".join(name for name, verdict in checks.items() if verdict.startswith("failed"))
    return "refused" if kinds == {"refused"} else "all but dropping experts"


def page(results: list[dict[str, Any]]) -> str:
    names = sorted({family for result in results for family in result["families"]})
    versions = [result["transformers"] for result in results]
    lines = [
        "# Families",
        "",
        "Made by `make families` from its results; do not edit. A tiny real model of every family whose experts are behind",
        "transformers' experts interface, or can be put there, is built from its config class and put through every check",
        "below.",
        "",
        "| transformers | families | pass everything | refused whole | refused in part | fail | minutes |",
        "|---|---|---|---|---|---|---|",
        *(_totals(result) for result in results),
        "",
        "| family | model type | router | gates sum to one | groups | shared experts | needs a row | "
        + " | ".join(versions)
        + " |",
        "|---" * (7 + len(versions)) + "|",
        *(_family(name, results) for name in names),
        "",
        "The rule for gates when experts are dropped: the logits of those that stay go through the model's own score",
        "function, selection and normalisation, as if the dropped ones had a logit of minus infinity.",
        "",
        "*Needs a row*: what `FAMILIES` in `src/locum/models/families.py` says of it; the others need nothing. *all*: every check that",
        "applies passes.",
        "",
        "## What is refused, and why",
        "",
        *_reasons(results),
        "",
        "## Checks that do not apply",
        "",
        *_not_applicable(results),
        "",
        "## Families without the experts interface",
        "",
        "transformers keeps their experts out of the interface at which Locum observes and replaces them. Those whose experts",
        "follow the rule are put behind it and are in the table above; the others `locum inspect` refuses, by name.",
        "",
        "| model type | " + " | ".join(versions) + " | what Locum does, and why |",
        "|---" * (2 + len(versions)) + "|",
        *_without_the_interface(results),
        "",
        "## The checks",
        "",
        *_checks(),
    ]
    return "\n".join(lines) + "\n"


def _totals(result: dict[str, Any]) -> str:
    found = [summary(row["checks"]) for row in result["families"].values()]
    counts = [sum(s == kind for s in found) for kind in ("all", "refused", "all but dropping experts")]
    fails = sum(s.startswith("fails") for s in found)
    return (
        f"| {result['transformers']} | {len(found)} | {' | '.join(map(str, counts))} | {fails} | {result['minutes']} |"
    )


def _family(name: str, results: list[dict[str, Any]]) -> str:
    row = next(result["families"][name] for result in results if name in result["families"])
    known = "router" in row
    cells = [
        name,
        f"`{row['model_type']}`",
        row["router"] if known else "",
        ("yes" if row["renormalised"] else "no") if known else "",
        ("yes" if row["groups"] > 1 else "") if known else "",
        ("yes" if row["shared"] else "") if known else "",
        ", ".join(row["row"]),
    ]
    for result in results:
        there = result["families"].get(name)
        cells.append(summary(there["checks"]) if there else "not there")
    return "| " + " | ".join(cells) + " |"


def _reasons(results: list[dict[str, Any]]) -> list[str]:
    lines: dict[str, None] = {}
    for result in results:
        for name, row in result["families"].items():
            reasons = {v.partition(": ")[2] for v in row["checks"].values() if v.startswith("refused")}
            what = "" if summary(row["checks"]) == "refused" else " (dropping experts only)"
            lines |= dict.fromkeys(f"- **{name}**{what}: {reason}." for reason in sorted(reasons))
    return sorted(lines)


def _not_applicable(results: list[dict[str, Any]]) -> list[str]:
    lines: dict[str, None] = {}
    for result in results:
        for name, row in result["families"].items():
            for check, said in row["checks"].items():
                if said.startswith("not applicable"):
                    lines[f"- **{name}**, {check}: {said.partition(': ')[2]}."] = None
    return sorted(lines) or ["None."]


def _without_the_interface(results: list[dict[str, Any]]) -> list[str]:
    columns = [result["without the interface"] for result in results]
    lines = []
    for name in sorted({name for column in columns for name in column}):
        newest = next(column[name] for column in columns if name in column)
        kind, _, said = newest.partition(": ")
        does = f"gives `{said}` transformers' decorator" if kind == "adapted" else said.partition(": ")[2]
        cells = [column.get(name, "not there").partition(":")[0] for column in columns]
        lines.append(f"| {' | '.join((f'`{name}`', *cells, does))} |")
    return lines


def _checks() -> list[str]:
    lines = []
    for name, check in CHECKS.items():
        lines.append(f"- **{name}**: {' '.join((check.__doc__ or '').split())}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
