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
