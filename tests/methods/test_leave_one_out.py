"""Leave one out: what it asks of the model, and that other methods can read what it found."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from locum.errors import StatisticsError
from locum.methods.leave_one_out import LeaveOneOut
from locum.methods.prune import Prune
from locum.shapes import ModelShape
from locum.stages.searching import with_found
from making.handmade import layers_of, make_statistics, toy_shape

WORTH = torch.tensor([0.5, -0.1, 0.3, 0.0, 2.0, 0.2])


@dataclass
class Additive:
    """A model whose loss grows by what each missing expert is worth, and faster in the second layer."""

    shape: ModelShape
    asked: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)

    def loss_increase(self, layer: str, removed_CE: Tensor) -> Tensor:
        self.asked += [(layer, tuple(row.nonzero().flatten().tolist())) for row in removed_CE]
        scale = 1 + 9 * [x.name for x in self.shape.layers].index(layer)
        return torch.stack([scale * WORTH[row].sum() for row in removed_CE]).double()


def test_each_expert_is_tried_alone_and_then_more_and_more_of_those_that_are_missed_least() -> None:
    shape = toy_shape(layers=2, experts=6, top_k=2, d=16, f=8)
    model = Additive(shape)
    found = LeaveOneOut().explore(model, lambda *_: None)
    first = [members for layer, members in model.asked if layer == shape.layers[0].name]
    assert first[:6] == [(e,) for e in range(6)]
    assert first[6:] == [(1,), (1, 3), (1, 3, 5), (1, 2, 3, 5)]  # 2 of 6 stay, for top-k
    (one, two) = (found[layer.name] for layer in shape.layers)
    torch.testing.assert_close(one["removal_loss"], WORTH.double())
    torch.testing.assert_close(one["loss_curve"], torch.tensor([-0.1, -0.1, 0.1, 0.4, 0.4, 0.4], dtype=torch.float64))
    torch.testing.assert_close(two["removal_loss"], 10 * WORTH.double())
    assert set(LeaveOneOut(curve=False).explore(Additive(shape), lambda *_: None)[shape.layers[0].name]) == {
        "removal_loss"
    }


def test_plans_take_where_the_loss_grows_least_and_other_methods_read_the_same_file() -> None:
    shape = toy_shape(layers=2, experts=6, top_k=2, d=16, f=8)
    statistics = with_found(make_statistics(shape), LeaveOneOut().explore(Additive(shape), lambda *_: None))
    dropped = [
        [e for e, slot in enumerate(layer.slots) if not slot.survives]
        for layer in layers_of(LeaveOneOut(), statistics, shape, 5 / 8)
    ]
    assert dropped == [
        [1, 3, 5],
        [1, 3],
    ]  # 0.1 and -1 nats; one more of the first layer would cost 0.3, of the second 2
    same = layers_of(Prune(score="removal_loss", budget="measured"), statistics, shape, 5 / 8)
    assert [[e for e, slot in enumerate(layer.slots) if not slot.survives] for layer in same] == dropped
    for layer in statistics.layers.values():
        del layer["loss_curve"]
    with pytest.raises(StatisticsError, match=r"no statistic 'loss_curve'.*locum search"):
        layers_of(LeaveOneOut(), statistics, shape, 0.5)
    assert layers_of(LeaveOneOut(budget="uniform"), statistics, shape, 0.5)


def test_groups_go_together_and_a_layer_that_can_spare_none_is_not_asked() -> None:
    grouped = toy_shape(layers=1, experts=6, top_k=2, num_groups=2, min_per_group=1)
    model = Additive(grouped)
    found = LeaveOneOut().explore(model, lambda *_: None)[grouped.layers[0].name]
    assert [members for _, members in model.asked][6:] == [(1, 3), (1, 2, 3, 5)]
    torch.testing.assert_close(found["loss_curve"], torch.tensor([-0.1, -0.1, 0.4, 0.4, 0.4, 0.4], dtype=torch.float64))
    tight = toy_shape(layers=1, experts=6, top_k=6)
    model = Additive(tight)
    found = LeaveOneOut().explore(model, lambda *_: None)[tight.layers[0].name]
    assert model.asked == [] and found["removal_loss"].tolist() == found["loss_curve"].tolist() == [0.0] * 6
