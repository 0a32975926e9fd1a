"""MoBE: plans as a slow loop has them, experts that share bases found exactly, and the least error where it is known."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from locum.errors import PlanError
from locum.experts.mixtures import fit_mixture, mixed
from locum.experts.parts.basis_mixture import BasisMixture
from locum.methods.mobe import MoBE
from locum.models.families import find_layers
from locum.models.sizes import shape_of
from locum.plans.plan import KEPT, LayerPlan, Slot, make_plan, stand_in
from making.handmade import layers_of, toy_shape
from making.planted import IDS, close, compressed, copy_of, edit, logits
from making.tiny_models import tiny_model

SHAPE = toy_shape()


def error(weight_EOI: torch.Tensor, rank: int, bases: int) -> float:
    found = fit_mixture(weight_EOI, rank, bases)
    return float((weight_EOI - found.own_EOR @ mixed(found.mix_EM, found.bases_MRI)).square().sum())


def drawn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_with_one_basis_it_loses_what_the_svd_of_all_loses(rank):
    weight_EOI = drawn(5, 9, 12)
    lost = torch.linalg.svdvals(weight_EOI.flatten(0, 1))[rank:].square().sum()
    assert error(weight_EOI, rank, 1) == pytest.approx(float(lost), rel=1e-3)
    assert error(weight_EOI, rank, 1) >= float(lost) * (1 - 1e-9)


def test_experts_that_share_bases_are_fitted_exactly_and_no_others():
    """Six experts, each with the directions of one of two bases."""
    own_EOR, bases_MRI = drawn(6, 9, 3), drawn(2, 3, 12, seed=1)
    weight_EOI = own_EOR @ bases_MRI[[0, 1, 1, 0, 1, 0]]
    size = float(weight_EOI.square().sum())
    assert error(weight_EOI, 3, 2) < 1e-15 * size
    assert error(weight_EOI, 3, 1) > 0.05 * size and error(weight_EOI, 2, 2) > 0.05 * size


def test_more_bases_than_experts_are_zero_and_lose_only_what_each_expert_loses():
    weight_EOI = drawn(3, 9, 12)
    found = fit_mixture(weight_EOI, 4, 5)
    assert found.bases_MRI.shape == (5, 4, 12) and not found.bases_MRI[3:].any() and not found.mix_EM[:, 3:].any()
    alone = sum(float(torch.linalg.svdvals(w_OI)[4:].square().sum()) for w_OI in weight_EOI)
    assert error(weight_EOI, 4, 5) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize(("bases", "rank", "exact"), [(2, 3, True), (1, 3, False), (2, 2, False)])
def test_a_model_whose_experts_share_bases_stays_what_it_was(bases, rank, exact):
    model = tiny_model("olmoe")
    for number, layer in enumerate(find_layers(model)):
        shared = {
            name: 0.3 * drawn(2, 3, layer.shape.hidden_size, seed=9 + i).float()
            for i, name in enumerate(("gate_FD", "up_FD"))
        }
        edits = {}
        for e in range(8):
            own = copy_of(layer, e)
            made = {
                name: drawn(len(own.up_FD), 3, seed=100 * number + e).float() @ b[e % 2] for name, b in shared.items()
            }
            edits[e] = dataclasses.replace(own, **made)
        edit(layer, edits)
    before, shape = logits(model), shape_of(model)
    slot = Slot((BasisMixture(bases, rank),))
    layers = [LayerPlan(layer.name, (slot,) * layer.num_experts) for layer in shape.layers]
    assert make_plan(shape, layers).removed(shape) > 0.4 and before.shape[:2] == IDS.shape
    assert close(compressed(model, layers), before, 1e-4) == exact


@pytest.mark.parametrize("bases", [1, 3, 40])
def test_plans_equal_a_slow_loop(bases):
    """Of mixtures at full rank, and of those with the fewest bases, the largest that has so many numbers."""
    for amount in (0.0, 0.1, 0.3, 0.5, 0.8, 1.0):
        for layer, shape in zip(layers_of(MoBE(bases, 1), None, SHAPE, amount), SHAPE.layers, strict=True):
            count, d, f = shape.num_experts, shape.hidden_size, shape.expert_width
            fewest, full = min(bases, count), min(d, f)
            at_full = [(m, full) for m in range(fewest, count + 1)]
            pairs = [(fewest, rank) for rank in range(1, full + 1)] + at_full
            numbers = {(m, r): count * f * r + m * r * d + count * m for m, r in pairs}
            fitting = [pair for pair in pairs if numbers[pair] <= (1 - amount) * count * d * f]
            most = max(fitting, key=numbers.__getitem__, default=(fewest, 1))
            if amount == 0 or 2 * numbers[most] >= 2 * count * d * f:
                assert layer == LayerPlan(shape.name, (KEPT,) * count)
                continue
            assert layer.slots == (Slot((BasisMixture(*most),)),) * count
            assert layer.parameters(shape) == 2 * numbers[most] + count * d * f


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((BasisMixture(0, 2),), "mixes 0 bases; allowed: 1 to"),
        ((BasisMixture(99, 2),), "mixes 99 bases; allowed: 1 to"),
        ((BasisMixture(2, 0),), "do not fit"),
        ((BasisMixture(2, 2), *stand_in(rank=2).parts), "is a mixture of bases and has rank 2"),
        (BasisMixture(2, 2).beside(), "comes by itself with other parts"),
    ],
)
def test_what_does_not_fit_is_refused(parts, words):
    layers = [LayerPlan(layer.name, (Slot(parts),) + (KEPT,) * (layer.num_experts - 1)) for layer in SHAPE.layers]
    with pytest.raises(PlanError, match=words):
        make_plan(SHAPE, layers)
