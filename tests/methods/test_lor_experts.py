"""LorExperts: clusters of what is selected together, the busiest of each whole, and the rest exact where they differ in little."""

from __future__ import annotations

import pytest
import torch

from locum.experts.weights import permute_hidden
from locum.measure.calibration import calibrate
from locum.methods.lor_experts import LorExperts
from locum.models.families import find_layers
from locum.models.sizes import shape_of
from locum.plans.plan import KEPT, make_plan, stand_in
from making.groups import joined
from making.handmade import layers_of, make_statistics, tokens_of, toy_shape
from making.planted import IDS, close, compressed, copy_of, edit, logits
from making.slots import base_of
from making.tiny_models import tiny_model

SHAPE = toy_shape()


@pytest.mark.parametrize("align", [True, False])
def test_it_equals_a_slow_loop(align: bool) -> None:
    statistics = make_statistics(SHAPE, 3)
    for amount in (0.2, 0.7, 1.0):
        for layer in layers_of(LorExperts(align=align, rank=8), statistics, SHAPE, amount):
            named = statistics.layer(layer.layer)
            both, count = named["co_count"].tolist(), named["count"].tolist()
            far = [
                [1 - both[i][j] / (count[i] * count[j]) ** 0.5 if i != j else 0.0 for j in range(16)] for i in range(16)
            ]
            clusters = [sorted(c) for c in joined(far, "average", 16 - int(amount * 15 + 1e-9))]
            for members in clusters:
                busiest = max(members, key=lambda e: count[e])
                if len(members) == 1:
                    assert layer.slots[busiest] == KEPT
                    continue
                index = base_of(layer.slots[busiest])
                base = layer.bases[index]
                assert dict(zip(base.experts, base.weights, strict=True))[busiest] == 1 and sum(base.weights) == 1
                assert list(base.experts) == (members if align else [busiest]) and base.align == align
                for e in members:
                    rest = stand_in(base=index, rank=8, start="whitened")
                    assert layer.slots[e] == (stand_in(base=index) if e == busiest else rest)


@pytest.mark.parametrize(
    ("start", "align", "exact"), [("svd", True, True), ("whitened", True, True), ("svd", False, False)]
)
def test_what_differs_in_one_direction_is_kept_whole(start: str, align: bool, exact: bool) -> None:
    """Every expert is one expert and a multiple of one matrix of rank 1, its hidden units shuffled."""
    model = tiny_model("olmoe")
    for number, layer in enumerate(find_layers(model)):
        first, second = copy_of(layer, 0), copy_of(layer, 1)
        for e in range(8):
            apart = second.map(lambda _, w, e=e: 0.3 * e * w[:, :1] @ w[:1] / w.norm())
            made = first.map(lambda name, w, apart=apart: w + getattr(apart, name))
            order = torch.randperm(made.up_FD.shape[0], generator=torch.Generator().manual_seed(100 * number + e))
            edit(layer, {e: permute_hidden(made, order)})
    before, shape, method = logits(model), shape_of(model), LorExperts(rank=2, start=start, align=align)
    statistics = calibrate(model, tokens_of(IDS), needs=method.needs())
    layers = layers_of(method, statistics, shape, 1.0)
    assert {len(layer.bases) for layer in layers} == {1} and make_plan(shape, layers).removed(shape) > 0.5
    assert close(compressed(model, layers, statistics), before, 1e-4) == exact


def test_a_layer_that_would_not_get_smaller_stays_whole() -> None:
    layers = layers_of(LorExperts(rank=128), make_statistics(SHAPE), SHAPE, 1.0)
    assert all(layer.is_identity for layer in layers)
