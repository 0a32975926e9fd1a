"""Super Experts: found where one is planted, nowhere else, and kept by default."""

from __future__ import annotations

import statistics as plain

import pytest
import torch

from locum.criteria.super_experts import find_super_experts, super_experts
from locum.errors import StatisticsError
from locum.measure.calibration import calibrate
from locum.methods.mone import MoNE
from locum.methods.prune import Prune
from locum.models.families import find_layers
from locum.models.sizes import shape_of
from making.handmade import layers_of, make_statistics, restrict, tokens_of, toy_shape
from making.tiny_models import tiny_ids, tiny_model


def slow(peaks: list[list[float]]) -> list[set[int]]:
    """The rule with plain lists: quantile by linear interpolation, tenth of the largest, ten medians, three quarters."""
    every = sorted(p for layer in peaks for p in layer)
    place = 0.995 * (len(every) - 1)
    low = int(place)
    high = min(low + 1, len(every) - 1)
    quantile = every[low] + (place - low) * (every[high] - every[low])
    lower_median = every[(len(every) - 1) // 2]
    least = max(quantile, every[-1] / 10, 10 * lower_median)
    assert plain.median_low(every) == lower_median
    return [
        {e for e, p in enumerate(layer) if p > least} if i < max(1, len(peaks) * 3 // 4) else set()
        for i, layer in enumerate(peaks)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_equals_a_slow_loop_with_planted_peaks(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    peak_LE = torch.rand(8, 64, generator=generator, dtype=torch.float64) + 0.5
    peak_LE[2, 7], peak_LE[5, 9], peak_LE[7, 1], peak_LE[4, 4] = 400.0, 300.0, 500.0, 20.0
    found = find_super_experts(list(peak_LE))
    assert found == slow(peak_LE.tolist())
    assert found[2] == {7} and found[5] == {9}
    assert found[7] == set() and found[4] == set()  # too deep in the model; below a tenth of the largest


def test_a_model_whose_experts_are_alike_has_none() -> None:
    peak_LE = torch.rand(4, 16, generator=torch.Generator().manual_seed(0)) + 1
    assert find_super_experts(list(peak_LE)) == [set()] * 4
    assert find_super_experts([torch.zeros(8)] * 2) == [set()] * 2


def test_an_expert_of_a_real_model_that_is_made_massive_is_found_and_kept() -> None:
    model = tiny_model("olmoe")
    layer = find_layers(model)[0]
    tokens = tokens_of(tiny_ids(4, 16))
    needs = (*Prune(score="frequency").needs(), *MoNE(score="frequency").needs())
    assert super_experts(calibrate(model, tokens, needs=needs), shape_of(model)) == [set()] * len(find_layers(model))
    rarest = int(calibrate(model, tokens, needs=("count",)).layer(layer.shape.name)["count"][:-1].argmin())
    with torch.no_grad():
        layer.experts.down_proj[rarest] *= 1000
    seen, shape = calibrate(model, tokens, needs=needs), shape_of(model)
    if seen.layer(layer.shape.name)["count"][rarest] == 0:
        pytest.fail("the planted expert is never routed; plant another")
    assert super_experts(seen, shape)[0] == {rarest}
    for method in (Prune, MoNE):
        kept, open_ = (
            layers_of(method(score="frequency", protect=protect), seen, shape, 1.0)[0].slots[rarest].is_kept
            for protect in (True, False)
        )
        assert kept and not open_


def test_statistics_without_peaks_name_the_way_out() -> None:
    shape = toy_shape()
    few = restrict(make_statistics(shape), ("count",))
    with pytest.raises(StatisticsError, match="no statistic 'output_peak'"):
        layers_of(Prune(score="frequency"), few, shape, 0.5)
    assert layers_of(Prune(score="frequency", protect=False), few, shape, 0.5)
