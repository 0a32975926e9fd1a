"""The results of gpu.py as Markdown."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def markdown(lines: list[list[str]]) -> str:
    head, *rest = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rest])


def layer_table(rows: list[Row]) -> str:
    """A row for each plan and size, a column for each contender."""
    shown = [_cells(row) for row in rows]
    names = list(dict.fromkeys(name for cells in shown for name in cells))
    lines = [["plan", "tokens", *names]]
    for row, cells in zip(rows, shown, strict=True):
        plan = ", ".join([row["plan"], *([row["dtype"]] if "dtype" in row else [])])
        lines.append([plan, str(row["tokens"]), *(cells.get(name, "") for name in names)])
    return markdown(lines)


def bits_table(rows: list[Row]) -> str:
    """A row for each plan, number format and size; beside bfloat16, the times as fast and the share of its bytes."""
    lines = [
        ["plan", "format", "tokens", "MiB", "of bfloat16", "floor", "triton", "loop", "bfloat16", "as fast", "error"]
    ]
    for row in rows:
        times, mib = row["contenders"], row["weights_mib"]
        cells = [_time(times[name]) if name in times else "" for name in ("triton", "loop", "bfloat16")]
        size, share = f"{mib['packed']:.0f}", f"{mib['packed'] / mib['bfloat16']:.2f}"
        fast = f"{row['as_fast']:.2f}" if row["as_fast"] is not None else ""
        error = ", ".join(f"{name} {off:.2g}" for name, off in row["error"].items())
        about = [row["plan"], row["format"], str(row["tokens"]), size, share, f"{row['floor_ms']:.3g}"]
        lines.append([*about, *cells, fast, error])
    return markdown(lines)


def tiles_table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["tiles_ms"]))
    lines = [["format", "tokens", "floor", *names]]
    for row in rows:
        about = [row["format"], str(row["tokens"]), f"{row['floor_ms']:.3g}"]
        lines.append([*about, *(f"{row['tiles_ms'][n]:.3g}" if n in row["tiles_ms"] else "" for n in names)])
    return markdown(lines)


def _cells(row: Row) -> dict[str, str]:
    if "contenders" in row:
        return {name: _time(one) for name, one in row["contenders"].items()} | {"floor": f"{row['floor_ms']:.3g}"}
    if "error" in row:
        return {name: f"{size:.2g}" for name, size in row["error"].items()}
    weights = {f"weights, {name}": f"{size:.0f}" for name, size in row["weights_mib"].items()}
    return {name: f"{size:.0f}" for name, size in row["beyond_mib"].items()} | weights


def _time(one: dict[str, float]) -> str:
    """Milliseconds, those of a graph, how much of the floor was reached."""
    graph = f" ({one['graph_ms']:.3g})" if "graph_ms" in one else ""
    return f"{one['ms']:.3g}{graph}" + (f" {one['reached']:.0%}" if "reached" in one else "")


def model_table(rows: list[Row]) -> str:
    lines = [["model", "what", "found", "within its limit"]]
    for row in rows:
        found = {key: value for key, value in row.items() if key not in ("model", "what", "wrong")}
        said = [
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in found.items()
            if not isinstance(value, dict)
        ]
        lines.append([row["model"], row["what"], ", ".join(said), "no" if row.get("wrong") else "yes"])
    return markdown(lines)
