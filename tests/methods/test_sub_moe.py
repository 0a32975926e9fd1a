"""Sub-MoE: clusters by the direction of outputs, merged by a mean that is the union of subspaces, without loss for duplicates."""

from __future__ import annotations

import pytest
import torch

from locum.measure.calibration import calibrate
from locum.methods.sub_moe import SubMoE
from locum.models.sizes import shape_of
from locum.plans.plan import make_plan
from making.groups import assert_weights, groups_of, joined
from making.handmade import layers_of, make_statistics, tokens_of, toy_shape
from making.planted import IDS, TWINS, close, compressed, logits, with_twins

SHAPE = toy_shape()


@pytest.mark.parametrize("linkage", ["average", "single", "complete"])
def test_it_equals_a_slow_loop(linkage: str) -> None:
    statistics = make_statistics(SHAPE, 3)
    for amount in (0.1, 0.4, 0.8, 1.0):
        for layer in layers_of(SubMoE(linkage=linkage), statistics, SHAPE, amount):
            named = statistics.layer(layer.layer)
            far = [[1 - value / float(named["tokens"]) for value in row] for row in named["output_cosine"].tolist()]
            clusters = joined(far, linkage, 16 - int(amount * 15 + 1e-9))
            assert groups_of(layer) == sorted(tuple(sorted(cluster)) for cluster in clusters)
            assert_weights(layer, named["count"].tolist())


def test_the_union_of_subspaces_gives_the_weighted_mean() -> None:
    """Sub-MoE's U S (sum f V)^T with every direction kept is sum f W, whatever the weights."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(5, 7, generator=generator).double() for _ in range(3)]
    u, s, v = torch.linalg.svd(torch.cat(weights, dim=1), full_matrices=False)
    share = (0.5, 0.3, 0.2)
    v_merged = sum(f * part for f, part in zip(share, v.split(7, dim=1), strict=True))
    torch.testing.assert_close(u @ torch.diag(s) @ v_merged, sum(f * w for f, w in zip(share, weights, strict=True)))


def test_duplicates_are_merged_without_loss() -> None:
    model, method = with_twins(permuted=False), SubMoE()
    before, shape = logits(model), shape_of(model)
    layers = layers_of(method, calibrate(model, tokens_of(IDS), needs=method.needs()), shape, 4 / 7)
    for layer in layers:
        assert sorted(base.experts for base in layer.bases) == sorted(TWINS.values())
    assert make_plan(shape, layers).removed(shape) == 0.5
    assert close(compressed(model, layers), before)
