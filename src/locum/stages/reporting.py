"""`report`: one page from results and statistics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from ..files import check_output, write_text
from ..reports.report import make_report
from .frontier import curves_of
from .options import Force, Help, Out, alone, needed


@alone
def report(
    results: Sequence[Path],
    *,
    out: Out,
    title: Annotated[str, Help("title of the page")] = "Locum report",
    force: Force = False,
) -> Path:
    """One self-contained HTML page from results files, statistics files or both: pictures first."""
    out = check_output(needed(out, "out"), force, inputs=list(results))
    statistics = [file for file in results if file.suffix == ".safetensors" or _is_of_tensors(file)]
    rows = [file for file in results if file not in statistics]
    made = make_report(rows, statistics=statistics, frontiers=curves_of(statistics), title=title)
    write_text(out, made)
    return out


def _is_of_tensors(file: Path) -> bool:
    """Whether it is a safetensors file, whatever its name: eight bytes of a length, of which text has none, then JSON."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        begin = stream.read(9)
    return begin[8:] == b"{" and b"\0" in begin[:8]
