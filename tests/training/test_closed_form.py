"""Least squares of what a layer's output is linear in: what they find, and where they leave everything as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from locum.models.families import find_layers
from locum.models.sizes import shape_of
from locum.plans.plan import KEPT, LayerPlan, make_plan, stand_in
from locum.training.closed_form import STRENGTHS, LinearFit, Sums, chosen
from locum.training.context import Context, Original
from locum.training.options import make_recovery
from making.tiny_models import tiny_model
from making.training import compressed, light

FAMILIES = ("olmoe", "deepseek_v3", "gpt_oss")
BATCHES = 8


def opened(model, plan, original):
    """The container of the first layer in training, its block, and the original's block."""
    context = Context(model, plan, 1, 0, Original.of(original))
    make_recovery({"how": "layerwise"}).way.prepare(context, 0)
    return context.layers[0].container, find_layers(model)[0].block, find_layers(original)[0].block


def given(hidden, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 64, hidden, generator=generator), torch.ones(4, 64, dtype=torch.bool)


def fitted(container, block, teacher, hidden):
    fit = LinearFit(container, block, teacher, BATCHES)
    with torch.no_grad():
        for number in range(BATCHES):
            inputs, mask = given(hidden, number)
            with fit.watching(number, mask):
                block(inputs)
        fit.finish()
    return fit


def error(block, teacher, hidden):
    """The squared error on inputs that no fit has seen."""
    first = lambda output: output if isinstance(output, torch.Tensor) else output[0]  # noqa: E731
    with torch.no_grad():
        pairs = [(first(block(x)), first(teacher(x))) for x, _ in (given(hidden, 100 + i) for i in range(4))]
    return sum(float((ours - theirs).double().square().sum()) for ours, theirs in pairs)


def test_sums_give_ridge_regression():
    """Against the stacked system that ridge regression is, solved by least squares."""
    generator = torch.Generator().manual_seed(0)
    phi, target, near = (torch.randn(*shape, generator=generator).double() for shape in ((40, 6), (40, 3), (6, 3)))
    sums = Sums(6, 3, torch.device("cpu"))
    for rows in (slice(0, 15), slice(15, 40)):
        sums.add(phi[rows], target[rows])
    for strength in STRENGTHS:
        pull = (strength * phi.square().sum(dim=0).mean()).sqrt()
        stacked, right = torch.cat([phi, pull * torch.eye(6).double()]), torch.cat([target, pull * near])
        expected = torch.linalg.lstsq(stacked, right).solution
        torch.testing.assert_close(sums.solved(near, strength), expected)
        assert sums.error(expected) == pytest.approx(float((target - phi @ expected).square().sum()))


def test_the_strength_is_that_of_the_batches_that_were_held_out():
    """Few noisy tokens for many numbers: little pull fits the noise, and theta as it was is kept where nothing is better."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(20, 4, generator=generator).double()

    def sums(tokens, noise):
        made, phi = Sums(20, 4, torch.device("cpu")), torch.randn(tokens, 20, generator=generator).double()
        made.add(phi, phi @ truth + noise * torch.randn(tokens, 4, generator=generator).double())
        return made

    noisy, held_out = sums(22, 2.0), sums(500, 0.0)
    assert torch.equal(chosen(noisy, held_out, truth), truth)
    near = truth + 0.5 * torch.randn(20, 4, generator=generator).double()
    found = chosen(noisy, held_out, near)
    assert held_out.error(found) < min(held_out.error(noisy.solved(near, STRENGTHS[0])), held_out.error(near))


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_and_constants_that_noise_was_put_on_are_found_again(family):
    """The layer is the teacher too, so that an error of nothing is to be had."""
    original = tiny_model(family)
    shapes = shape_of(original)
    hidden = shapes.layers[0].hidden_size

    def slots(count):
        kinds = [stand_in(rank=4, start="svd"), stand_in(constant=True)]
        return tuple(KEPT if e < count // 2 else kinds[e % 2] for e in range(count))

    plan = make_plan(shapes, [LayerPlan(layer.name, slots(layer.num_experts)) for layer in shapes.layers])
    small = compressed(original, plan)
    container, block, _ = opened(copy.deepcopy(small), plan, original)
    generator = torch.Generator().manual_seed(1)
    fit = LinearFit(container, block, find_layers(small)[0].block, BATCHES)
    assert len(fit.leaves) == 2  # adapters of one rank, also those of kept experts, and constants
    for leaf in fit.leaves:
        leaf.add_(torch.randn(leaf.shape, generator=generator))
    before = error(block, find_layers(small)[0].block, hidden)
    fitted(container, block, find_layers(small)[0].block, hidden)
    assert error(block, find_layers(small)[0].block, hidden) < 1e-4 * before


def test_a_layer_comes_nearer_to_the_original():
    """On inputs that it was not fitted to."""
    original = tiny_model("olmoe")
    plan = light(original)
    container, block, teacher = opened(compressed(original, plan), plan, original)
    hidden = shape_of(original).layers[0].hidden_size
    before = error(block, teacher, hidden)
    fitted(container, block, teacher, hidden)
    assert error(block, teacher, hidden) < 0.95 * before


def test_batches_without_loss_say_nothing():
    original = tiny_model("olmoe")
    plan = light(original)
    container, block, teacher = opened(compressed(original, plan), plan, original)
    fit = LinearFit(container, block, teacher, BATCHES)
    inputs, mask = given(shape_of(original).layers[0].hidden_size, 0)
    before = [parameter.clone() for parameter in container.parameters()]
    with torch.no_grad():
        for number in range(BATCHES):
            with fit.watching(number, torch.zeros_like(mask)):
                block(inputs)
        fit.finish()
    assert all(torch.equal(one, two) for one, two in zip(before, container.parameters(), strict=True))


def test_a_layer_that_is_not_linear_stays_as_it_was():
    original = tiny_model("olmoe")
    plan = light(original)
    container, block, teacher = opened(compressed(original, plan), plan, original)
    hidden = shape_of(original).layers[0].hidden_size
    before = [parameter.clone() for parameter in container.parameters()]
    fit = fitted(container, nn.Sequential(block, nn.RMSNorm(hidden)), teacher, hidden)
    assert not fit.is_linear
    assert all(torch.equal(one, two) for one, two in zip(before, container.parameters(), strict=True))
