"""DEK: groups by CKA, which sees what experts know and not how they say it, and duplicates are merged without loss."""

from __future__ import annotations

import pytest
import torch

from locum.measure.calibration import calibrate
from locum.methods.dek import DEK, similarity
from locum.models.sizes import shape_of
from locum.plans.plan import make_plan
from locum.stats.definitions import STATISTICS
from locum.stats.events import EveryExpertEvent
from making.groups import assert_weights, groups_of, joined
from making.handmade import layers_of, make_statistics, tokens_of, toy_shape, with_sums
from making.planted import IDS, TWINS, close, compressed, logits, with_twins

SHAPE = toy_shape()


@pytest.mark.parametrize("alike", ["outputs", "weights"])
def test_it_equals_a_slow_loop(alike: str) -> None:
    statistics = make_statistics(SHAPE, 3)
    for amount in (0.1, 0.5, 1.0):
        for layer in layers_of(DEK(alike=alike), statistics, SHAPE, amount):
            named = statistics.layer(layer.layer)
            product = named["output_hsic" if alike == "outputs" else "weight_product"].tolist()
            far = [
                [1 - product[i][j] / (product[i][i] * product[j][j]) ** 0.5 if i != j else 0.0 for j in range(16)]
                for i in range(16)
            ]
            clusters = joined(far, "average", 16 - int(amount * 15 + 1e-9))
            assert groups_of(layer) == sorted(tuple(sorted(cluster)) for cluster in clusters)
            assert_weights(layer, named["count"].tolist())


def test_cka_is_1_for_what_is_turned_scaled_and_shifted_and_near_0_for_what_is_not_related() -> None:
    generator = torch.Generator().manual_seed(0)
    out_TD = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    turn_DD = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    other_TD = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    outputs = [out_TD, 3 * out_TD @ turn_DD + 7, other_TD, torch.full_like(out_TD, 2.0)]
    hsic_EE = STATISTICS["output_hsic"].increment(EveryExpertEvent(torch.stack(outputs, dim=1)))
    shape = toy_shape(layers=1, experts=4, d=5, f=3)
    cka_EE = similarity(with_sums(shape, output_hsic=[hsic_EE]).layer(shape.layers[0].name))
    assert cka_EE[0, 1] == pytest.approx(1) and abs(float(cka_EE[0, 2])) < 0.15
    assert cka_EE[3, :3].abs().max() < 1e-6  # a constant knows nothing; of itself, rounding may say anything


@pytest.mark.parametrize("alike", ["outputs", "weights"])
def test_duplicates_are_merged_without_loss(alike: str) -> None:
    model, method = with_twins(permuted=False), DEK(alike=alike)
    before, shape = logits(model), shape_of(model)
    layers = layers_of(method, calibrate(model, tokens_of(IDS), needs=method.needs()), shape, 4 / 7)
    for layer in layers:
        assert sorted(base.experts for base in layer.bases) == sorted(TWINS.values())
    assert make_plan(shape, layers).removed(shape) == 0.5
    assert close(compressed(model, layers), before)
