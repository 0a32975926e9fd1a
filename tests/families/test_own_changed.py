"""Every family with experts of its own that were narrowed or share factors, in containers, and masked, in stock files: the size that was promised,
the files of the live model, its logits when they are loaded again, and what whole experts with zeros compute."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from pathlib import Path

import pytest
import torch

from families.case import Case, both_ways, checkpoint_of, copied, near, skip_refused, tokens_of
from families.tiny_families import all_families
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.containers.container import StandInExperts
from locum.experts.columns import COLUMNS, highest
from locum.experts.masks import MASKS
from locum.experts.parts.basis_mixture import BasisMixture
from locum.experts.parts.constant import Constant
from locum.experts.parts.left_factors import LeftFactors
from locum.experts.parts.masked import Masked
from locum.experts.parts.narrowed import Narrowed
from locum.measure.calibration import calibrate
from locum.models.families import find_layers, read_expert, write_expert
from locum.plans.plan import KEPT, LayerPlan, Plan, Slot, make_plan
from locum.shapes import ModelShape

pytestmark = pytest.mark.families
NEEDED = (*COLUMNS["camera"].needs, *MASKS["sparsegpt"].needs, "output_sum")


def narrowed(shape: ModelShape) -> Plan:
    """Of several widths, and masked ones and whole ones beside them."""

    def slot(e: int, width: int) -> Slot:
        return (Slot((Narrowed(width // 2),)), Slot((Narrowed(1 + e % (width - 1)),)), Slot((Masked("2:4"),)), KEPT)[
            e % 4
        ]

    layers = [LayerPlan(x.name, tuple(slot(e, x.expert_width) for e in range(x.num_experts))) for x in shape.layers]
    return make_plan(shape, [dataclasses.replace(x, slots=_without_masks(x)) for x in layers[:1]] + layers[1:])


def shared(shape: ModelShape) -> Plan:
    """Mixtures of bases and factors on one expert's, whole experts beside them."""
    slots = (
        Slot((BasisMixture(2, 3),)),
        Slot((LeftFactors(2, 1, (1,)),)),
        Slot((LeftFactors(2, 1, (1, 2), "svd"), Constant())),
        KEPT,
    )
    layers = [LayerPlan(x.name, tuple(slots[e % 4] for e in range(x.num_experts))) for x in shape.layers]
    return make_plan(shape, layers)


def _without_masks(layer: LayerPlan) -> tuple[Slot, ...]:
    return tuple(KEPT if slot.is_rewritten else slot for slot in layer.slots)


def masked(shape: ModelShape) -> Plan:
    layers = [LayerPlan(x.name, (Slot((Masked("2:4", "sparsegpt"),)),) * x.num_experts) for x in shape.layers]
    return make_plan(shape, layers)


def with_zeros(model, plan: Plan, seen) -> torch.nn.Module:
    """The model whose narrowed experts are whole, with columns of zeros."""
    for layer in find_layers(model):
        scores_EF = COLUMNS["camera"].scores(seen.layer(layer.shape.name))
        for e, slot in enumerate(plan.layer(layer.shape.name).slots):
            if not isinstance(slot.parts[0], Narrowed):
                continue
            weights = read_expert(layer.experts, e)
            kept = highest(scores_EF[e], slot.parts[0].width)
            down_DF = torch.zeros_like(weights.down_DF)
            down_DF[:, kept] = weights.down_DF[:, kept]
            write_expert(layer.experts, e, dataclasses.replace(weights, down_DF=down_DF))
    return model


@pytest.mark.parametrize("family", all_families())
def test_family(family: str) -> None:
    skip_refused(family)
    case = Case(family)
    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder) / "original"
        source, shape, live = checkpoint_of(case, original)
        seen = calibrate(case.model(), tokens_of(case.ids_BS), batch_size=2, needs=(*NEEDED, *MASKS["wanda"].needs))
        for plan in (narrowed(shape), masked(shape), shared(shape)):
            out = Path(folder) / plan.id
            model = both_ways(source, shape, live, plan, seen, out)
            again = copied(load_model(out))
            assert torch.equal(case.logits_of(again), case.logits_of(copied(model)))
            is_stock = [not isinstance(layer.experts, StandInExperts) for layer in find_layers(again)]
            assert all(is_stock) if plan.is_stock(shape) else not any(is_stock)
        plan = make_plan(shape, [dataclasses.replace(x, slots=_without_masks(x)) for x in narrowed(shape).layers])
        small = apply_plan(copy.deepcopy(live), plan, seen)
        near(case.logits_of(copied(small)), case.logits_of(copied(with_zeros(live, plan, seen))), 1e-4)
