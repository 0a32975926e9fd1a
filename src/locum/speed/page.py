"""What `locum bench` found, as a page with charts and as rows of a table."""

from __future__ import annotations

import json
from typing import Any

from ..files import describe_size
from ..reports.charts import Bar, bars, escape
from ..reports.page import figure, page, section, table

HEADS = (
    "model",
    "implementation",
    "prompts",
    "phase",
    "tokens/s",
    "quartiles",
    "first token",
    "times the original",
    "times the floor",
    "read/token",
    "Mops/token",
    "experts/layer",
    "peak memory",
)
FAR = 5  # times the fastest bar: floors further off would leave no room for the others
TITLES = {"prefill": "Reading the prompts", "decode": "Writing, token by token"}


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text, in the order of HEADS."""
    first, times, peak = row["first_token_seconds"], row["times_the_original"], row["peak_bytes"]
    return [
        row["model"],
        row["implementation"],
        str(row["batch"]),
        row["phase"],
        f"{row['tokens_per_second']:,.1f}",
        f"{row['low']:,.1f} to {row['high']:,.1f}",
        "" if first is None else f"{1000 * first:,.1f} ms",
        "" if times is None else f"{times:.2f}",
        f"{row['times_the_floor']:.2f}",
        describe_size(row["bytes_per_token"]),
        f"{row['operations_per_token'] / 1e6:,.2f}",
        f"{row['experts_per_layer']:.1f}",
        "" if peak is None else describe_size(peak),
    ]


def memory_line(name: str, model: dict[str, Any]) -> str:
    """Where a model's memory goes, in one sentence."""
    resident = model["resident_bytes"]
    grown = "not known on this system" if resident is None else describe_size(resident)
    return (
        f"{name} ({model['name']}, {model['dtype']}): weights {describe_size(model['weights_bytes'])}, its process grew by "
        f"{grown} with them; reads {model['bytes_per_second'] / 1e9:.1f} GB/s and computes "
        f"{model['operations_per_second'] / 1e9:,.0f} Gop/s at best"
    )


def engine_lines(name: str, model: dict[str, Any]) -> list[str]:
    """In which other engines a model was timed."""
    return [
        f"{name} in {engine} {said['version']}: {describe_size(said['bytes'])}"
        for engine, said in model["engines"].items()
    ]


def make_page(result: dict[str, Any]) -> str:
    """One self-contained HTML page."""
    settings, models = result["settings"], result["models"]
    title = f"Locum bench: {models['model']['name']}"
    measured = (
        f"Prompts of {settings['prompt']} tokens, {settings['new_tokens']} new tokens, {settings['rounds']} interleaved "
        f"rounds on {settings['device']}; medians, whiskers from quartile to quartile."
    )
    head = f'<section id="headline">\n<h1>{escape(title)}</h1>\n<p class="dim">{escape(measured)}</p>\n</section>'
    charts = "".join(_chart(result, phase) for phase in TITLES)
    notes = [line for name, model in models.items() for line in (memory_line(name, model), *engine_lines(name, model))]
    notes += [f"not run: {x['model']}, {x['implementation']}, {x['batch']}: {x['why']}" for x in result["not_run"]]
    said = "".join(f"<p>{escape(note)}</p>" for note in notes)
    rows = [cells(row) for row in result["rows"]]
    origin = (
        f"<details><summary>Origin</summary><pre>{escape(json.dumps(result['provenance'], indent=1))}</pre></details>"
    )
    parts = [head, section("speed", "Speed", f'<div class="pair">{charts}</div>'), section("memory", "Memory", said)]
    return page(title, "\n".join([*parts, section("rows", "All of it", table(HEADS, rows), origin)]))


def _chart(result: dict[str, Any], phase: str) -> str:
    groups, far = [], False
    for size in result["settings"]["batch_sizes"]:
        rows = [r for r in result["rows"] if (r["batch"], r["phase"]) == (size, phase)]
        shown = [_bar(row) for row in rows]
        fastest = max(bar.value for bar in shown)
        for row in {row["model"]: row for row in rows}.values():
            best = row["tokens"] / row["floor_seconds"]
            if best > FAR * fastest:
                far = True
                continue
            colour = "u3" if row["model"] == "model" else "u4"
            shown.append(Bar(f"{row['model']}, floor", best, best, best, colour, "no spread"))
        groups.append((f"{size} prompt{'s' * (size > 1)}", shown))
    floors = f"Floors more than {FAR} times as fast are not drawn." if far else "The floor is what the machine allows."
    return figure(bars(groups, "tokens per second"), f"{TITLES[phase]} ({phase}). {floors}")


def _bar(row: dict[str, Any]) -> Bar:
    label, colour = f"{row['model']}, {row['implementation']}", "c0" if row["model"] == "model" else "co"
    return Bar(label, row["tokens_per_second"], row["low"], row["high"], colour, "quartiles")
