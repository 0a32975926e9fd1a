"""MoE-SVD: sensitivity and plans as slow loops have them; experts that share directions kept exactly; what is shared is stored once."""

from __future__ import annotations

import pytest
import torch

from locum.containers.build import build_layer
from locum.errors import PlanError
from locum.experts.parts.left_factors import LeftFactors
from locum.measure.calibration import calibrate
from locum.methods.moe_svd import MoESVD, sensitivity
from locum.models.families import find_layers
from locum.models.sizes import shape_of
from locum.plans.plan import KEPT, LayerPlan, Slot, make_plan, stand_in
from locum.stats.outliers import edges
from locum.stats.sums import LayerStatistics
from making.containers import E, drawn_experts, layer_of
from making.handmade import layers_of, make_statistics, tokens_of, toy_shape
from making.planted import IDS, close, compressed, copy_of, edit, logits
from making.tiny_models import tiny_model

SHAPE = toy_shape()


def test_sensitivity_is_use_times_stable_rank_times_outliers():
    shape = layer_of()
    count_E = torch.tensor([6.0, 2, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    bins = edges()
    at = [int((bins <= value).nonzero()[-1]) for value in (1.0, 100.0)]
    histogram_EH = torch.zeros(E, len(bins) - 1, dtype=torch.float64)
    histogram_EH[0, at[0]], histogram_EH[0, at[1]], histogram_EH[1, at[0]] = 70, 2, 24
    sums = torch.zeros(E, shape.hidden_size, dtype=torch.float64)
    sums[0, 0], sums[1, 0] = 70 + 200, 24
    squares = torch.zeros_like(sums)
    squares[0, 0], squares[1, 0] = 70 + 20_000, 24
    named = {"count": count_E, "output_histogram": histogram_EH, "output_sum": sums, "output_square": squares}
    layer = LayerStatistics(shape, named | {"stable_rank": torch.full((E,), 3.0, dtype=torch.float64)})
    assert sensitivity(layer) == pytest.approx(6 / 8 * 3 * (2 / 72))


@pytest.mark.parametrize("trim", [0, 1, 2])
def test_plans_equal_a_slow_loop(trim):
    statistics = make_statistics(SHAPE, 2)
    found = [sensitivity(statistics.layer(layer.name)) for layer in SHAPE.layers]
    assert len(set(found)) == len(found) > 1
    least = min(range(len(found)), key=found.__getitem__)
    for amount in (0.3, 1.0):
        method = MoESVD(layers=1 / len(found), trim=trim, multiple=1)
        for i, (layer, shape) in enumerate(
            zip(layers_of(method, statistics, SHAPE, amount), SHAPE.layers, strict=True)
        ):
            if i != least:
                assert layer.is_identity
                continue
            count, d, f = shape.num_experts, shape.hidden_size, shape.expert_width
            used = statistics.layer(shape.name)["count"].tolist()
            order = sorted(range(count), key=lambda e: -used[e])
            (rank,) = {slot.parts[0].rank for slot in layer.slots}
            own = {0: count, 1: 1, 2: 3}[trim]  # two, and their mean
            assert layer.parameters(shape) == rank * (own * (2 * f + d) + 2 * d + f)
            even = count * 3 * d * f / (own * (2 * f + d) + 2 * d + f)
            assert rank == max(1, min(int((1 - amount) * even), d, f))
            for e, slot in enumerate(layer.slots):
                of = (e,) if not trim or e in order[:trim] else tuple(order[:trim])
                assert slot == Slot((LeftFactors(rank, order[0], of),))


def test_where_little_goes_the_least_sensitive_layers_go_first_at_full_rank():
    statistics = make_statistics(SHAPE, 2)
    found = [sensitivity(statistics.layer(layer.name)) for layer in SHAPE.layers]
    order, counts = sorted(range(len(found)), key=found.__getitem__), []
    for amount in [0.02 * n for n in range(1, 20)]:
        layers = layers_of(MoESVD(layers=1), statistics, SHAPE, amount)
        changed = [i for i, layer in enumerate(layers) if not layer.is_identity]
        assert sorted(order[: len(changed)]) == changed
        counts.append(len(changed))
        ranks = {slot.parts[0].rank for i in changed for slot in layers[i].slots}
        assert len(ranks) == 1 and (len(changed) == len(found) or ranks == {128})
    assert counts == sorted(counts) and set(counts) == set(range(1, len(found) + 1))


@pytest.mark.parametrize(("start", "rank", "exact"), [("svd", 3, True), ("whitened", 3, True), ("svd", 2, False)])
def test_experts_that_share_their_inputs_directions_stay_what_they_were(start, rank, exact):
    model = tiny_model("olmoe")
    for number, layer in enumerate(find_layers(model)):
        generator = torch.Generator().manual_seed(number)
        first = copy_of(layer, 0)
        shared = first.map(lambda _, w, g=generator: 0.5 * torch.randn(3, w.shape[1], generator=g))
        own = {
            e: first.map(lambda n, w, g=generator, s=shared: 0.5 * torch.randn(len(w), 3, generator=g) @ getattr(s, n))
            for e in range(8)
        }
        edit(layer, own)
    before, shape = logits(model), shape_of(model)
    statistics = calibrate(model, tokens_of(IDS), needs=MoESVD().needs())
    slots = tuple(Slot((LeftFactors(rank, 1, (e,), start),)) for e in range(8))
    layers = [LayerPlan(layer.name, slots) for layer in shape.layers]
    assert make_plan(shape, layers).removed(shape) > 0.6
    assert close(compressed(model, layers, statistics), before, 1e-3) == exact


def test_shared_factors_are_stored_once_and_a_mean_of_two_is_their_mean():
    shape, own = layer_of(), drawn_experts("swiglu")
    both, one, other = (Slot((LeftFactors(4, 2, of, "svd"),)) for of in ((0, 1), (0,), (1,)))
    plan = LayerPlan("experts", (one, other, *[both] * (E - 2)))
    layout, tensors = build_layer(plan, shape, own.__getitem__)
    assert {len(tensors[name]) for name in tensors if name.startswith("right")} == {1}
    assert sum(tensor.numel() for tensor in tensors.values()) == plan.parameters(shape)
    (stack,) = (s for s in layout.stacks if s.part == "left_factors")
    assert sorted(set(stack.rows)) == [0, 1, 2] and len(set(stack.rows[2:])) == 1
    for name in (name for name in tensors if name.startswith("left")):
        rows = tensors[name]
        torch.testing.assert_close(rows[stack.rows[2]], (rows[stack.rows[0]] + rows[stack.rows[1]]) / 2)


def test_factors_are_fitted_to_the_shared_one_by_least_squares():
    own = drawn_experts("swiglu", torch.float64)
    plan = LayerPlan("experts", tuple(Slot((LeftFactors(4, 2, (e,), "svd"),)) for e in range(E)))
    layout, tensors = build_layer(plan, layer_of(), own.__getitem__)
    rows = next(s for s in layout.stacks if s.part == "left_factors").rows
    right = tensors["right.0.down_A_RF"][0]
    for e in range(E):
        expected = torch.linalg.lstsq(right.T, own[e].down_DF.T).solution.T
        torch.testing.assert_close(tensors["left.0.down_B_DR"][rows[e]], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((LeftFactors(2, 99, (0,)),), "allowed: 0 to"),
        ((LeftFactors(2, 0, ()),), "at least one"),
        ((LeftFactors(0, 0, (0,)),), "do not fit"),
        ((LeftFactors(2, 0, (0,), "new"),), "unknown start 'new'"),
        ((LeftFactors(2, 0, (0,)), *stand_in(rank=2).parts), "leave one of the two out"),
    ],
)
def test_what_does_not_fit_is_refused(parts, words):
    layers = [LayerPlan(layer.name, (Slot(parts),) + (KEPT,) * (layer.num_experts - 1)) for layer in SHAPE.layers]
    with pytest.raises(PlanError, match=words):
        make_plan(SHAPE, layers)
