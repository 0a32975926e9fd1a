"""A plan checked on the model that it is to make, on text that calibration has not seen; bytes shift between layers by what is found.

Planning adds up what each expert costs by itself. Here the model is run as the plan makes it: as a whole, and with each layer put back to
what it was. What a layer costs among the others, over what was predicted for it, is its factor, with which the plan is made again:

    factor_l = (KL(plan) - KL(plan, layer l as it was)) / predicted_l, at least 1/4 and at most 4

The better of two plans on that text stays, so it is never worse there than the first one. It is part of `compress`, since planning runs no
model. Cost: a pass over the sample for each layer and one more, for each plan that is measured; of a streamed model also building its layers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import ranks
from ..budgets.target import Target
from ..errors import DataError
from ..files import versions
from ..measure.remembered import RememberedAnswers
from ..measure.removals import ModelExplorer
from ..methods import CheckingMethod, Explorer, Method
from ..plans.layer_plan import LayerPlan
from ..plans.plan import Plan, with_provenance
from ..runs import beside_for_rank
from ..shapes import ModelShape
from ..stats.sums import Statistics
from .calibration import prepare, read_text
from .dry_run import Running, of_check
from .estimate import Estimate
from .opening import is_to_stream
from .options import Progress, device_of
from .planning import as_searched, decided_from

SPLIT = "validation"
MOST = 4.0  # by which a layer's costs are corrected
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """What a plan costs the model, in nats per token: as a whole, and what would be saved by leaving each layer as it was."""

    kl: float
    of_layers: dict[str, float]


def check_plan(
    model: Path,
    shape: ModelShape,
    plan: Plan,
    chosen: Method,
    statistics: Statistics,
    target: Target | None,
    *,
    data: Sequence[str],
    out: Path,
    sample: int,
    batch_size: int,
    device: str,
    progress: Progress,
    **cut: Any,
) -> Plan:
    """The plan, or a better one of the same size, where the method checks its plans. `cut` is how the text was cut for the statistics."""
    if not isinstance(chosen, CheckingMethod) or not chosen.checks or target is None:
        return plan
    try:
        device = device_of(device)
        streamed = is_to_stream([model], None, device)
        subject = prepare(model, shape, data, split=SPLIT, device=device, streamed=streamed, **cut)
    except DataError as error:
        logger.warning("the plan is not checked on the model: %s", error)
        return plan
    given = {"sample": sample, "batch_size": batch_size, "seed": cut["seed"], "statistics": statistics}
    explorer = ModelExplorer(subject.live, subject.blocks, **given)
    question = {**subject.origin.words(), "statistics": statistics.id, "versions": versions()}
    question |= {name: given[name] for name in ("sample", "batch_size", "seed")}
    answers = RememberedAnswers(explorer, beside_for_rank(out, "answers"), question)
    try:
        checked = as_searched(chosen, {}, statistics)
        return corrected(plan, checked, statistics, shape, target.in_bytes(shape), answers, progress)
    finally:
        answers.save()


def estimated_check(
    model: Path,
    shape: ModelShape,
    chosen: Method,
    target: Target | None,
    *,
    data: Sequence[str],
    sample: int,
    batch_size: int,
    device: str,
    progress: Progress,
    **cut: Any,
) -> list[Estimate]:
    """What the check would take, of a method and a target that have one; nothing where there is no text to check on."""
    if not isinstance(chosen, CheckingMethod) or not chosen.checks or target is None:
        return []
    try:
        blocks, _ = read_text(model, shape, data, split=SPLIT, **cut)
    except DataError:
        return []
    device = device_of(device)
    how = Running(device, None, is_to_stream([model], None, device), batch_size)
    return [of_check(model, shape, blocks, chosen, sample, cut["seed"], how)]


def corrected(
    plan: Plan,
    chosen: CheckingMethod,
    statistics: Statistics,
    shape: ModelShape,
    target: Target,
    explorer: Explorer,
    progress: Progress,
) -> Plan:
    """The best on the explorer's text of this plan and up to `chosen.checks` that follow from it, with what was measured."""
    scored = chosen.score_experts(statistics, shape)
    best, tried = plan, [plan]
    found = first = measured(plan, explorer)
    for number in range(chosen.checks):
        progress("check", number, chosen.checks)
        factor_L = _factors(found, chosen.predicted_by_layer(scored, best.layers), shape)
        again = decided_from(chosen, chosen.corrected(scored, factor_L), shape, target)
        if again.id in {each.id for each in tried}:
            break
        tried.append(again)
        more = measured(again, explorer)
        if not more.kl < found.kl:
            break
        best, found = again, more
    progress("check", chosen.checks, chosen.checks)
    predicted = chosen.predicted_by_layer(scored, best.layers)
    of_layers = {
        layer.name: {"predicted": kl, "measured": found.of_layers.get(layer.name, 0.0)}
        for layer, kl in zip(shape.layers, predicted, strict=True)
    }
    said = {"measured_kl": found.kl, "measured_kl_at_first": first.kl, "by_layer": of_layers}
    words = {**plan.provenance, **best.provenance}
    return with_provenance(best, **{**words, chosen.name: {**best.provenance[chosen.name], **said}})


def measured(plan: Plan, explorer: Explorer) -> Measured:
    """The ranks share the models that are tried."""
    changed = {layer.layer: layer for layer in plan.layers if not layer.is_identity}

    def without(name: str | None) -> dict[str, LayerPlan]:
        return {other: layer for other, layer in changed.items() if other != name}

    variants = [without(name) for name in (None, *changed)]
    kl, *rest = ranks.divide_lists(variants, lambda mine: explorer.divergences(mine).tolist())
    return Measured(kl, {name: kl - less for name, less in zip(changed, rest, strict=True)})


def _factors(found: Measured, predicted_L: Sequence[float], shape: ModelShape) -> list[float]:
    """By layer; where nothing was predicted, its costs stay as they are."""
    ratios = [
        found.of_layers.get(layer.name, 0.0) / kl if kl > 0 else 1.0
        for layer, kl in zip(shape.layers, predicted_L, strict=True)
    ]
    return [min(max(ratio, 1 / MOST), MOST) for ratio in ratios]
