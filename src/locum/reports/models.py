"""The numbers behind a report: rows gathered by model, the original found among them, and what was lost in a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..measure.rows import Row
from .charts import MARKERS, NUM_COLOURS, four_digits

ALL = "all"  # the domain that joins all others
QUALITY = {
    "bits_per_byte": "bits per byte",
    "loss": "loss, nats per token",
    "perplexity": "perplexity",
}  # lower is better


@dataclass(frozen=True)
class Estimate:
    """One number of one model, over its seeds: the mean, and the widest bounds that any of them gives."""

    value: float
    low: float
    high: float
    values: tuple[float, ...]

    @property
    def interval(self) -> str:
        return f"{four_digits(self.low)} to {four_digits(self.high)}"

    @property
    def as_percent(self) -> str:
        return f"{self.low:.1%} to {self.high:.1%}"


@dataclass
class Model:
    """All rows of one name."""

    name: str
    rows: list[Row] = field(default_factory=list)
    colour: str = "co"
    marker: str = "circle"

    def estimate(self, metric: str, domain: str = ALL) -> Estimate | None:
        rows = [row for row in self.rows if row.metric == metric and row.domain == domain and math.isfinite(row.value)]
        # the original is measured again beside every model: the same number with the same seed counts once
        rows = list({(row.seed, f"{row.value:.6g}"): row for row in rows}.values())
        if not rows:
            return None
        values = tuple(row.value for row in rows)
        bounds = [b for row in rows for b in (row.low, row.high) if b is not None and math.isfinite(b)]
        return Estimate(
            math.fsum(values) / len(values), min(*values, *bounds, values[0]), max(*values, *bounds, values[0]), values
        )

    def number(self, key: str) -> float | None:
        """A number that the rows' provenance gives for this model, such as its bytes."""
        numbers = (row.provenance.get(key) for row in self.rows)
        return next((n for n in numbers if isinstance(n, (int, float)) and not isinstance(n, bool) and n > 0), None)

    def said(self, key: str) -> str | None:
        return next((row.provenance[key] for row in self.rows if isinstance(row.provenance.get(key), str)), None)

    @property
    def plan(self) -> str | None:
        return next((row.plan for row in self.rows if row.plan), None)

    def recovers_to(self, other: Model) -> bool:
        same = self.plan is not None and self.plan == other.plan
        return same and self.said("stage") == "compressed" and other.said("stage") == "recovered"


@dataclass(frozen=True)
class Comparison:
    models: tuple[Model, ...]  # the original first, then in the order of the rows
    original: Model | None
    best: Model  # the compressed model that the headline is about
    metric: str
    domains: tuple[str, ...]  # without "all"
    sentence: str
    warning: str

    def domains_of(self, metric: str) -> list[str]:
        """Domains in which some model has this metric; "all" comes last, and only beside others."""
        return [d for d in (*self.domains, ALL) if self.domains and any(m.estimate(metric, d) for m in self.models)]


def compare(rows: Sequence[Row]) -> Comparison:
    """Gather rows by model. The headline's model is the compressed one with the best quality on all domains."""
    named: dict[str, Model] = {}
    for row in rows:
        named.setdefault(row.model, Model(row.model)).rows.append(row)
    original = find_original(list(named.values()))
    models = sorted(named.values(), key=lambda m: m is not original)
    _paint(models, original)
    metric = next((m for m in QUALITY if any(model.estimate(m) for model in models)), "bits_per_byte")
    domains = tuple(dict.fromkeys(row.domain for row in rows if row.domain != ALL))
    others = [m for m in models if m is not original] or models
    best = min(others, key=lambda m: (_value(m, metric), m.number("bytes") or math.inf))
    sentence = " ".join(_sentences(best, original, others, metric, domains))
    return Comparison(tuple(models), original, best, metric, domains, sentence, _warning(rows))


def find_original(models: Sequence[Model]) -> Model | None:
    """The model that calls itself the original by stage or name; else the only one without a plan, if others have one."""
    for model in models:
        if model.said("stage") == "original" or model.name.strip().casefold() == "original":
            return model
    without = [model for model in models if model.plan is None and model.said("method") is None]
    return without[0] if len(without) == 1 and len(models) > 1 else None


def _paint(models: Sequence[Model], original: Model | None) -> None:
    for i, model in enumerate(model for model in models if model is not original):
        model.colour, model.marker = f"c{i % NUM_COLOURS}", MARKERS[(i + i // NUM_COLOURS) % 3]
    if original:
        original.marker = MARKERS[3]


def _value(model: Model, metric: str) -> float:
    found = model.estimate(metric)
    return found.value if found else math.inf


def _sentences(
    best: Model, original: Model | None, others: list[Model], metric: str, domains: Sequence[str]
) -> list[str]:
    if best is original or original is None:
        found = best.estimate(metric)
        reason = (
            "only the original was measured"
            if best is original
            else "no row is of the original, so nothing can be said of the loss"
        )
        has = f"{best.name} has {QUALITY[metric]} {found.value:.4g} ({found.interval}); " if found else ""
        return [f"{has}{reason}."]
    said = [
        f"{best.name} is the best of {len(others)} compressed models here."
        if len(others) > 1
        else f"This is {best.name}."
    ]
    if (after := best.number("bytes")) and (before := original.number("bytes")):
        said.append(f"It keeps {after / before:.1%} of the bytes.")
    after, before = best.number("active_parameters"), original.number("active_parameters")
    if after and before and after < 0.99 * before:
        said.append(f"A token uses {after / before:.1%} of the parameters.")
    now, was = best.estimate(metric), original.estimate(metric)
    if now and was and was.value:
        change = now.value / was.value - 1
        name = {"bits_per_byte": "bits per byte", "loss": "nats per token", "perplexity": "perplexity"}[metric]
        said.append(
            f"Text costs {abs(change):.1%} {'more' if change >= 0 else 'less'} {name} than with the original{_worst(best, original, metric, domains)}."
        )
    if delta := best.estimate("loss_delta"):
        clear = "" if delta.low > 0 or delta.high < 0 else ", which may be nothing"
        verb = "rises" if delta.value >= 0 else "falls"
        bounds = sorted((abs(delta.low), abs(delta.high))) if delta.low * delta.high > 0 else (delta.low, delta.high)
        said.append(
            f"The loss {verb} by {abs(delta.value):.3g} nats per token (95% interval {bounds[0]:.3g} to {bounds[1]:.3g}{clear})."
        )
    if agreed := best.estimate("top1_agreement"):
        said.append(f"Its most likely next token is the original's {agreed.value:.1%} of the time.")
    return said


def _worst(best: Model, original: Model, metric: str, domains: Sequence[str]) -> str:
    """The domain that lost most, where there are several to choose from."""
    changes = []
    for domain in domains:
        now, was = best.estimate(metric, domain), original.estimate(metric, domain)
        if now and was and was.value:
            changes.append((now.value / was.value - 1, domain))
    if len(changes) < 2 or max(changes)[0] <= 0:
        return ""
    return f", most on {max(changes)[1]} ({max(changes)[0]:+.1%})"


def _warning(rows: Sequence[Row]) -> str:
    data = {mark for row in rows if isinstance(mark := row.provenance.get("data_fingerprint"), str)}
    if len(data) < 2:
        return ""
    return (
        f"Caution: these rows were measured on {len(data)} different texts or splits; compare models only within one."
    )
