"""Two maps of all experts as inline SVG: how much each domain uses them, and what a plan made of them.

Colours are classes of the page (report_page.py). Cells of one colour are drawn as one path, which keeps the page of a
model with thousands of experts small; details are in the tooltips of whole columns.

Letters: E experts, Z domains.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..experts.parts.shared_base import SharedBase
from ..plans.plan import LayerPlan, Plan, Slot
from .charts import CHARACTER, VIEW_WIDTH, escape, line, shorten, svg, text

# share of the domain's selections relative to an even split (1/E); the classes u0 to u8 of the page
USE_STEPS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
USE_NAMES = ("never", "< 1/8", "< 1/4", "< 1/2", "< 1", "1 to 2", "2 to 4", "4 to 8", "> 8")
ROW = 64  # experts of a layer in one row of the fate grid
CELL = 15


def short_layers(names: Sequence[str]) -> dict[str, str]:
    """ "model.layers.3.mlp.experts" is "layer 3", unless that would name two layers the same."""
    found = {name: re.search(r"(?:layers?|blocks?|h)\.(\d+)(?:\.|$)", name) for name in names}
    short = {name: f"layer {match[1]}" if match else name for name, match in found.items()}
    return short if len(set(short.values())) == len(short) else {name: name for name in names}


# --- use ------------------------------------------------------------------------------------------------------------


def use_level(share: float, experts: int) -> int:
    if share <= 0:
        return 0
    return 1 + sum(share * experts >= step for step in USE_STEPS)


def use_block(
    layer: str, domains: Sequence[str], count_ZE: Sequence[Sequence[float]], gate_ZE: Sequence[Sequence[float]] | None
) -> str:
    """One layer: a row per domain, a column per expert, the most used first; colour is the share of selections."""
    experts = len(count_ZE[0])
    share_ZE = [[n / (sum(row) or 1) for n in row] for row in count_ZE]
    total_E = [sum(row[e] for row in count_ZE) for e in range(experts)]
    order = sorted(range(experts), key=lambda e: (-total_E[e], e))
    left = min(18, max(map(len, domains))) * CHARACTER + 12
    wide, tall, top = (VIEW_WIDTH - left) / experts, 13, 20
    never = sum(not n for n in total_E)
    busiest = f"busiest: expert {order[0]}, {total_E[order[0]] / (sum(total_E) or 1):.1%}"
    body = [text(0, 13, shorten(layer, 34), "group")]
    body.append(text(VIEW_WIDTH, 13, busiest + (f"; {never} never used" if never else ""), "tick", "end"))
    paths: dict[int, list[str]] = {}
    for c, domain in enumerate(domains):
        body.append(text(left - 6, top + tall * c + 10, shorten(domain, 18), "tick", "end"))
        levels = [use_level(share_ZE[c][e], experts) for e in order]
        for start, end in _runs(levels):
            box = f"M{left + start * wide:.1f} {top + tall * c}h{(end - start) * wide:.1f}v{tall - 1}H{left + start * wide:.1f}z"
            paths.setdefault(levels[start], []).append(box)
    body += [f'<path class="u{level}" d="{"".join(boxes)}"/>' for level, boxes in sorted(paths.items())]
    for column, e in enumerate(order):
        told = [f"expert {e}"] + [_told(domain, c, e, share_ZE, gate_ZE) for c, domain in enumerate(domains)]
        where = f'x="{left + column * wide:.1f}" y="{top}" width="{wide:.1f}" height="{tall * len(domains)}"'
        body.append(f'<rect {where} class="hit"><title>{escape(chr(10).join(told))}</title></rect>')
    return svg(
        body, top + tall * len(domains) + 4, f"use of the {experts} experts of {layer} by {len(domains)} domains"
    )


def _runs(levels: Sequence[int]) -> list[tuple[int, int]]:
    cuts = [0, *(i for i in range(1, len(levels)) if levels[i] != levels[i - 1]), len(levels)]
    return list(itertools.pairwise(cuts))


def _told(domain: str, c: int, e: int, share_ZE: Sequence[Sequence[float]], gate_ZE: Sequence | None) -> str:
    gate = "" if gate_ZE is None else f" (of gate weight {gate_ZE[c][e] / (sum(gate_ZE[c]) or 1):.1%})"
    return f"{domain}: {share_ZE[c][e]:.1%} of selections{gate}"


def use_legend() -> str:
    keys = "".join(f'<span><i class="key u{n}"></i>{escape(name)}</span>' for n, name in enumerate(USE_NAMES))
    return f'<p class="legend">Share of selections against an even split: {keys}</p>'


# --- fates ----------------------------------------------------------------------------------------------------------


def mark_of(slot: Slot) -> str:
    """The mark of a fate: none for a kept expert, a letter for each shared base, so that colour is not needed."""
    if not slot.survives:
        return "\N{MULTIPLICATION SIGN}"
    return slot.parts[0].mark() if slot.parts else "0"


def colour_of(slot: Slot) -> str:
    if not slot.survives:
        return "fd"
    return slot.parts[0].colour() if slot.parts else "fn"


def fate_name(slot: Slot) -> str:
    """A fate without the numbers that differ between experts, for the legend."""
    if not slot.survives:
        return "dropped"
    return " + ".join(part.legend for part in slot.parts) or "gives nothing"


def fate_grid(plan: Plan) -> str:
    """A row per layer, a cell per expert. Grouped by fate; a button of the page puts them in their own order."""
    names = short_layers([layer.layer for layer in plan.layers])
    left = min(20, max(len(name) for name in names.values())) * CHARACTER // 1 + 10
    columns = min(ROW, max(len(layer.slots) for layer in plan.layers))
    body, y = [], 4.0
    for layer in plan.layers:
        rows = math.ceil(len(layer.slots) / ROW)
        body.append(text(left - 8, y + 11, shorten(names[layer.layer], 20), "tick", "end"))
        body += _cells(layer, _reasons(plan, layer), left, y)
        y += rows * CELL + (6 if rows > 1 else 1)
    for column in range(0, columns + 1, 8):
        body.append(line(left + column * CELL - 0.5, y, left + column * CELL - 0.5, y + 4, "rule"))
        body.append(text(left + column * CELL - 0.5, y + 17, column, "tick", "middle"))
    what = "experts of a layer" + (f", {ROW} to a line" if max(len(p.slots) for p in plan.layers) > ROW else "")
    body.append(text(left, y + 34, what, "axis"))
    width = left + columns * CELL + 14
    drawn = svg(
        body, y + 42, f"what the plan does to {sum(len(p.slots) for p in plan.layers)} experts", max(width, 170)
    )
    return drawn.replace("<svg ", f'<svg class="natural" style="width:{max(width, 170):.0f}px" ', 1)


def _order(slot: Slot) -> tuple:
    """Kept experts first, then stand-ins by what they are made of, then those that give nothing, then the dropped."""
    fate = 0 if slot.is_kept else 3 if not slot.survives else 1 if slot.parts else 2
    return fate, tuple((part.name, part.order()) for part in slot.parts)


def said_of(plan: Plan) -> Mapping[str, Any]:
    """What the plan's method says of its choice; plans may be anybody's."""
    said = plan.provenance.get(plan.method)
    return said if isinstance(said, dict) else {}


def _reasons(plan: Plan, layer: LayerPlan) -> list[str]:
    """A line of each expert, with what it was not; none where the plan does not say."""
    experts = said_of(plan).get("experts")
    lines = experts.get(layer.layer) if isinstance(experts, dict) else None
    known = isinstance(lines, list) and len(lines) == len(layer.slots) and all(isinstance(x, str) for x in lines)
    return ["\n" + line.replace("; ", "\n") for line in lines] if known else [""] * len(layer.slots)


def _cells(layer: LayerPlan, reasons: Sequence[str], left: float, y: float) -> list[str]:
    grouped = sorted(range(len(layer.slots)), key=lambda e: (_order(layer.slots[e]), e))
    parts = []
    for place, e in enumerate(grouped):
        slot = layer.slots[e]
        here, own = _place(place, left, y), _place(e, left, y)
        mark = mark_of(slot)
        sign = f'<text x="7" y="11">{mark}</text>' if mark else ""
        told = escape(f"expert {e}: {_detail(slot, layer)}{reasons[e]}")
        cell = f'<rect width="14" height="14" class="{colour_of(slot)}"/>'
        parts.append(
            f'<g class="cell" transform="translate({here})" data-own="{own}"><title>{told}</title>{cell}{sign}</g>'
        )
    return parts


def _place(index: int, left: float, y: float) -> str:
    return f"{left + index % ROW * CELL:.0f},{y + index // ROW * CELL:.0f}"


def _detail(slot: Slot, layer: LayerPlan) -> str:
    told = str(slot)
    for part in slot.parts:
        if isinstance(part, SharedBase):
            base = layer.bases[part.base]
            top = sorted(zip(base.experts, base.weights, strict=True), key=lambda pair: (-pair[1], pair[0]))
            mixed = ", ".join(f"{e} ({w:.2f})" for e, w in top[:12])
            told += f"\nbase {part.mark()}: mean of {len(top)} experts: {mixed}"
            told += "\N{HORIZONTAL ELLIPSIS}" if len(top) > 12 else ""
    return told


def fate_legend(plan: Plan) -> str:
    """Every fate that occurs, with its number of experts and what its mark is."""
    slots = [slot for layer in plan.layers for slot in layer.slots]
    counts: Mapping[str, int] = Counter(fate_name(slot) for slot in slots)
    first = {fate_name(slot): slot for slot in sorted(slots, key=_order, reverse=True)}
    keys = []
    for name, slot in sorted(first.items(), key=lambda item: _order(item[1])):
        based = any(isinstance(part, SharedBase) for part in slot.parts)
        sign = "A" if based else mark_of(slot)
        more = ", one letter and colour per base of its layer" if based else ""
        style = "b0" if based else colour_of(slot)
        keys.append(f'<span><i class="key {style}">{sign}</i>{escape(name)}: {counts[name]}{more}</span>')
    return f'<p class="legend">{"".join(keys)}</p>'
