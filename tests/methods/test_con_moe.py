"""ConMoE: slots lead to the prototype most like them, and duplicates are not missed."""

from __future__ import annotations

import pytest

from locum.measure.calibration import calibrate
from locum.methods.con_moe import ConMoE
from locum.models.sizes import shape_of
from locum.plans.plan import KEPT, make_plan
from making.handmade import layers_of, make_statistics, tokens_of, toy_shape
from making.planted import IDS, TWINS, close, compressed, logits, with_twins
from making.slots import base_of

SHAPE = toy_shape()


@pytest.mark.parametrize("amount", [0.1, 0.4, 0.8, 1.0])
def test_con_moe_equals_a_slow_loop(amount: float) -> None:
    statistics = make_statistics(SHAPE, 1)
    for alike, name in (("routing", "logit_cosine"), ("outputs", "output_cosine"), ("weights", "weight_product")):
        for layer in layers_of(ConMoE(alike=alike), statistics, SHAPE, amount):
            named = statistics.layer(layer.layer)
            size = [float(named[name][e, e]) ** 0.5 if alike == "weights" else 1.0 for e in range(16)]
            reap = (named["gated_output_norm"] / named["count"]).tolist()
            prototypes = sorted(range(16), key=lambda e: -reap[e])[: 16 - int(amount * 15 + 1e-9)]
            for e, slot in enumerate(layer.slots):
                leads_to = e if slot == KEPT else layer.bases[base_of(slot)].experts[0]
                likeness = [float(named[name][e, p]) / size[p] for p in prototypes]
                assert leads_to == (e if e in prototypes else prototypes[likeness.index(max(likeness))])


@pytest.mark.parametrize("alike", ["routing", "outputs", "weights"])
def test_remapping_duplicates_to_one_of_them_changes_nothing(alike: str) -> None:
    model, method = with_twins(permuted=False), ConMoE(score="gate", alike=alike)
    before, shape = logits(model), shape_of(model)
    layers = layers_of(method, calibrate(model, tokens_of(IDS), needs=method.needs()), shape, 4 / 7)
    for layer in layers:
        aliases = [[e for e in range(8) if layer.slots[e] == layer.slots[base.experts[0]]] for base in layer.bases]
        assert sorted(map(tuple, aliases)) == sorted(TWINS.values()) and {base.weights for base in layer.bases} == {
            (1.0,)
        }
    assert make_plan(shape, layers).removed(shape) == 0.5
    assert close(compressed(model, layers), before)
