"""STUN: clusters of router rows under one threshold, of each the expert nearest to their mean, and duplicates that go unmissed."""

from __future__ import annotations

import pytest

import locum
from locum.measure.calibration import calibrate
from locum.methods.stun import STUN
from locum.models.sizes import shape_of
from locum.plans.plan import DROPPED, KEPT, LayerPlan
from making.groups import joined
from making.handmade import layers_of, make_statistics, tokens_of, toy_shape
from making.planted import IDS, TWINS, close, compressed, logits, with_twins
from making.slots import base_of

SHAPE = toy_shape()


def survivors(layer: LayerPlan) -> list[int]:
    assert all(slot in (KEPT, DROPPED) for slot in layer.slots)
    return list(layer.survivors)


def distances(statistics: object, name: str, together: float) -> list[list[float]]:
    named = statistics.layer(name)
    rows, both = named["router_product"].tolist(), named["co_count"].tolist()
    size = sum(rows[e][e] for e in range(16)) ** 0.5
    pairs = sum(both[i][j] for i in range(16) for j in range(16) if i != j)
    return [
        [
            max(0.0, rows[i][i] + rows[j][j] - 2 * rows[i][j]) ** 0.5 / size
            - (together * both[i][j] / pairs if i != j else 0)
            for j in range(16)
        ]
        for i in range(16)
    ]


@pytest.mark.parametrize("together", [0.0, 1.0])
@pytest.mark.parametrize("amount", [0.1, 0.4, 0.9])
def test_it_equals_a_slow_loop(together: float, amount: float) -> None:
    """Join over all layers the two clusters whose farthest members are nearest, then keep whose weights are nearest to the mean."""
    statistics = make_statistics(SHAPE, 0)
    far_L = [distances(statistics, layer.name, together) for layer in SHAPE.layers]
    joins = []
    for index, far in enumerate(far_L):
        for left in range(15, 1, -1):
            before, after = (joined(far, "complete", count) for count in (left + 1, left))
            new = next(set(c) for c in after if sorted(c) not in [sorted(b) for b in before])
            joins.append((max(far[i][j] for i in new for j in new if i != j) - min(map(min, far)), index))
    taken = [index for _, index in sorted(joins)[: int(amount * 14 * 3 + 1e-9)]]
    for index, layer in enumerate(layers_of(STUN(together=together), statistics, SHAPE, amount)):
        named = statistics.layer(layer.layer)
        product, counts = named["weight_product"].tolist(), named["count"].tolist()
        kept = []
        for cluster in joined(far_L[index], "complete", 16 - taken.count(index)):
            off = {e: product[e][e] - 2 * sum(product[e][m] for m in cluster) / len(cluster) for e in cluster}
            if len(cluster) == 2:
                off = {e: -counts[e] if together else -product[e][e] for e in cluster}
            kept.append(min(off, key=off.__getitem__))
        assert survivors(layer) == sorted(kept)


@pytest.mark.parametrize("together", [0.0, 1.0])
def test_duplicates_of_router_rows_and_weights_go_and_are_not_missed(together: float) -> None:
    """Mixtral's only gate is 1 whatever rows go, and rows that are all but equal select the same tokens."""
    model, method = with_twins(False, "mixtral", 1.0, 1e-5), STUN(together=together)
    before, shape = logits(model), shape_of(model)
    layers = layers_of(method, calibrate(model, tokens_of(IDS), needs=method.needs()), shape, 4 / 7)
    for layer in layers:
        assert [len(set(survivors(layer)) & set(twins)) for twins in TWINS.values()] == [1, 1]
        assert {4, 7} <= set(survivors(layer))
    assert close(compressed(model, layers), before)


def test_routers_in_groups_keep_their_rows() -> None:
    shape = toy_shape(layers=1, num_groups=4, min_per_group=2)
    (layer,) = layers_of(STUN(), make_statistics(shape), shape, 0.6)
    assert (
        len(layer.survivors) == 16
        and 16 - len({str(slot) if base_of(slot) is not None else e for e, slot in enumerate(layer.slots)}) == 9
    )
    assert all(base.weights == (1.0,) for base in layer.bases)


def test_weights_alone_plan_without_any_text(checkpoint) -> None:
    plan = locum.plan(checkpoint, method="stun", together=0.0, remove=0.25)
    assert locum.plan(checkpoint, method="stun", preset="paper", remove=0.25).layers == plan.layers
    assert plan.removed(locum.read_shape(checkpoint)) == 0.25
