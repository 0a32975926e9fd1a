"""Passes that begin at a later layer, on a stack that counts what it computes; layers that leave something behind, or run twice, run again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from locum.models.known_layers import KnownLayers


class Layer(nn.Module):
    def __init__(self, ran: list[int], index: int) -> None:
        super().__init__()
        self.ran, self.index, self.scale = ran, index, 1.0 + index

    def forward(self, x: Tensor, said: dict[str, Tensor]) -> Tensor:
        self.ran.append(self.index)
        return self.scale * x + 1


class Telling(Layer):
    """Leaves what later layers read beside its output."""

    def forward(self, x: Tensor, said: dict[str, Tensor]) -> Tensor:
        if self.index == 0:
            said["first"] = x.sum()
        return super().forward(x, said) + said["first"]


class Writing(Layer):
    """Writes into what it is given."""

    def forward(self, x: Tensor, said: dict[str, Tensor]) -> Tensor:
        return x.copy_(super().forward(x, said)).clone()


class Model:
    def __init__(self, kind: type[Layer] = Layer, order: tuple[int, ...] = (0, 1, 2, 3)) -> None:
        self.ran: list[int] = []
        self.layers, self.order = [kind(self.ran, i) for i in range(4)], order

    def __call__(self) -> Tensor:
        x, said = torch.ones(3), {}
        for index in self.order:
            x = self.layers[index](x, said)
        return x


def begun(model: Model, known: KnownLayers, first: int) -> tuple[Tensor, list[int]]:
    """What a pass gives after something changed in the layer, and which layers it ran."""
    known.try_beginning(0, model, first)
    model.layers[first].scale += 5
    model.ran.clear()
    result = known.run(0, model, first)
    ran = model.ran.copy()
    assert torch.equal(result, model())
    model.layers[first].scale -= 5
    return result, ran


@pytest.mark.parametrize("first", range(4))
def test_layers_before_the_first_do_not_run(first):
    model = Model()
    known = KnownLayers(model.layers)
    assert torch.equal(known.record(0, model), model())
    assert begun(model, known, first)[1] == [*range(first, 4)]
    assert not any("forward" in vars(layer) for layer in model.layers)


@pytest.mark.parametrize(
    "model", [Model(Telling), Model(Writing), Model(order=(0, 1, 1, 2, 3)), Model(order=(1, 0, 2, 3))]
)
def test_what_leaves_more_than_its_output_or_runs_otherwise_runs_again(model):
    known = KnownLayers(model.layers)
    known.record(0, model)
    assert begun(model, known, 2)[1] == [*model.order]


def test_a_batch_that_was_not_recorded_runs_whole():
    model = Model()
    known = KnownLayers(model.layers)
    known.record(0, model)
    known.try_beginning(0, model, 2)
    model.ran.clear()
    assert torch.equal(known.run(1, model, 2), model())
    assert model.ran == [0, 1, 2, 3] * 2


def test_a_forward_of_its_own_comes_back_after_an_interrupt():
    model = Model()
    known = KnownLayers(model.layers)
    known.record(0, model)
    known.try_beginning(0, model, 3)
    own = model.layers[0].forward = lambda x, said: x

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        known.run(0, interrupted, 3)
    assert vars(model.layers[0])["forward"] is own
    assert not any("forward" in vars(layer) for layer in model.layers[1:])
