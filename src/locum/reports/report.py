"""One self-contained page about compressed models, made from results files: pictures first, then tables, then origins.

    results.jsonl (+ the plans, statistics and recovery logs that its rows name) --make_report--> report.html

A section without input is left out. Charts are in charts.py and expert_maps.py, the page's frame in report_page.py, the
numbers that the sections share in report_models.py.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..files import describe_size, write_text
from ..measure.rows import Row
from ..places import bare
from ..plans.plan import Plan
from ..stats.sums import Statistics
from . import expert_maps
from .charts import Bar, Point, Series, bars, curves, escape, four_digits, plain, scatter
from .frontier import frontier_section
from .inputs import Inputs, RecoveryLog, read_inputs
from .models import ALL, QUALITY, Comparison, Model, compare
from .page import figure, page, section, table

SIZE_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))
COUNT_UNITS = (
    ("billion parameters", 1e9),
    ("million parameters", 1e6),
    ("thousand parameters", 1e3),
    ("parameters", 1),
)
MOST_BARS = 16  # models whose domains are drawn
LONG_TABLE = 60  # rows of results from which the table is folded
CURVE_POINTS = 500
UNSAID = ("shape", "statistics_file", "plan_file", "recovery_log", "checkpoint", "original_shape")


def make_report(
    results: Sequence[Path | str],
    out: Path | None = None,
    *,
    plans: Sequence[Path | str] = (),
    statistics: Sequence[Path | str] = (),
    logs: Sequence[Path | str] = (),
    frontiers: Sequence[dict[str, Any]] = (),
    title: str = "Locum report",
) -> str:
    """The page as text; with `out` it is also written there, whole or not at all.

    `plans`, `statistics` and `logs` add to what the rows name; a given file that cannot be read is an error, a named one
    that is gone is listed at the end of the page. `frontiers` are what `locum frontier` found. Statistics alone make a page of who uses which experts. Raises DataError
    if there are neither rows nor statistics, or a line is not a row.
    """
    found = read_inputs(results, plans, statistics, logs)
    if found.rows:
        compared = compare(found.rows)
        measured = [_headline(title, compared), _size_section(compared), _domain_section(compared)]
    else:
        measured = [f'<section id="headline">\n<h1>{escape(title)}</h1>\n</section>']
    parts = [
        *measured,
        frontier_section(frontiers),
        _use_section(found),
        _plan_section(found),
        _recovery_section(found),
        _results_section(found.rows) if found.rows else "",
        _origin_section(found),
    ]
    made = page(title, "\n".join(part for part in parts if part))
    if out is not None:
        write_text(Path(out), made)
    return made


# --- headline -------------------------------------------------------------------------------------------------------


def _headline(title: str, compared: Comparison) -> str:
    best, original = compared.best, compared.original
    shown = [
        _size_figure(best, original),
        _quality_figure(best, compared),
        _agreement_figure(best),
        _experts_figure(best, original),
    ]
    boxes = "".join(
        f"<div><b>{escape(big)}</b><span>{escape(small)}</span></div>" for big, small in filter(None, shown)
    )
    heading = f'<h1>{escape(title)}</h1>\n<p class="dim">{escape(_measured(compared))}</p>'
    figures = f'\n<div class="figures">{boxes}</div>' if boxes else ""
    warning = f'\n<p class="dim">{escape(compared.warning)}</p>' if compared.warning else ""
    return f'<section id="headline">\n{heading}{figures}\n<p class="lead">{escape(compared.sentence)}</p>{warning}\n</section>'


def _measured(compared: Comparison) -> str:
    n = max((row.n for m in compared.models for row in m.rows if row.domain == ALL), default=0)
    models = f"{len(compared.models)} model" + "s" * (len(compared.models) != 1)
    tokens = f", {n:,} predicted tokens" if n else ""
    return f"{models}, {len(compared.domains)} domain{'s' * (len(compared.domains) != 1)}{tokens}. Intervals are 95%."


def _size_figure(best: Model, original: Model | None) -> tuple[str, str] | None:
    for key, show in (("bytes", describe_size), ("parameters", _count)):
        after, before = best.number(key), original.number(key) if original else None
        if after and before and best is not original:
            return (
                _from_to(show(before), show(after)),
                f"size of the checkpoint, {after / before:.1%} of the original",
            )
        if after:
            return show(after), f"size of {best.name}"
    return None


def _from_to(before: str, after: str) -> str:
    """ "13.98 -> 7.32 GiB": the unit once if it is the same."""
    (old, _, unit), (_, _, now) = before.partition(" "), after.partition(" ")
    return f"{old if unit == now else before} \N{RIGHTWARDS ARROW} {after}"


def _count(parameters: float) -> str:
    name, unit = next((name, unit) for name, unit in COUNT_UNITS if parameters >= unit or unit == 1)
    return f"{parameters / unit:#.3g} {name}".replace(". ", " ")


def _quality_figure(best: Model, compared: Comparison) -> tuple[str, str] | None:
    if (now := best.estimate(compared.metric)) is None:
        return None
    before = compared.original and compared.original.estimate(compared.metric)
    name = QUALITY[compared.metric]
    if not before or best is compared.original:
        return four_digits(now.value), f"{name}, {now.interval}"
    return _signed(
        now.value - before.value
    ), f"{name}, {four_digits(before.value)} \N{RIGHTWARDS ARROW} {four_digits(now.value)}"


def _signed(value: float, decimals: int = 3) -> str:
    return ("+" if value >= 0 else "") + plain(value, decimals)


def _agreement_figure(best: Model) -> tuple[str, str] | None:
    if agreed := best.estimate("top1_agreement"):
        return f"{agreed.value:.1%}", f"same most likely token as the original, {agreed.as_percent}"
    if kl := best.estimate("kl"):
        return four_digits(kl.value), f"KL divergence from the original, nats per token, {kl.interval}"
    return None


def _experts_figure(best: Model, original: Model | None) -> tuple[str, str] | None:
    """What was saved most of: the parameters of routed experts, or those that a token uses."""
    kinds = {
        "expert_parameters": "of the routed experts' parameters",
        "active_parameters": "of the parameters that a token uses",
    }
    both = {key: (original and original.number(key), best.number(key)) for key in kinds}
    saved = {key: 1 - after / before for key, (before, after) in both.items() if before and after}
    if not saved or best is original or max(saved.values()) <= 0:
        return None
    key = max(saved, key=saved.__getitem__)
    return f"\N{MINUS SIGN}{saved[key]:.1%}", f"{kinds[key]}: {_from_to(*map(_count, both[key]))}"


# --- quality --------------------------------------------------------------------------------------------------------


def _size_section(compared: Comparison) -> str:
    key = "bytes" if all(m.number("bytes") for m in compared.models) else "parameters"
    shown = [m for m in compared.models if m.number(key) and m.estimate(compared.metric)]
    if not shown:
        return ""
    unit, factor = _unit(max(m.number(key) for m in shown), key)
    points = [_point(m, m.number(key) / factor, compared) for m in shown]
    steps = [(i, j) for i, a in enumerate(shown) for j, b in enumerate(shown) if a.recovers_to(b)]
    label = f"checkpoint size, {unit}" if key == "bytes" else unit
    drawn = scatter(points, label, f"{QUALITY[compared.metric]} (lower is better)", steps)
    seeds = any(point.seeds for point in points)
    caption = "Down and to the left is better; marks of nearly equal size are moved apart sideways. Whiskers are 95% intervals"
    caption += (
        "; with several seeds the mark is their mean, dots are the seeds, and the whisker spans all their intervals."
        if seeds
        else "."
    )
    caption += " A dotted line leads from a compressed model to its recovery." if steps else ""
    pair = f'<div class="pair">{figure(drawn, caption)}<div class="models">{_models_table(compared)}</div></div>'
    return section("size", "Quality against size", pair)


def _unit(top: float, key: str) -> tuple[str, float]:
    units = SIZE_UNITS if key == "bytes" else COUNT_UNITS
    return next((name, factor) for name, factor in units if top >= factor or factor == 1)


def _point(model: Model, x: float, compared: Comparison) -> Point:
    found = model.estimate(compared.metric)
    seeds = found.values if len(found.values) > 1 else ()
    return Point(model.name, x, found.value, found.low, found.high, model.colour, model.marker, seeds)


def _models_table(compared: Comparison) -> str:
    with_active = any(model.number("active_parameters") for model in compared.models)
    heads = ["model", "size", *["active"] * with_active, QUALITY[compared.metric], "change", "agreement"]
    before = compared.original and compared.original.estimate(compared.metric)
    rows, best = [], None
    for i, model in enumerate(compared.models):
        size, now = model.number("bytes") or model.number("parameters"), model.estimate(compared.metric)
        agreed = model.estimate("top1_agreement")
        words = describe_size(size) if model.number("bytes") else _count(size) if size else ""
        change = now.value - before.value if now and before and model is not compared.original else None
        active = model.number("active_parameters")
        rows.append(
            [
                model.name,
                (words, size),
                *[(_count(active) if active else "", active)] * with_active,
                (f"{now.value:.4f}" if now else "", now.value if now else None),
                ("" if change is None else _signed(change, 4), change),
                (f"{agreed.value:.1%}" if agreed else "", agreed.value if agreed else None),
            ]
        )
        best = i if model is compared.best and len(compared.models) > 2 else best
    return table(heads, rows, best)


def _domain_section(compared: Comparison) -> str:
    """Bars of the best models, where there are too many to look at; the table has all."""
    figures, words = [], ""
    if len(compared.models) > MOST_BARS:
        known = [model for model in compared.models if model.estimate(compared.metric)]
        best = sorted(known, key=lambda model: model.estimate(compared.metric).value)[:MOST_BARS]
        shown = tuple(m for m in compared.models if m in best or m is compared.original)
        words = (
            f'<p class="dim">The best {len(best)} of {len(compared.models)} models; "All results" has the others.</p>'
        )
        compared = replace(compared, models=shown)
    if len(compared.domains) and any(compared.domains_of(compared.metric)):
        drawn = _domain_bars(compared, compared.metric, QUALITY[compared.metric])
        reference = ". The dashed line is the original" if compared.original else ""
        figures.append(figure(drawn, f"Lower is better{reference}. Whiskers are 95% intervals."))
    if any(compared.domains_of("loss_delta")):
        drawn = _domain_bars(compared, "loss_delta", "loss above the original, nats per token")
        figures.append(
            figure(
                drawn,
                "Model and original are compared on the same tokens, so the whiskers are those of the difference.",
            )
        )
    pair = f'<div class="pair">{"".join(figures)}</div>'
    return section("domains", "Quality by domain", words + pair) if figures else ""


def _domain_bars(compared: Comparison, metric: str, label: str) -> str:
    groups = []
    for domain in compared.domains_of(metric):
        group = []
        for model in compared.models:
            if found := model.estimate(metric, domain):
                group.append(Bar(model.name, found.value, found.low, found.high, model.colour))
        groups.append((domain, group))
    reference = compared.original.name if compared.original and metric != "loss_delta" else None
    return bars(groups, label, reference)


# --- experts --------------------------------------------------------------------------------------------------------


def _use_section(found: Inputs) -> str:
    parts = []
    for file, statistics in found.statistics.items():
        blocks = _use_blocks(statistics)
        if blocks:
            name = f"<h3>{escape(Path(file).name)}</h3>" if len(found.statistics) > 1 else ""
            parts += [name, f'<div class="pair tight">{"".join(f"<figure>{block}</figure>" for block in blocks)}</div>']
    if not parts:
        return ""
    intro = "One block per layer, one column per expert, the most used on the left; a row is a domain of the calibration text."
    legend = f'<p class="dim">{intro}</p>{expert_maps.use_legend()}'
    return section("use", "Which domain uses which experts", legend, *parts)


def _use_blocks(statistics: Statistics) -> list[str]:
    short = expert_maps.short_layers(list(statistics.layers))
    blocks = []
    for layer, sums in statistics.layers.items():
        if "count" in sums:
            gates = sums["gate_sum"].tolist() if "gate_sum" in sums else None
            blocks.append(expert_maps.use_block(short[layer], statistics.domains, sums["count"].tolist(), gates))
    return blocks


def _plan_section(found: Inputs) -> str:
    parts = []
    for identity, plan in found.plans.items():
        users = dict.fromkeys(row.model for row in found.rows if row.plan == identity)
        name = ", ".join(users) or "plan"
        parts.append(f"<h3>{escape(name)}</h3>")
        press = '<p><button class="press" type="button" aria-pressed="false" hidden>order by expert number</button></p>'
        made = (
            f'<p class="dim">method {escape(plan.method)}{escape(_options(plan.options))}; plan {escape(identity)}</p>'
        )
        made += '<p class="dim hint">The grid is wider than this screen: slide it sideways.</p>'
        made += f'<p class="dim">{escape(words)}</p>' if (words := _predicted(found, identity, plan)) else ""
        grid = f'<div class="scroll" tabindex="0">{expert_maps.fate_grid(plan)}</div>'
        parts.append(f"<figure>{made}{expert_maps.fate_legend(plan)}{grid}{press}</figure>")
    return section("plan", "What became of every expert", *parts) if parts else ""


def _predicted(found: Inputs, identity: str, plan: Plan) -> str:
    """What the plan was to cost, beside what it cost, where both are known."""
    said = expert_maps.said_of(plan)
    if not isinstance(predicted := said.get("predicted_kl"), float):
        return ""
    measured = next((row for row in found.rows if (row.plan, row.metric, row.domain) == (identity, "kl", ALL)), None)
    checked = said.get("measured_kl")  # by compress, on validation text
    beside = f", {four_digits(checked)} where it was checked" if isinstance(checked, float) else ""
    beside += "" if measured is None else f", measured {four_digits(measured.value)}"
    return f"KL from the original, nats per token: predicted {four_digits(predicted)}{beside}; press on an expert for what it was not"


def _options(options: dict[str, Any]) -> str:
    said = ", ".join(f"{key} {_say(value)}" for key, value in options.items() if value is not None)
    return f" ({said})" if said else ""


# --- recovery -------------------------------------------------------------------------------------------------------


def _recovery_section(found: Inputs) -> str:
    figures = []
    for log in found.logs.values():
        if len(log.training) > 1:
            drawn = f"<h3>{escape(log.name)}</h3>{_recovery_curves(log)}"
            figures.append(figure(drawn, _recovery_caption(log)))
    return section("recovery", "Recovery", f'<div class="pair">{"".join(figures)}</div>') if figures else ""


def _recovery_curves(log: RecoveryLog) -> str:
    raw = [(float(entry["step"]), float(entry["loss"])) for entry in log.training]
    smooth = list(zip((step for step, _ in raw), smoothed([loss for _, loss in raw]), strict=True))
    lines = [Series("", _thin(raw), "c0", "raw"), Series("training", _thin(smooth), "c0")]
    if log.validation:
        points = tuple((float(entry["step"]), float(entry["validation_loss"])) for entry in log.validation)
        lines.append(Series("validation", points, "c1", "dots"))
    beta = [
        (float(entry["step"]), float(entry["beta"]))
        for entry in log.training
        if isinstance(entry.get("beta"), (int, float))
    ]
    below = Series("beta", _thin(beta), "c2") if len(beta) > 1 else None
    return curves(lines, "training step", "loss, nats per token", below)


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of about a twentieth of the run around every value: centred, so that it does not lag behind."""
    half, sums = max(len(values) // 40, min(3, len(values) // 8)), [0.0, *itertools.accumulate(values)]
    ends = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]


def _thin(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    every = max(1, len(points) // CURVE_POINTS)
    return (*points[:-1:every], points[-1])


def _recovery_caption(log: RecoveryLog) -> str:
    words = "The faint line is the loss of single steps, the thick one their running mean."
    if len(log.validation) > 1:
        first, last = log.validation[0]["validation_loss"], log.validation[-1]["validation_loss"]
        words += f" Validation loss {four_digits(first)} \N{RIGHTWARDS ARROW} {four_digits(last)}."
    if log.kept_step is not None:
        words += f" The result is the state of step {log.kept_step}, with the lowest validation loss."
    if any("beta" in entry for entry in log.training):
        words += " Beta is the share of the old weights that is left."
    return words


# --- tables and origins -----------------------------------------------------------------------------------------------


def _results_section(rows: Sequence[Row]) -> str:
    heads = ["model", "metric", "domain", "value", "low", "high", "tokens", "seed", "seconds", "peak memory", "plan"]
    lines = [
        [
            row.model,
            row.metric,
            row.domain,
            *((("" if v is None else f"{v:.5g}"), v) for v in (row.value, row.low, row.high)),
            (f"{row.n:,}", row.n),
            (str(row.seed), row.seed),
            (f"{row.seconds:.1f}", row.seconds),
            (describe_size(row.peak_bytes), row.peak_bytes),
            row.plan or "",
        ]
        for row in rows
    ]
    folded = "" if len(rows) > LONG_TABLE else " open"
    shown = (
        f"<details{folded}><summary>{len(rows)} rows; press a heading to sort</summary>{table(heads, lines)}</details>"
    )
    return section("results", "All results", shown)


def _origin_section(found: Inputs) -> str:
    seeds = sorted({row.seed for row in found.rows})
    facts = _distinct(row.provenance for row in found.rows if row.provenance)
    measured = [("seeds", ", ".join(map(str, seeds))), *_facts(facts, skip=_MODEL_FACTS)]
    parts = ["<h3>Measurements</h3>", _fact_table(measured)] if found.rows else []
    for identity, plan in found.plans.items():
        if plan.provenance:
            parts += [f"<h3>Plan {escape(identity)}</h3>", _fact_table(_facts(_distinct([plan.provenance])))]
    for statistics in found.statistics.values():
        parts += ["<h3>Statistics</h3>", _fact_table(_facts(_distinct([statistics.words()])))]
    for log in found.logs.values():
        if log.start:
            parts += [f"<h3>Recovery of {escape(log.name)}</h3>", _fact_table(_facts(_distinct([log.start])))]
    parts += ["<h3>Files</h3>", _fact_table([(f"{kind}, used", file) for kind, file in found.used])]
    if found.missed:
        parts.append(_fact_table([(f"{kind}, {why}", file) for kind, file, why in found.missed]))
    return section(
        "origins",
        "Where this comes from",
        f"<details open><summary>versions, commands, seeds, files</summary>{''.join(parts)}</details>",
    )


_MODEL_FACTS = (
    *("parameters", "bytes", "expert_parameters", "active_parameters", "stage", "method", "remove"),
)  # shown in the sections above


def _distinct(many: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """Every key with its different values, in the order of their appearance."""
    facts: dict[str, dict[str, None]] = {}
    for one in many:
        for key, value in one.items():
            if key not in UNSAID and value not in (None, "", {}, []):
                facts.setdefault(key, {})[_say(value)] = None
    return {key: list(values) for key, values in facts.items()}


def _facts(facts: dict[str, list[str]], skip: Sequence[str] = ()) -> list[tuple[str, str]]:
    said = []
    for key, values in facts.items():
        if key not in skip:
            more = [] if len(values) <= 6 else [f"and {len(values) - 6} more"]
            said.append((key.replace("_", " "), "\n".join([*values[:6], *more])))
    return said


def _say(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_say(part)}" for key, part in value.items())[:1000]
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_say, value))[:1000]
    return (
        f"{value:.6g}"
        if isinstance(value, float)
        else bare(value)
        if isinstance(value, str)
        else json.dumps(value, default=str)
    )


def _fact_table(facts: Sequence[tuple[str, str]]) -> str:
    def lines(words: str) -> str:
        return "<br>".join(map(escape, words.split("\n")))

    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td class="wrap">{lines(value)}</td></tr>' for key, value in facts
    )
    return f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>'
