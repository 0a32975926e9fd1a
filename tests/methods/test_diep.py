"""DiEP: the scales that are learnt are those of the convex program, what cancels goes first, and layers lose what they miss least."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from locum.criteria.criterion import CRITERIA
from locum.measure.calibration import calibrate
from locum.methods.diep import DiEP, learnt
from locum.models.families import find_layers
from locum.models.sizes import shape_of
from locum.plans.plan import DROPPED, make_plan
from locum.stats.definitions import STATISTICS
from locum.stats.events import RoutedEvent
from making.handmade import layers_of, make_statistics, tokens_of, toy_shape, with_sums
from making.planted import copy_of, edit
from making.tiny_models import tiny_ids, tiny_model

SHAPE = toy_shape()


def gone(layers) -> list[set[int]]:
    return [{e for e, slot in enumerate(layer.slots) if slot == DROPPED} for layer in layers]


def test_without_pairs_the_scales_are_those_of_the_convex_program() -> None:
    """min sum a (1 - m)^2 with m at least 0 and of a given sum: m = max(0, 1 - r / a), r by bisection."""
    a_LE = [torch.tensor(row, dtype=torch.float64) for row in ([0.2, 0.1, 0.6, 0.1], [0.3, 0.3, 0.35, 0.05])]
    found = torch.cat(learnt([a_E.diag() for a_E in a_LE], 0.5, 400))
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        exact = (1 - middle / torch.cat(a_LE)).clamp(min=0)
        low, high = (middle, high) if exact.sum() > 4 else (low, middle)
    torch.testing.assert_close(found, exact, atol=0.05, rtol=0)
    assert found.sum() == pytest.approx(4)


def event_of(out_TKD: Tensor, index_TK: Tensor, gate_TK: Tensor, experts: int) -> RoutedEvent:
    expert_P, order_P = index_TK.flatten().sort(stable=True)
    counts = tuple(torch.bincount(expert_P, minlength=experts).tolist())
    token_P = order_P // index_TK.shape[1]
    return RoutedEvent(expert_P, gate_TK.flatten()[order_P], out_TKD.flatten(0, 1)[order_P], counts, token_P=token_P)


def test_the_sums_say_what_any_scaling_changes() -> None:
    draw = torch.Generator().manual_seed(0)
    out_TKD, gate_TK = torch.randn(40, 2, 6, generator=draw).double(), torch.rand(40, 2, generator=draw).double()
    index_TK = torch.stack([torch.randperm(5, generator=draw)[:2] for _ in range(40)])
    product_EE = STATISTICS["gated_output_product"].increment(event_of(out_TKD, index_TK, gate_TK, 5))
    m_E = torch.rand(5, generator=draw, dtype=torch.float64)
    missing = ((1 - m_E)[index_TK][..., None] * gate_TK[..., None] * out_TKD).sum(dim=1).square().sum()
    assert float((1 - m_E) @ product_EE @ (1 - m_E)) == pytest.approx(float(missing))


def test_two_that_say_the_opposite_go_first_where_their_sizes_would_keep_them() -> None:
    """Experts 0 and 1 are always selected together and cancel; they are the loudest."""
    draw = torch.Generator().manual_seed(1)
    shape = toy_shape(layers=1, experts=6, d=8, f=4)
    index_TK = torch.tensor([[0, 1], [2, 3], [4, 5], [2, 4], [3, 5]]).repeat(20, 1)
    out_TKD = torch.randn(100, 2, 8, generator=draw).double()
    loud_T = index_TK[:, 0] == 0
    out_TKD[loud_T] *= 5
    out_TKD[loud_T, 1] = -out_TKD[loud_T, 0]
    event = event_of(out_TKD, index_TK, torch.full((100, 2), 0.5).double(), 6)
    names = ("gated_output_product", "count", "gated_output_norm")
    seen = with_sums(
        shape, **{name: [STATISTICS[name].increment(event)] for name in names}, output_peak=[torch.ones(6)]
    )
    (plan,) = layers_of(DiEP(), seen, shape, 0.5)
    assert gone([plan]) == [{0, 1}]
    reap_E = CRITERIA["reap"](seen.layer(shape.layers[0].name))
    assert set(reap_E.topk(2).indices.tolist()) == {0, 1}


@pytest.mark.parametrize("floor", [0, 9])
def test_the_lowest_of_all_layers_go_within_what_each_can_lose(floor: int) -> None:
    statistics = make_statistics(SHAPE, 2)
    method = DiEP(steps=40, floor=floor, protect=False)
    scored = method.score_experts(statistics, SHAPE)
    most = min(14, 16 - floor)
    for amount in (0.2, 0.6, 1.0):
        left, expected = int(amount * 3 * most + 1e-9), [set(), set(), set()]
        every = sorted((float(s), index, e) for index, s_E in enumerate(scored.scores_LE) for e, s in enumerate(s_E))
        for _, index, e in every:
            if left and len(expected[index]) < most:
                expected[index].add(e)
                left -= 1
        assert gone(method.plan(scored, SHAPE, amount)) == expected


def test_experts_that_say_next_to_nothing_are_found_in_whatever_layer_they_are() -> None:
    model, ids = tiny_model("gpt_oss"), tiny_ids(6, 32)
    first, second = find_layers(model)
    for layer, quiet in ((first, (1, 4, 6)), (second, (2,))):
        edit(layer, {e: copy_of(layer, e).map(lambda n, t: t * 1e-5 if "down" in n else t) for e in quiet})
    method = DiEP(steps=60, protect=False)
    layers = layers_of(method, calibrate(model, tokens_of(ids), needs=method.needs()), shape_of(model), 0.34)
    assert make_plan(shape_of(model), layers).removed(shape_of(model)) == 0.25
    assert gone(layers) == [{1, 4, 6}, {2}]
