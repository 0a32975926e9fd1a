"""Every registered criterion: a planted truth, a slow oracle, and one conformance suite for all, also for yours."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch

from criterion_cases import NEVER, ORACLES, SHAPE, D, E, Layer, T, usual
from criterion_planted import LOUD, PLANTED, PLANTED_ELSEWHERE, POPULAR
from locum.criteria.criterion import CRITERIA, criterion
from locum.errors import OptionError, StatisticsError
from locum.stats.definitions import STATISTICS
from locum.stats.events import HiddenGradientEvent, RoutedEvent
from locum.stats.sums import LayerStatistics

PAPER = r"arXiv \d{4}\.\d{5} \([^()]+\)|no paper \([^()]+\)"
ONCE = ("Needs:", "Shapes:", "Order:", "Raises:", "Source:")  # said by the decorator, or of all in criterion.py
ALL = tuple(CRITERIA)
OF_ROUTED = (RoutedEvent, HiddenGradientEvent)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ALL)
def test_equals_slow_loop(name: str, seed: int) -> None:
    layer = Layer(seed)
    assert name in ORACLES, f"criterion {name!r} has no oracle yet; write its formula in criterion_cases.py"
    expected_E = torch.tensor(ORACLES[name](layer), dtype=torch.float64)
    torch.testing.assert_close(CRITERIA[name](usual(seed)), expected_E, rtol=1e-5, atol=1e-6)


# --- planted truth: one expert is made best, one worst, in the sense of the criterion ------------------------------


@pytest.mark.parametrize("name", [name for name in ALL if name not in PLANTED_ELSEWHERE])
def test_finds_planted_best_and_worst(name: str) -> None:
    score_E = CRITERIA[name](PLANTED[name]().statistics())
    routed_E = score_E[:NEVER]
    assert int(score_E.argmax()) == 2 and int(routed_E.argmin()) == 3


def test_mone_finds_the_constant_expert_where_reap_does_not() -> None:
    layer = Layer(4)
    layer.out_TKD[layer.index_TK == 1] = torch.tensor([5.0, -5.0, 5.0, -5.0])
    statistics = layer.statistics()
    mone_E, reap_E = CRITERIA["mone"](statistics), CRITERIA["reap"](statistics)
    assert int(mone_E[:NEVER].argmin()) == 1 and mone_E[1] < 1e-3 * mone_E[:NEVER].median()
    assert int(reap_E.argmax()) == 1


def test_reap_keeps_the_rare_strong_expert_that_frequency_drops() -> None:
    layer = Layer(5, prefer_E=torch.tensor([0.0, 0.0, 0.0, -1.5, 0.0, 0.0]))
    layer.out_TKD[layer.index_TK == 3] *= 50
    statistics = layer.statistics()
    assert int(CRITERIA["reap"](statistics).argmax()) == 3
    assert int(CRITERIA["frequency"](statistics)[:NEVER].argmin()) == 3


def test_the_two_readings_of_ean_scale_differently_with_tokens() -> None:
    one = Layer(6).statistics()
    four = LayerStatistics(SHAPE, {name: 4 * tensor for name, tensor in one.items()})
    torch.testing.assert_close(CRITERIA["ean"](four), 4 * CRITERIA["ean"](one))
    torch.testing.assert_close(CRITERIA["ean_dims"](four), 2 * CRITERIA["ean_dims"](one))


@pytest.mark.parametrize(("mean", "total"), [("reap", "weighted_ean"), ("man", "ean")])
def test_means_times_frequency_are_sums(mean: str, total: str) -> None:
    layer = Layer(7).statistics()
    torch.testing.assert_close(CRITERIA[mean](layer) * CRITERIA["frequency"](layer), CRITERIA[total](layer))


def test_of_two_experts_that_always_work_together_the_less_used_one_goes_first() -> None:
    layer = Layer(1)  # 30 tokens select 0 and 1, 28 select 3 and 4, two select 2 and 3
    layer.index_TK[:] = torch.tensor([0, 1])
    layer.index_TK[:30] = torch.tensor([3, 4])
    layer.index_TK[:2] = torch.tensor([3, 2])
    most, least = (CRITERIA[name](layer.statistics()).tolist() for name in ("ecc_max", "ecc_min"))
    assert min(most[:2]) == 1 and most[4] == 2 and most[2] == 3 and most[NEVER] == 0
    assert least[2] == 1 and least[4] == 2 and least[NEVER] == 0


@pytest.mark.parametrize(("sharpness", "like"), [(0.1, "man"), (3.0, "reap")])
def test_mesa_leaves_gates_out_where_the_router_is_undecided(sharpness: float, like: str) -> None:
    layer = Layer(9)
    layer.logits_TE *= sharpness
    layer.gate_TK = layer.logits_TE.softmax(-1).gather(1, layer.index_TK)
    statistics = layer.statistics()
    share = float(statistics["router_entropy"]) / T / math.log(E)
    assert (share > 0.85) == (like == "man") and abs(share - 0.85) > 0.05
    torch.testing.assert_close(CRITERIA["mesa"](statistics), CRITERIA[like](statistics))


def test_outliers_are_counted_to_a_few_in_a_hundred_and_none_where_all_outputs_are_one() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.01, 1.0, 30.0]).repeat_interleave(20_000)[:, None]
    out_PD = torch.randn(60_000, D, generator=generator) * scale
    out_PD += torch.tensor([0.005, -2.0, 0.0]).repeat_interleave(20_000)[:, None]
    counts, expert_P = (20_000,) * 3, torch.arange(3).repeat_interleave(20_000)
    event = RoutedEvent(expert_P, torch.ones(60_000), out_PD, counts)
    shape = dataclasses.replace(SHAPE, num_experts=3)
    names = CRITERIA["eao"].needs
    layer = LayerStatistics(shape, {name: STATISTICS[name].increment(event) for name in names})
    expected = [float(((x - x.mean()).abs() > 3 * x.std()).sum()) for x in out_PD.double().chunk(3)]
    assert all(150 < count < 300 for count in expected)  # 0.27% of 80,000
    assert CRITERIA["eao"](layer).tolist() == pytest.approx(expected, rel=0.05)
    still = RoutedEvent(expert_P, torch.ones(60_000), torch.full_like(out_PD, 0.1), counts)
    layer = LayerStatistics(shape, {name: STATISTICS[name].increment(still) for name in names})
    assert CRITERIA["eao"](layer).tolist() == [0.0] * 3


def test_random_is_uniform_whatever_experts_are_worth_and_other_text_draws_anew() -> None:
    layers = [Layer(seed, prefer_E=POPULAR, scale_E=LOUD) for seed in range(400)]
    score_LE = torch.stack([CRITERIA["random"](layer.statistics())[:NEVER] for layer in layers])
    drawn = [score_L[score_L > 0] for score_L in score_LE.mT]  # the unpopular expert has no token in some layers
    assert len(torch.cat(drawn).unique()) == sum(map(len, drawn)) > 1600
    for score_L in drawn:
        assert abs(float(score_L.mean()) - 0.5) < 4 * 0.289 / math.sqrt(
            len(score_L)
        )  # 0.289: the spread of a uniform draw


def test_gate_is_a_share_of_the_layer() -> None:
    layer = Layer(8).statistics()
    for name in ("gate", "gate_softmax"):
        assert float(CRITERIA[name](layer).sum()) == pytest.approx(1)
    assert CRITERIA["gate"](layer)[NEVER] == 0 and CRITERIA["gate_softmax"](layer)[NEVER] > 0


# --- conformance: everything registered --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_gives_one_finite_float64_per_expert_every_time_the_same(name: str) -> None:
    layer = usual(1)
    before = {key: value.clone() for key, value in layer.items()}
    first_E, again_E = CRITERIA[name](layer), CRITERIA[name](layer)
    assert first_E.shape == (E,) and first_E.dtype == torch.float64 and bool(first_E.isfinite().all())
    assert torch.equal(first_E, again_E)
    first_E.zero_()  # a caller may write into a score without harm to the statistics
    assert all(torch.equal(before[key], layer[key]) for key in before)


@pytest.mark.parametrize("name", ALL)
def test_relabelled_experts_give_relabelled_scores(name: str) -> None:
    order = (3, 5, 0, 4, 1, 2)
    torch.testing.assert_close(CRITERIA[name](usual(2, order)), CRITERIA[name](usual(2))[list(order)])


@pytest.mark.parametrize("name", ALL)
def test_never_routed_expert_and_layer_without_tokens(name: str) -> None:
    layer = usual(2)
    if all(STATISTICS[need].event in OF_ROUTED or need == "tokens" for need in CRITERIA[name].needs):
        assert CRITERIA[name](layer)[NEVER] == 0
        assert bool((CRITERIA[name](layer) >= 0).all())
    empty = LayerStatistics(SHAPE, {key: torch.zeros_like(value) for key, value in layer.items()})
    assert CRITERIA[name](empty).tolist() == [0.0] * E


@pytest.mark.parametrize("name", ALL)
def test_reads_what_it_declares_and_nothing_else(name: str) -> None:
    layer, needs = usual(2), CRITERIA[name].needs
    CRITERIA[name](LayerStatistics(SHAPE, {need: layer[need] for need in needs}))
    for need in needs:
        with pytest.raises(StatisticsError, match=f"no statistic '{need}'"):
            CRITERIA[name](LayerStatistics(SHAPE, {other: layer[other] for other in needs if other != need}))


@pytest.mark.parametrize("name", ALL)
def test_nan_in_statistics_is_refused(name: str) -> None:
    layer = usual(2)
    broken = {key: value.clone() for key, value in layer.items()}
    for key, value in broken.items():
        if value.ndim and key != "count":  # counts are whole numbers whatever the model does
            value[1] = math.nan
    if CRITERIA[name].needs == CRITERIA["frequency"].needs:
        broken["count"][1] = math.nan
    with pytest.raises(StatisticsError, match=rf"{name!r} gives nan for expert \d of layer {SHAPE.name}"):
        CRITERIA[name](LayerStatistics(SHAPE, broken))


@pytest.mark.parametrize("name", ALL)
def test_docstring_and_paper(name: str) -> None:
    text = CRITERIA[name].score.__doc__
    assert "S_e = " in text and "Units: " in text
    assert [heading for heading in ONCE if heading in text] == []
    assert re.fullmatch(PAPER, CRITERIA[name].paper), "write the paper as in the other criteria"


def test_registering_twice_or_with_an_unknown_need_is_refused() -> None:
    with pytest.raises(OptionError, match="registered twice"):
        criterion("reap", paper="x", needs=("count",))(lambda layer: layer["count"])
    with pytest.raises(OptionError, match="did you mean 'count'"):
        criterion("fresh", paper="x", needs=("counts",))(lambda layer: layer["count"])
    assert "fresh" not in CRITERIA
