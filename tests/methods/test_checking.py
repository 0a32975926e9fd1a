"""Plans that are checked on the model: what layers cost shifts bytes between them, and no plan is taken that measures worse."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from locum.budgets.target import Target
from locum.methods.auto import Auto
from locum.plans.plan import LayerPlan, Plan
from locum.stages.checking import corrected
from locum.stages.options import silent
from locum.stages.planning import decide, decided_from
from making.handmade import make_statistics, toy_shape

SHAPE = toy_shape(layers=3, experts=8)
STATISTICS = make_statistics(SHAPE)
TARGET = Target(fit=int(SHAPE.bytes - 0.85 * SHAPE.bytes_of_experts))
METHOD = Auto()
SCORED = METHOD.score_experts(STATISTICS, SHAPE)
FACTORS = (3.0, 1.0, 0.3)  # by which the layers cost more than is predicted
NAMES = [layer.name for layer in SHAPE.layers]


class Model:
    """Answers as a model would in which layers cost so many times what is predicted, or as a function says."""

    def __init__(self, answer: Callable[[Mapping[str, LayerPlan]], float] | None = None) -> None:
        self.answer, self.asked = answer or true_cost, 0

    def divergences(self, variants: Sequence[Mapping[str, LayerPlan]]) -> Tensor:
        self.asked += 1
        return torch.tensor([self.answer(variant) for variant in variants], dtype=torch.float64)


def true_cost(variant: Mapping[str, LayerPlan]) -> float:
    parts = zip(NAMES, SCORED, FACTORS, strict=True)
    return sum(f * METHOD.predicted((x,), [variant[name]]) for name, x, f in parts if name in variant)


def layers_of(plan: Plan) -> dict[str, LayerPlan]:
    return {layer.layer: layer for layer in plan.layers}


def test_bytes_go_where_layers_cost_more_than_was_predicted() -> None:
    plan, model = decide(METHOD, STATISTICS, SHAPE, TARGET), Model()
    checked = corrected(plan, METHOD, STATISTICS, SHAPE, TARGET, model, silent)
    assert checked.id == decided_from(METHOD, METHOD.corrected(SCORED, FACTORS), SHAPE, TARGET).id != plan.id
    first, last = (
        [layer.bytes(x, SHAPE) for layer, x in zip(made.layers, SHAPE.layers, strict=True)] for made in (plan, checked)
    )
    assert last[0] > first[0] and last[2] < first[2] and checked.size(SHAPE).bytes <= TARGET.fit
    said = checked.provenance["auto"]
    assert said["measured_kl"] == pytest.approx(true_cost(layers_of(checked)))
    assert said["measured_kl"] < said["measured_kl_at_first"] == pytest.approx(true_cost(layers_of(plan)))
    for name, factor in zip(NAMES, FACTORS, strict=True):
        assert said["by_layer"][name]["measured"] == pytest.approx(factor * said["by_layer"][name]["predicted"])
    assert said["predicted_kl"] == pytest.approx(said["measured_kl"]) and len(said["experts"]) == 3
    assert model.asked == 2  # the second plan would be the last again


@pytest.mark.parametrize("seed", range(5))
def test_no_plan_is_taken_that_measures_worse(seed: int) -> None:
    """A model that answers at random."""
    draw, known = random.Random(seed), {}

    def answer(variant: Mapping[str, LayerPlan]) -> float:
        return known.setdefault(tuple(sorted(map(repr, variant.values()))), draw.random())

    plan = decide(METHOD, STATISTICS, SHAPE, TARGET)
    checked = corrected(plan, METHOD, STATISTICS, SHAPE, TARGET, Model(answer), silent)
    said = checked.provenance["auto"]
    assert said["measured_kl"] == answer(layers_of(checked)) <= said["measured_kl_at_first"] == answer(layers_of(plan))
    assert (checked.id == plan.id) == (said["measured_kl"] == said["measured_kl_at_first"])
    assert checked.size(SHAPE).bytes <= TARGET.fit and METHOD.checks == 2


def test_a_model_that_loses_nothing_keeps_its_plan() -> None:
    plan = decide(METHOD, STATISTICS, SHAPE, TARGET)
    checked = corrected(plan, METHOD, STATISTICS, SHAPE, TARGET, Model(lambda variant: 0.0), silent)
    assert checked.id == plan.id and checked.provenance["auto"]["measured_kl"] == 0
