"""What every size of a model is predicted to cost, as a curve and as rows of a table: of `locum frontier`, and in reports."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from ..files import describe_size
from .charts import Series, curves, escape
from .page import figure, page, section, table

HEADS = ("bytes", "size", "of the original", "bits per weight", "predicted KL", "what became of the experts", "plan")
SHOWN = 4  # kinds of what became of experts


def cells(point: dict[str, Any], whole: int) -> list[str]:
    """A row as text, in the order of HEADS."""
    return [
        f"{point['bytes']:,}",
        describe_size(point["bytes"]),
        f"{point['bytes'] / whole:.1%}",
        f"{point['bits_per_weight']:.2f}",
        f"{point['predicted_kl']:.3g}",
        became(point["became"]),
        point["plan"],
    ]


def plan_command(result: dict[str, Any], given: Sequence[str]) -> str:
    """What to type for the plan of one of the rows, from a statistics file and the options that the frontier was asked with."""
    points = result["points"]
    return shlex.join(["locum", "plan", *given, "--fit", str(points[len(points) // 2]["bytes"])])


def became(counts: dict[str, int]) -> str:
    """The kinds with the most experts, in words."""
    shown = [f"{count} {words}" for words, count in list(counts.items())[:SHOWN]]
    rest = sum(list(counts.values())[SHOWN:])
    return ", ".join([*shown, *([f"{rest} others"] if rest else [])])


def drawn(result: dict[str, Any]) -> str:
    """The curve of one search."""
    points = tuple((point["bits_per_weight"], point["predicted_kl"]) for point in result["points"])
    lines = [Series("predicted", points, "c0", "dots", "bits")]
    caption = "The least loss that the search predicts for each size. Down and to the left is better."
    caption += " These are predictions: locum eval measures."
    return figure(curves(lines, "bits per weight of the experts", "KL from the original, nats per token"), caption)


def frontier_section(results: Sequence[dict[str, Any]]) -> str:
    """The section of a report."""
    parts = []
    for result in results:
        whole = result["bytes"]
        how = plan_command(result, [result["statistics_file"], "--method", result["method"]])
        parts.append(f'<p class="dim">A plan of one of these sizes, from the same file: <code>{escape(how)}</code></p>')
        rows = [
            [
                (text, number) if number is not None else text
                for text, number in zip(cells(p, whole), numbers(p), strict=True)
            ]
            for p in result["points"]
        ]
        parts.append(f'<div class="pair">{drawn(result)}</div>{table(HEADS, rows)}')
    return section("frontier", "What every size is predicted to cost", *parts) if parts else ""


def numbers(point: dict[str, Any]) -> list[float | None]:
    """By what the columns are sorted; None for words."""
    size = point["bytes"]
    return [size, size, size, point["bits_per_weight"], point["predicted_kl"], None, None]


def make_page(result: dict[str, Any]) -> str:
    """One self-contained HTML page."""
    title = f"Locum frontier: {result['statistics_file']}"
    head = f'<section id="headline">\n<h1>{escape(title)}</h1>\n</section>'
    said = json.dumps(result["provenance"], indent=1, default=str)
    origin = f"<details><summary>Origin</summary><pre>{escape(said)}</pre></details>"
    return page(
        title, "\n".join([head, frontier_section([result]), section("origins", "Where this comes from", origin)])
    )
