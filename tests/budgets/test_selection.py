"""LightMoE's selection (arXiv 2603.12645, Eq. 2, 3, 4, 8): by hand, against slow loops, and how it behaves."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from locum.budgets.selection import SELECTIONS, count_below, layer_thresholds, mass_weights, select, selection_scores
from locum.criteria.criterion import CRITERIA
from locum.errors import OptionError, StatisticsError
from locum.shapes import ModelShape
from locum.stats.sums import Statistics
from making.handmade import make_statistics, toy_shape, with_sums

PAPER = {"selection": "adaptive", "score": "gate", "alpha": 0.3, "clip": 0.2}


def selected(
    statistics: Statistics, shape: ModelShape, amount: float, *, score: str, **options: object
) -> list[tuple[list[int], Tensor]]:
    """For every layer, the experts to replace and all scores."""
    scored = selection_scores(statistics, shape, score)
    return list(zip(select(scored, shape, amount, **options), scored.scores_LE, strict=True))


def test_eq_2_gate_shares_by_hand() -> None:
    shape = toy_shape(layers=1, experts=4)
    layer = with_sums(shape, gate_sum=[[6.0, 1.0, 0.0, 3.0]]).layer(shape.layers[0].name)
    assert CRITERIA["gate"](layer).tolist() == [0.6, 0.1, 0.0, 0.3]


def test_eq_3_thresholds_by_hand() -> None:
    """Norms 1, 2, 3 have mean 2, so norm_j is 0.5, 1, 1.5 and the factors exp(0.15), 1, exp(-0.15)."""
    low, middle, high = layer_thresholds([1.0, 2.0, 3.0], 0.1, alpha=0.3, clip=0.2)
    assert low == pytest.approx(0.1 * 1.1618342427, abs=1e-9)
    assert middle == pytest.approx(0.1, abs=1e-15)
    assert high == pytest.approx(0.1 * 0.8607079764, abs=1e-9)


def test_eq_8_clip_by_hand() -> None:
    """Norms 1 and 9: norm_j is 0.2 and 1.8; the factors exp(0.24) = 1.271 and exp(-0.24) = 0.787 are clipped."""
    assert layer_thresholds([1.0, 9.0], 0.5, 0.3, 0.2) == pytest.approx([0.6, 0.4], abs=1e-12)
    assert layer_thresholds([1.0, 9.0], 0.5, 0.3, 0.1) == pytest.approx([0.55, 0.45], abs=1e-12)
    free = [0.5 * math.exp(0.24), 0.5 * math.exp(-0.24)]
    assert layer_thresholds([1.0, 9.0], 0.5, 0.3, 0.3) == pytest.approx(free, abs=1e-12)
    assert layer_thresholds([1.0, 9.0], 0.5, 0.3, math.inf) == pytest.approx(free, abs=1e-12)
    assert layer_thresholds([1.0, 9.0], 0.5, 0.3, 0.0) == [0.5, 0.5]  # "uniform threshold" of Table 2
    assert layer_thresholds([1.0, 9.0], 0.5, 0.0, 0.2) == [0.5, 0.5]


def test_threshold_edges() -> None:
    assert layer_thresholds([7.0], 0.3, 0.3, 0.2) == [0.3]
    assert layer_thresholds([0.0, 0.0], 0.3, 0.3, 0.2) == [0.36, 0.36]  # silent routers do not divide by zero
    assert all(map(math.isfinite, layer_thresholds([1e-9, 1.0], 1.0, 100.0, 0.2)))
    norms = [3.0, 1.0, 2.0, 5.0]
    assert layer_thresholds([n * 1000 for n in norms], 0.1, 0.3, 0.2) == pytest.approx(
        layer_thresholds(norms, 0.1, 0.3, 0.2), rel=1e-12
    )


@pytest.mark.parametrize(
    ("threshold", "count"),
    [(0.0, 1), (0.124, 1), (0.125, 2), (0.126, 2), (0.249, 2), (0.25, 3), (0.499, 3), (0.5, 4), (1.0, 4), (1.2, 4)],
)
def test_count_below_on_the_boundary(threshold: float, count: int) -> None:
    """Shares 1/8, 1/8, 1/4, 1/2, exact in binary: the first prefix whose sum is more than the threshold."""
    assert count_below(torch.tensor([2.0, 8.0, 2.0, 4.0], dtype=torch.float64), threshold) == count


def test_count_below_edges() -> None:
    assert count_below(torch.tensor([0.0, 0.0, 1.0, 1.0]), 0.0) == 3  # what is never routed comes free
    assert count_below(torch.zeros(4, dtype=torch.float64), 0.1) == 4  # no mass at all: nothing exceeds
    assert count_below(torch.ones(1), 0.5) == 1


def slow_counts(statistics: Statistics, shape: ModelShape, amount: float, selection: str, clip: float) -> list[int]:
    layers = [statistics.layer(layer.name) for layer in shape.layers]
    norms = [float(layer["logit_norm"]) / float(layer["tokens"]) for layer in layers]
    mean = sum(norms) / len(norms)
    counts = []
    for layer, norm in zip(layers, norms, strict=True):
        gates = layer["gate_sum"].tolist()
        if selection == "average":
            counts.append(round(amount * len(gates)))
            continue
        threshold = amount
        if selection == "adaptive":
            threshold = amount * math.exp(-0.3 * (norm / mean - 1))
            threshold = min(max(threshold, amount * (1 - clip)), amount * (1 + clip))
        count, mass = 0, 0.0
        for gate in sorted(gates):
            if amount == 0 or mass > threshold:
                break
            mass += gate / sum(gates)
            count += 1
        counts.append(count)
    return counts


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_select_equals_a_slow_loop(selection: str, seed: int) -> None:
    shape = toy_shape(layers=4, experts=12)
    statistics = make_statistics(shape, seed, never=(5,))
    for amount in (0, 0.013, 0.05, 0.11, 0.2, 0.37, 0.5, 0.8, 0.97):
        chosen = selected(statistics, shape, amount, **{**PAPER, "selection": selection})
        assert [len(experts) for experts, _ in chosen] == slow_counts(statistics, shape, amount, selection, 0.2)
        for (experts, scores_E), layer in zip(chosen, shape.layers, strict=True):
            gates = statistics.layer(layer.name)["gate_sum"].tolist()
            assert experts == sorted(range(12), key=lambda e: (gates[e], e))[: len(experts)]
            assert scores_E.tolist() == pytest.approx([gate / sum(gates) for gate in gates])


@pytest.mark.parametrize("selection", SELECTIONS)
def test_more_amount_never_takes_fewer(selection: str) -> None:
    """As in Table 9: a larger threshold, a higher count; and what was taken stays taken."""
    shape = toy_shape(layers=4, experts=12)
    statistics = make_statistics(shape, 3)
    taken = [selected(statistics, shape, a / 40, **{**PAPER, "selection": selection}) for a in range(41)]
    for before, after in itertools.pairwise(taken):
        assert all(b[0] == a[0][: len(b[0])] for b, a in zip(before, after, strict=True))
    assert not any(experts for experts, _ in taken[0])
    if selection != "adaptive":
        assert all(len(experts) == 12 for experts, _ in taken[-1])


def test_sparse_routing_gives_more_experts_for_the_same_threshold() -> None:
    """Table 9: on a narrow task 38 of 64 experts carry 9 % of the gate mass, on a broad one 38 %."""
    shape = toy_shape(layers=1, experts=64, top_k=8)
    counts = []
    for steepness in (0.02, 0.05, 0.1, 0.2):
        mass = [math.exp(steepness * e) for e in range(64)]
        statistics = with_sums(shape, gate_sum=[mass], logit_norm=[1.0], tokens=[1.0])
        counts.append(len(selected(statistics, shape, 0.1, **PAPER)[0][0]))
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_loud_routers_protect_their_layer() -> None:
    """The same gates in every layer: the larger the router's output norm, the fewer experts go."""
    shape = toy_shape(layers=3, experts=64, top_k=8)
    statistics = with_sums(shape, gate_sum=[[1.0] * 64] * 3, logit_norm=[100.0, 200.0, 300.0], tokens=[10.0] * 3)
    adaptive = [len(experts) for experts, _ in selected(statistics, shape, 0.5, **PAPER)]
    assert adaptive == [38, 33, 28]  # 64 * 0.5 * (1.1618, 1, 0.8607) = 37.2, 32, 27.5 and one that exceeds
    uniform = [len(experts) for experts, _ in selected(statistics, shape, 0.5, **{**PAPER, "selection": "uniform"})]
    assert uniform == [33, 33, 33]
    average = [len(experts) for experts, _ in selected(statistics, shape, 0.5, **{**PAPER, "selection": "average"})]
    assert average == [32, 32, 32]


def test_norm_is_a_mean_over_tokens() -> None:
    shape = toy_shape(layers=2, experts=8)
    gates = [[1.0] * 8] * 2
    one = with_sums(shape, gate_sum=gates, logit_norm=[100.0, 300.0], tokens=[10.0, 10.0])
    two = with_sums(shape, gate_sum=gates, logit_norm=[1000.0, 300.0], tokens=[100.0, 10.0])
    first, second = ([len(e) for e, _ in selected(s, shape, 0.5, **PAPER)] for s in (one, two))
    assert first == second


def test_other_scores_rank_instead() -> None:
    shape = toy_shape(layers=1, experts=4)
    statistics = with_sums(shape, gate_sum=[[1, 2, 3, 4]], count=[[4, 3, 2, 1]], logit_norm=[1], tokens=[1])
    assert selected(statistics, shape, 0.5, **{**PAPER, "selection": "average"})[0][0] == [0, 1]
    assert selected(statistics, shape, 0.5, **{**PAPER, "selection": "average", "score": "frequency"})[0][0] == [3, 2]


def test_what_cannot_be_selected_by() -> None:
    shape = toy_shape(layers=1, experts=4)
    statistics = with_sums(shape, count=[[4, 3, 2, 1]])
    with pytest.raises(StatisticsError, match="has no statistic 'gate_sum'"):
        selected(statistics, shape, 0.5, **PAPER)
    with pytest.raises(OptionError, match="unknown criterion 'gates': did you mean 'gate'"):
        selected(statistics, shape, 0.5, **{**PAPER, "score": "gates"})


def test_eq_4_weights_by_hand() -> None:
    scores_E = torch.tensor([0.1, 0.2, 0.0, 0.6, 0.1], dtype=torch.float64)
    assert mass_weights(scores_E, [0, 3, 4]) == pytest.approx((0.125, 0.75, 0.125))
    assert mass_weights(scores_E, [2, 1]) == (0.0, 1.0)
    assert mass_weights(scores_E, [2]) == (1.0,)
    assert mass_weights(torch.zeros(5), [0, 2, 4, 1]) == (0.25,) * 4
