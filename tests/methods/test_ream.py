"""REAM: the most salient experts take in those most like them, rows go or stay, and duplicates are merged without loss."""

from __future__ import annotations

import itertools

import pytest

from locum.measure.calibration import calibrate
from locum.methods.ream import REAM
from locum.models.sizes import shape_of
from locum.plans.plan import DROPPED, KEPT, stand_in
from making.groups import assert_weights
from making.handmade import layers_of, make_statistics, tokens_of, toy_shape
from making.planted import IDS, TWINS, close, compressed, logits, with_twins

SHAPE = toy_shape()


@pytest.mark.parametrize("rows", ["dropped", "kept"])
def test_ream_equals_a_slow_loop(rows: str) -> None:
    """Pseudo-pruning, straight from its code: the most salient centroid fills its group first."""
    statistics = make_statistics(SHAPE, 2)
    for amount, size in itertools.product((0.2, 0.6, 1.0), (3, 16)):
        for layer in layers_of(REAM(group_size=size, rows=rows), statistics, SHAPE, amount):
            named = statistics.layer(layer.layer)
            logits, outputs = named["logit_cosine"] / named["samples"], named["output_cosine"] / named["tokens"]
            reap = (named["gated_output_norm"] / named["count"].clamp(min=1)).tolist()
            count = int(amount * (14 if rows == "dropped" else 15) + 1e-9)
            centroids = sorted(range(16), key=lambda e: -reap[e])[: 16 - count]
            owner: dict[int, int] = {c: c for c in centroids}
            for c in centroids:
                close = sorted(range(16), key=lambda e: -float(logits[c, e] + outputs[c, e]))
                free = [e for e in close if e not in owner][: max(size, -(-16 // len(centroids))) - 1]
                owner |= dict.fromkeys(free, c)
            groups = [tuple(e for e in range(16) if owner[e] == c) for c in centroids]
            assert sorted(base.experts for base in layer.bases) == sorted(g for g in groups if len(g) > 1)
            assert_weights(layer, reap)
            for c, group in zip(centroids, groups, strict=True):
                head = KEPT if len(group) == 1 else stand_in(base=[b.experts for b in layer.bases].index(group))
                assert layer.slots[c] == head
                assert {layer.slots[e] for e in group if e != c} <= {DROPPED if rows == "dropped" else head}


@pytest.mark.parametrize("rows", ["dropped", "kept"])
@pytest.mark.parametrize("permuted", [False, True])
def test_the_most_salient_take_in_their_duplicates_without_loss(rows: str, permuted: bool) -> None:
    """Mixtral's only gate is 1 whatever rows go; the originals are the most salient, so they choose first."""
    model, method = with_twins(permuted, "mixtral", 4.0, 1e-5), REAM(score="gate", group_size=3, rows=rows)
    before, shape = logits(model), shape_of(model)
    statistics = calibrate(model, tokens_of(IDS), needs=method.needs())
    layers = layers_of(method, statistics, shape, 4 / 7)
    for layer in layers:
        assert sorted(base.experts for base in layer.bases) == sorted(TWINS.values())
        assert len(layer.survivors) == (4 if rows == "dropped" else 8)
    assert close(compressed(model, layers), before)
