"""docs/methods.md: every method, criterion, budget and statistic, as their docstrings say it.

python -m locum.cli.methods_page docs/methods.md    (make methods)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from ..criteria.super_experts import find_super_experts
from ..files import write_text
from ..registries import catalogue, read_docstring

HEAD = """# Methods, criteria, budgets and statistics

This page is made from the docstrings of the code (`make methods`). `locum show NAME` says the same of one thing. Under
*differs* is where an implementation departs from the paper or from the authors' code, and what could not be read there.

A *method* decides what becomes of every expert. Those that take the lowest-scored experts (`prune`, `mone`) take any
*criterion* with `--score` and any *budget* with `--budget`. Criteria read *statistics*: what `locum calibrate` collects
anyway, what it collects when it is asked (`--also NAME`), what a search finds (`locum search`), or what weights alone say
(`locum plan MODEL --method prune --score aimer --no-protect` needs no text). `locum compress` collects what its method needs.

In the formulas t is a token, e an expert, T_e the tokens that selected e, n_e their number, g_t,e the router weight that the
model multiplies the output with, f_e(x_t) the output before it. Higher scores are kept; a never-routed expert has 0.

## MC-Suite

arXiv 2504.05586 drops the experts with the smallest or the largest value of sixteen criteria. Here they are:

| group | criterion of the paper | smallest first | largest first |
|---|---|---|---|
"""
MC_SUITE = (
    ("weights", "EWS, similarity of weights", "ews", "ews_max"),
    ("weights", "RWN, norm of the router's row", "rwn", "rwn_max"),
    ("weights", "WSR, stable rank", "wsr", "wsr_max"),
    ("weights", "EWN, norm of weights", "ewn", "ewn_max"),
    ("routing", "EUF, frequency", "frequency", "euf_max"),
    ("routing", "ECC, co-activation", "ecc_min", "ecc_max"),
    ("routing", "EVTC, coverage of the vocabulary", "evtc", "evtc_max"),
    ("routing", "ETS, shared tokens", "ets_min", "ets_max"),
    ("activations", "EAS, similarity of outputs", "eas", "eas_max"),
    ("activations", "EAE, entropy of outputs", "eae", "eae_max"),
    ("activations", "EAO, outliers of outputs", "eao", "eao_max"),
    ("activations", "EAN, norm of outputs", "ean_dims", "ean_dims_max"),
    ("gradients", "EGS, similarity of gradients", "egs", "egs_max"),
    ("gradients", "EGE, entropy of gradients", "ege", "ege_max"),
    ("gradients", "EGO, outliers of gradients", "ego", "ego_max"),
    ("gradients", "EGN, norm of gradients", "egn", "egn_max"),
)
LEFT_OUT = """
## What is left out, and why

- MESA's score (arXiv 2609.04453): its formula could not be read. `mesa` has its rule for routers of high entropy.
- PuzzleMoE (arXiv 2511.04805) lets two experts share their weights, each with a mask and signs of its own. An expert computes with
  the sum of its parts, which are numbers or few bits of numbers; no part or format holds bits that multiply another part's weights
  yet. `masked` experts have zeros and are as large as they were.
"""
KEPT = (
    "`prune` and `mone` keep them unless `--no-protect` is given; `locum plan` says of any plan what it does to them."
)
KINDS = {"methods": "Methods", "criteria": "Criteria", "budgets": "Budgets", "statistics": "Statistics"}


def page() -> str:
    """The whole page."""
    rows = [f"| {group} | {name} | {_code(low)} | {_code(high)} |" for group, name, low, high in MC_SUITE]
    sections = [_section(title, kind) for kind, title in KINDS.items()]
    return HEAD + "\n".join(rows) + "\n" + LEFT_OUT + _super_experts() + "\n" + "\n".join(sections)


def _super_experts() -> str:
    said = read_docstring(find_super_experts)
    notes = "\n".join(f"- {key}: {value}" for key, value in said["notes"].items())
    return f"\n## Super Experts\n\n{said['summary']} {KEPT}\n\n```\n{said['formula']}\n```\n\n{notes}\n"


def _code(name: str) -> str:
    return f"`{name}`" if name else "not there"


def _section(title: str, kind: str) -> str:
    things = catalogue(kind)[kind]
    lines = [f"## {title}\n", "| name | what it is |", "|---|---|"]
    lines += [f"| [`{name}`](#{kind}-{name}) | {_cell(thing['summary'])} |" for name, thing in things.items()]
    return "\n".join([*lines, ""]) + "\n" + "\n".join(_thing(kind, name, thing) for name, thing in things.items())


def _thing(kind: str, name: str, thing: dict[str, Any]) -> str:
    parts = [f'### <a name="{kind}-{name}"></a>`{name}`', thing["summary"]]
    if thing["formula"]:
        parts.append(f"```\n{thing['formula']}\n```")
    facts = {key: thing[key] for key in ("paper", "saves", "axes") if key in thing}
    facts |= {"statistics": ", ".join(f"`{need}`" for need in thing["statistics"])} if thing.get("statistics") else {}
    parts.append("\n".join(f"- {key}: {value}" for key, value in (facts | thing["notes"]).items()))
    if thing["options"]:
        rows = ["| option | default | what it says |", "|---|---|---|"]
        rows += [
            f"| `--{key.replace('_', '-')}` | {_shown(o['default'])} | {_about(o)} |"
            for key, o in thing["options"].items()
        ]
        parts.append("\n".join(rows))
    return "\n\n".join(part for part in parts if part) + "\n"


def _shown(default: Any) -> str:
    return {True: "yes", False: "no"}.get(default, str(default)) if isinstance(default, bool) else str(default)


def _about(option: dict[str, Any]) -> str:
    choices = f": {', '.join(option['choices'])}" if "choices" in option else ""
    return _cell(option["help"] + choices)


def _cell(text: str) -> str:
    return re.sub(r"\|", r"\\|", text)


if __name__ == "__main__":
    write_text(Path(sys.argv[1]), page())
