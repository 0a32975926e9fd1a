"""Charts as inline SVG text: axes, points with intervals, bars with intervals, curves. No plotting library.

Every chart is VIEW_WIDTH units wide and scales to its column, so that its 12-unit text stays readable on a phone.
Colours are CSS classes of the page (report_page.py), which lets one picture serve light, dark and print. Every text
that comes from a user passes `escape`. The maps of experts are in expert_maps.py.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

VIEW_WIDTH = 420
NUM_COLOURS = 8  # classes c0 to c7 of the page
CHARACTER = 6.9  # width of one character of 12-unit text, on the safe side
BOLD = 7.5
MARKERS = ("circle", "square", "diamond", "triangle")


def escape(text: object) -> str:
    return html.escape(str(text), quote=True)


def svg(body: Iterable[str], height: float, label: str, width: float = VIEW_WIDTH) -> str:
    size = f"{width:.0f} {height:.0f}"
    return f'<svg viewBox="0 0 {size}" role="img" aria-label="{escape(label)}">\n' + "\n".join(body) + "\n</svg>"


def text(x: float, y: float, words: object, style: str = "", anchor: str = "start") -> str:
    where = "" if anchor == "start" else f' text-anchor="{anchor}"'
    kind = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{where}{kind}>{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def shorten(words: str, limit: int) -> str:
    """Long names keep both ends: what tells two variants apart is often at the end."""
    if len(words) <= limit:
        return words
    tail = (limit - 1) // 3
    return words[: limit - 1 - tail] + "\N{HORIZONTAL ELLIPSIS}" + words[len(words) - tail :]


# --- scales -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """A linear map from [low, high] to [start, end], with round ticks."""

    low: float
    high: float
    start: float
    end: float
    about: int = 5  # ticks wished for

    def __call__(self, value: float) -> float:
        part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        step = nice_step((self.high - self.low) / self.about)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        decimals += round(step * 10**decimals, 6) % 1 != 0  # a step of 0.25 needs one more than 0.2
        return [(n * step, plain(n * step, decimals)) for n in range(first, last + 1)]


def nice_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * (1 - 1e-9))


def plain(value: float, decimals: int) -> str:
    value = 0.0 if abs(value) < 0.5 * 10**-decimals else value  # never "-0"
    return f"{value:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def four_digits(value: float) -> str:
    """Four significant digits, zeros included, so that numbers side by side are equally long."""
    return f"{value:#.4g}".rstrip(".")


def spread(values: Iterable[float], margin: float = 0.08, zero: bool = False) -> tuple[float, float]:
    """The range of some values with a margin; with `zero` it contains zero and has no margin beyond it."""
    values = list(values)
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    width = (high - low) or abs(high) * 0.2 or 1.0
    return (low if zero and low == 0 else low - margin * width), (high if zero and high == 0 else high + margin * width)


# --- points with intervals ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One model in the plane; `seeds` are the single values when there are several."""

    label: str
    x: float
    y: float
    low: float
    high: float
    colour: str  # a class of the page
    marker: str = "circle"
    seeds: tuple[float, ...] = ()


def marker(kind: str, x: float, y: float, style: str, size: float = 5) -> str:
    """A mark of equal visual weight in one of four forms."""
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" class="{style}"/>'
    form = {
        "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
        "triangle": ((0, -1.25), (1.15, 0.85), (-1.15, 0.85)),
    }[kind]
    corners = " ".join(f"{x + dx * size:.1f},{y + dy * size:.1f}" for dx, dy in form)
    return f'<polygon points="{corners}" class="{style}"/>'


def scatter(points: Sequence[Point], x_label: str, y_label: str, arrows: Sequence[tuple[int, int]] = ()) -> str:
    """Points with vertical interval whiskers and a label each; `arrows` join pairs of points, first to second."""
    height, left, right, top, bottom = 370, 52, VIEW_WIDTH - 12, 30, 320
    x = Scale(*spread((p.x for p in points), 0.14), left, right)
    bounds = [v for p in points for v in (p.low, p.high, p.y, *p.seeds)]
    y = Scale(*spread(bounds, 0.1), bottom, top)
    body = [*y_axis(y, y_label, left, right), *x_axis(x, x_label, bottom)]
    spots = _apart([(x(p.x), y(p.y), y(p.high), y(p.low)) for p in points])
    for one, two in arrows:
        body.append(line(*spots[one][:2], *spots[two][:2], f"arrow {points[two].colour}"))
    for point, (at, middle, high, low) in zip(points, spots, strict=True):
        body += _point(point, at, middle, low, high, [y(v) for v in point.seeds])
    body += _labels(points, spots, (left + 2, top, right, bottom - 2))
    return svg(body, height, f"{y_label} against {x_label} of {len(points)} models")


def _apart(spots: Sequence[tuple[float, float, float, float]]) -> list[tuple[float, float, float, float]]:
    """Models of one size side by side where their whiskers would cover each other."""
    placed: list[tuple[float, float, float, float]] = []
    for x, y, high, low in spots:
        at = x
        while any(abs(at - px) < 8 and high < plow + 8 and low > phigh - 8 for px, _, phigh, plow in placed):
            at += 9
        placed.append((at, y, high, low))
    return placed


def y_axis(y: Scale, label: str, left: float, right: float) -> list[str]:
    """Grid lines, ticks and the label, which stands above the axis, where it can be read without turning."""
    body = [text(4, y.end - 16, label, "axis")]
    for value, words in y.ticks:
        body += [line(left, y(value), right, y(value), "grid"), text(left - 6, y(value) + 4, words, "tick", "end")]
    return body


def x_axis(x: Scale, label: str, bottom: float) -> list[str]:
    body = [line(x.start, bottom, x.end, bottom, "rule")]
    for value, words in x.ticks:
        body += [line(x(value), bottom, x(value), bottom + 4, "rule")]
        body += [text(x(value), bottom + 18, words, "tick", "middle")]
    return [*body, text((x.start + x.end) / 2, bottom + 38, label, "axis", "middle")]


def _point(point: Point, x: float, y: float, low: float, high: float, seeds: list[float]) -> list[str]:
    seen = f"{point.label}: {point.y:.4g}, 95% interval {point.low:.4g} to {point.high:.4g}"
    parts = [f"<g><title>{escape(seen + (f', mean of {len(seeds)} seeds' if seeds else ''))}</title>"]
    if abs(low - high) > 0.5:
        parts += [line(x, low, x, high, f"whisker {point.colour}")]
        parts += [line(x - 4, v, x + 4, v, f"whisker {point.colour}") for v in (low, high)]
    parts += [f'<circle cx="{x + 7:.1f}" cy="{v:.1f}" r="2" class="seed {point.colour}"/>' for v in seeds]
    return [*parts, marker(point.marker, x, y, f"mark {point.colour}"), "</g>"]


def _labels(points: Sequence[Point], spots: list[tuple], area: tuple[float, float, float, float]) -> list[str]:
    """A place for every label: the first of a ring of candidates that covers the least of what is already there."""
    taken = [((x - 8, y - 8, x + 8, y + 8), 5) for x, y, _, _ in spots]
    taken += [
        ((x - 6, high, x + (11 if p.seeds else 6), low), 3) for p, (x, _, high, low) in zip(points, spots, strict=True)
    ]
    parts = []
    for point, (x, y, _, _) in sorted(zip(points, spots, strict=True), key=lambda pair: pair[1][1]):
        words = shorten(point.label, 30)
        width, best, cost = len(words) * BOLD, None, math.inf
        for rank, (dx, dy) in enumerate(_RING):
            left = x + dx if dx > 0 else x + dx - width if dx < 0 else x - width / 2
            box = (left, y + dy - 7, left + width, y + dy + 7)
            price = 8 * _outside(box, area) + sum(_overlap(box, other) * weight for other, weight in taken) + rank * 0.5
            if price < cost:
                best, cost, offset = box, price, (dx, dy)
        taken.append((best, 20))  # a label over a whisker can be read, one over another cannot
        if abs(offset[1]) > 22 or abs(offset[0]) > 22:
            edge = best[0] - 2 if offset[0] > 0 else best[2] + 2 if offset[0] < 0 else (best[0] + best[2]) / 2
            parts.append(line(x, y, edge, (best[1] + best[3]) / 2, f"leader {point.colour}"))
        side = 1 - (offset[0] > 0) + (offset[0] < 0)  # text keeps to its mark even if its width is misjudged
        at = (best[0], (best[0] + best[2]) / 2, best[2])[side]
        parts.append(text(at, best[3] - 3, words, f"name {point.colour}", ("start", "middle", "end")[side]))
    return parts


_RING = [(11, 0), (-11, 0), (11, -13), (11, 13), (-11, -13), (-11, 13), (0, -18), (0, 18)]
_RING += [(dx, dy) for r in (28, 44, 60, 80, 105) for dx in (24, -24, 0, 60, -60) for dy in (-r, r)]
_RING += [(dx, dy) for dx in (40, -40, 90, -90, 140, -140) for dy in (0, -15, 15)]


def _overlap(a: tuple, b: tuple) -> float:
    wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return wide * tall if wide > 0 and tall > 0 else 0.0


def _outside(box: tuple, area: tuple) -> float:
    over = max(0.0, area[0] - box[0]) + max(0.0, box[2] - area[2])
    return 14 * over + (box[2] - box[0]) * (max(0.0, area[1] - box[1]) + max(0.0, box[3] - area[3]))


# --- bars with intervals --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    low: float
    high: float
    colour: str
    interval: str = "95% interval"  # what low and high are


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], x_label: str, reference: str | None = None) -> str:
    """Horizontal bars in named groups; every bar carries its name and value, so that no legend is needed.

    `reference` names the bar whose value runs as a dashed line through its group.
    """
    shown = [bar for _, group in groups for bar in group]
    left = min(24, max(len(bar.label) for bar in shown)) * CHARACTER + 14
    bounds = [v for bar in shown for v in (bar.value, bar.low, bar.high)]
    scale = Scale(*spread(bounds, 0.03, zero=True), left, VIEW_WIDTH - 66, 4)
    decimals = _decimals(bounds)
    body, y = [], 6.0
    for name, group in groups:
        body.append(text(4, y + 14, name, "group"))
        y += 20
        for bar in group:
            body += _bar(bar, y, scale, decimals)
            y += 18
        at = [scale(bar.value) for bar in group if bar.label == reference]
        body += [line(x, y - 18 * len(group) - 1, x, y, "reference") for x in at]
        y += 8
    zero = line(scale(0), 8, scale(0), y - 4, "rule")
    for value, words in scale.ticks:
        body.append(text(scale(value), y + 12, words, "tick", "middle"))
    body.append(text((left + VIEW_WIDTH - 66) / 2, y + 32, x_label, "axis", "middle"))
    grid = [line(scale(value), 8, scale(value), y - 2, "grid") for value, _ in scale.ticks]
    return svg([*grid, *body, zero], y + 42, f"{x_label} of {len(shown)} bars in {len(groups)} groups")


def _decimals(values: Iterable[float]) -> int:
    """Decimals that tell bars apart: three near one, fewer for large values, more for tiny ones."""
    power = math.floor(math.log10(max(abs(v) for v in values) or 1.0))
    return min(6, max(0, 3 - power if power >= 0 else 2 - power))


def _bar(bar: Bar, y: float, scale: Scale, decimals: int) -> list[str]:
    start, end = sorted((scale(0), scale(bar.value)))
    low, high, middle = scale(bar.low), scale(bar.high), y + 8
    value = plain(bar.value, decimals)
    seen = f"{bar.label}: {value}, {bar.interval} {plain(bar.low, decimals)} to {plain(bar.high, decimals)}"
    shape = (
        f'<rect x="{start:.1f}" y="{y + 1:.1f}" width="{max(end - start, 1):.1f}" height="14" class="{bar.colour}"/>'
    )
    parts = [f"<g><title>{escape(seen)}</title>", text(4, y + 12, shorten(bar.label, 24)), shape]
    if high - low > 0.5:
        parts.append(line(low, middle, high, middle, "interval"))
        parts += [line(v, middle - 3, v, middle + 3, "interval") for v in (low, high)]
    return [*parts, text(VIEW_WIDTH - 4, y + 12, value, "tick", "end"), "</g>"]


# --- curves ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """One curve. Kinds: "raw" is faint, "main" is thick, "dots" marks every point."""

    label: str
    points: tuple[tuple[float, float], ...]
    colour: str
    kind: str = "main"
    of: str = "step"  # what a point is at


def curves(series: Sequence[Series], x_label: str, y_label: str, below: Series | None = None) -> str:
    """Curves with their names at the end; `below` is drawn in a strip of its own under the same x axis."""
    left, top, bottom = 52, 30, 240
    named = [s.label for s in (*series, *([below] if below else [])) if s.label]
    right = VIEW_WIDTH - 14 - max(map(len, named), default=0) * BOLD
    every = [p[0] for s in series for p in s.points]
    x = Scale(min(every), max(every) if max(every) > min(every) else min(every) + 1, left, right)
    range_of = [p[1] for s in series if s.kind != "raw" for p in s.points]
    y = Scale(*spread(range_of, 0.12), bottom, top)
    body, ends = y_axis(y, y_label, left, right), []
    for one in series:
        body.append(_curve(one, x, y, top))
        if one.label:
            ends.append((y(one.points[-1][1]), one))
    body += _end_labels(ends, right + 8, top, bottom)
    floor = bottom
    if below:
        floor = bottom + 62
        body += [line(left, bottom, right, bottom, "rule"), *_strip(below, x, bottom + 16, floor)]
    return svg([*body, *x_axis(x, x_label, floor)], floor + 48, f"{y_label} against {x_label}")


def _curve(one: Series, x: Scale, y: Scale, top: float) -> str:
    # spikes of a raw loss are cut at the frame: they would squeeze everything else
    places = [(x(a), min(max(y(b), top), y.start)) for a, b in one.points]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    drawn = f'<polyline points="{path}" class="curve {one.kind} {one.colour}"/>'
    if one.kind == "dots":
        drawn += "".join(
            f'<g><title>{one.of} {a:g}: {b:.4g}</title><circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" class="mark {one.colour}"/></g>'
            for (px, py), (a, b) in zip(places, one.points, strict=True)
        )
    return drawn


def _end_labels(ends: list[tuple[float, Series]], x: float, top: float, bottom: float) -> list[str]:
    """Names at the ends of curves, pushed apart until each has a line of its own."""
    ends = sorted(ends, key=lambda end: end[0])
    places = [min(max(y, top), bottom) for y, _ in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + 15)
    lift = max(0.0, places[-1] - bottom) if places else 0.0
    return [text(x, y - lift + 4, s.label, f"name {s.colour}") for y, (_, s) in zip(places, ends, strict=True)]


def _strip(one: Series, x: Scale, top: float, bottom: float) -> list[str]:
    values = [v for _, v in one.points]
    low, high = (0.0, 1.0) if min(values) >= 0 and max(values) <= 1 else spread(values, 0)
    y = Scale(low, high, bottom - 6, top)
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in one.points)
    parts = [line(x.start, y(v), x.end, y(v), "grid") for v in (low, high)]
    parts += [text(x.start - 6, y(v) + 4, f"{v:.3g}", "tick", "end") for v in (low, high)]
    parts.append(f'<polyline points="{path}" class="curve thin {one.colour}"/>')
    return [*parts, text(x.end + 8, y(values[-1]) + 4, one.label, f"name {one.colour}")]
