"""Plan files on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..errors import PlanError
from ..files import write_text
from ..places import bare
from .plan import Plan


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan as JSON with a line for every expert."""
    write_text(path, replace(plan, provenance=bare(plan.provenance)).dumps())


def load_plan(path: str | Path) -> Plan:
    """Read a plan file. Raises PlanError, naming the file, for anything else."""
    path = Path(path)
    if not path.is_file():
        raise PlanError(f"no plan file at {path}; make one with: locum plan STATISTICS ... --out {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"plan {path} cannot be read as text ({error}); make one with: locum plan") from error
    return Plan.loads(text, f"plan {path}")
