"""`locum verify` of every kind of checkpoint in every engine that is there: `make engines-report`.

    PYTHONPATH=tests python -m engines.report            run everything, write the results and docs/engines.md
    PYTHONPATH=tests python -m engines.report WORD...    only the cases with one of the words in their name
    PYTHONPATH=tests python -m engines.report --docs     only write docs/engines.md from the results there are

Results are in `benchmarks/results/engines.json`, written after every case. The page is made from them alone, so that a test
can tell whether it is current.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import locum
from engines.made import PLANS, REFERENCE, original, statistics
from locum.checkpoints.skeleton import read_shape
from locum.engines.engines import ENGINES
from locum.plans.bits import FewBits
from locum.plans.plan import make_plan
from locum.verification.folder import FAILED, OK, SKIPPED, Check
from making.checkpoints import write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "engines.json"
PAGE = ROOT / "docs" / "engines.md"
FAMILIES = {"reference": "the bundled OLMoE", "qwen3_moe": "a tiny Qwen3-MoE", "deepseek_v3": "a tiny DeepSeek-V3"}
NEW_TOKENS, PROMPTS = 64, 8


@dataclass(frozen=True)
class Case:
    family: str
    kind: str  # a plan of engines/made.py
    stock: bool = False  # exported with whole experts, in the stock layout
    precision: str = "fp32"
    few: bool = False  # experts and stand-ins in 4 bits

    @property
    def name(self) -> str:
        return f"{self.family}, {self.form}, {self.precision}"

    @property
    def form(self) -> str:
        return f"{self.kind}{', exported' if self.stock else ''}{', in 4 bits' if self.few else ''}"


def all_cases() -> tuple[Case, ...]:
    compressed = [kind for kind in PLANS if kind != "uniform"]
    cases = [Case(family, kind) for family in FAMILIES for kind in compressed]
    cases += [Case("reference", kind, precision="bf16") for kind in compressed]
    # Its head is tied to the embedding, and vLLM's class of the family wants one of its own, which export writes.
    cases += [Case("reference", "uniform", stock=True), Case("reference", "merged", stock=True)]
    cases += [Case("qwen3_moe", "uniform"), Case("deepseek_v3", "uniform")]
    return (*cases, Case("reference", "lightmoe", few=True))


# --- running ----------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--docs", action="store_true", help="only write docs/engines.md from the results there are")
    parser.add_argument("words", nargs="*", help="only the cases with one of these in their name")
    options = parser.parse_args()
    results = read_results()
    if not options.docs:
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        for case in all_cases():
            if not options.words or any(word in case.name for word in options.words):
                results[case.name] = [asdict(check) for check in run(case)]
                print(f"{case.name}: {said(results[case.name])}", flush=True)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(results), encoding="utf-8")
    return int(any(check["result"] == FAILED for checks in results.values() for check in checks))


def read_results() -> dict[str, list[dict[str, str]]]:
    """Of the cases that there still are, in their order."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return {case.name: found[case.name] for case in all_cases() if case.name in found}


def run(case: Case) -> list[Check]:
    """What `locum verify` says, without what differs from one run to the next."""
    with tempfile.TemporaryDirectory(prefix="locum-engines-") as scratch:
        folder = make(case, Path(scratch))
        checks = locum.verify(
            folder,
            precision=case.precision,
            new_tokens=NEW_TOKENS,
            long_tokens=8 * NEW_TOKENS,
            prompts=PROMPTS,
            statistics=statistics_of(read_shape(folder.with_name("original"))) if case.kind == "constants" else None,
        )
    plain = [(re.compile(re.escape(str(folder))), "DIR"), (re.compile(r", in \d+ seconds"), "")]
    lines = []
    for check in checks:
        detail = check.detail
        for pattern, words in plain:
            detail = pattern.sub(words, detail)
        lines.append(Check(check.check, check.engine, check.result, detail))
    return [line for line in lines if line.check != "original"]  # whose path is of this machine


def make(case: Case, root: Path) -> Path:
    source = root / "original"
    if case.family == "reference":
        source.symlink_to(REFERENCE)
    else:
        original(case.family, torch.float32).save_pretrained(source)
        write_tokenizer(source)
    shape = read_shape(source)
    layers = PLANS[case.kind](shape.layers)
    plan = make_plan(shape, FewBits.of("4", 32, "nearest").applied(layers, shape) if case.few else layers)
    made = locum.apply(source, plan=plan, statistics=statistics_of(shape), out=root / "made")
    if case.stock:
        locum.export(made, to="stock", out=root / "stock")
    return root / "stock" if case.stock else made


def statistics_of(shape: Any) -> Any:
    return statistics(shape, torch.Generator().manual_seed(5))


# --- the page ---------------------------------------------------------------------------------------------------


def said(checks: list[dict[str, str]], engine: str = "") -> str:
    """What an engine says of a checkpoint in one word or two; without one, the files and all that was run."""
    mine = [check for check in checks if not engine or check["engine"] == engine]
    if bad := [check["check"] for check in mine if check["result"] == FAILED]:
        return f"**fails**: {', '.join(bad)}"
    if any(check["result"] == OK for check in mine):
        return "ok"
    return "not run" if any(check["detail"].startswith("not there") for check in mine) else "cannot"


def versions(results: dict[str, list[dict[str, str]]]) -> Iterator[str]:
    """Of the engines, as they said themselves."""
    for name, engine in ENGINES.items():
        checks = [check for checks in results.values() for check in checks]
        told = [c for c in checks if c["engine"] == name and c["check"] == "tensors" and c["result"] == OK]
        found = sorted({check["detail"].split()[0] for check in told})
        yield f"| {engine.title} | {', '.join(found) or 'not run'} |"


def page(results: dict[str, list[dict[str, str]]]) -> str:
    lines = [
        "# Engines",
        "",
        "Made by `make engines-report` from its results; do not edit. Checkpoints of every kind, made by plans that are",
        "written by hand, are opened by `locum verify` in every engine that is there, and compared with what the model in",
        f"memory says: logits of {PROMPTS} prompts, and the {NEW_TOKENS} greedy tokens after each.",
        "",
        "| engine | version |",
        "|---|---|",
        *versions(results),
        "",
        "*ok*: nothing failed. *cannot*: the engine's format has no place for it; below is why. *not run*: the engine was not",
        "there, or the case has not been run yet.",
        "",
        f"| model | checkpoint | precision | files | {' | '.join(engine.title for _, engine in ENGINES.items())} |",
        "|---" * (4 + len(ENGINES)) + "|",
        *(_row(case, results.get(case.name)) for case in all_cases()),
        "",
        "Kinds: "
        + " ".join(f"*{name}*: {_first_sentence(kind.__doc__)}" for name, kind in PLANS.items())
        + " *Exported* by `locum export --to stock`; *in 4 bits*, in groups of 32, to the nearest. The models: "
        + ", ".join(f"*{name}* is {title}" for name, title in FAMILIES.items())
        + "; tiny ones have random weights.",
        "",
    ]
    for case in all_cases():
        if case.name in results:
            lines += [f"## {case.name}", "", *_details(results[case.name]), ""]
    return "\n".join(lines)


def _first_sentence(text: str | None) -> str:
    return " ".join((text or "").split())


def _row(case: Case, checks: list[dict[str, str]] | None) -> str:
    if checks is None:
        cells = ["not run"] * (1 + len(ENGINES))
    else:
        files = [check for check in checks if not check["engine"]]
        cells = [said(files), *(said(checks, engine) for engine in ENGINES)]
    return f"| {' | '.join((case.family, case.form, case.precision, *cells))} |"


def _details(checks: list[dict[str, str]]) -> list[str]:
    files = [check for check in checks if not check["engine"] and check["result"] == OK]
    left_out = [check for check in checks if not check["engine"] and check["result"] == SKIPPED]
    rows = [
        ("files", ", ".join(check["check"] for check in files), OK, ""),
        *(("files", check["check"], check["result"], check["detail"]) for check in left_out),
        *(
            (check["engine"] or "files", check["check"], check["result"], check["detail"])
            for check in checks
            if check["engine"] or check["result"] == FAILED
        ),
    ]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return ["| engine | check | result | detail |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in cells)]


if __name__ == "__main__":
    sys.exit(main())
