"""Layer-wise distillation: what it must reach, what it must leave alone, and that it works on every shape of block."""

from __future__ import annotations

import copy

import pytest
import torch

from locum.data.tokens import batches
from locum.errors import OptionError
from locum.models.families import find_layers
from locum.models.sizes import shape_of
from locum.plans.plan import KEPT, LayerPlan, make_plan, stand_in
from locum.training.context import Context, Original
from locum.training.options import make_recovery
from locum.training.recovery import recover_model
from making.tiny_models import tiny_model
from making.training import compressed, light, tiny_tokens

FAMILIES = ("olmoe", "qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss", "qwen3_moe")


def loss_of(model, plan, original) -> float:
    """The way's loss on a batch."""
    chosen = make_recovery({"how": "layerwise"})
    context = Context(copy.deepcopy(model), plan, 1, 0, Original.of(original))
    chosen.way.prepare(context, 0)
    return float(chosen.way.loss(context, next(batches(tiny_tokens(), 4)))[0].detach())


def recovered(model, plan, original, **options):
    given = {"how": "layerwise", "steps": 40, "batch_size": 4, "learning_rate": 1e-2, "warmup_fraction": 0.0}
    options = make_recovery({**given, "validate_every": 0, "checkpoint_every": 0, **options})
    return recover_model(model, plan, tiny_tokens(), None, options, Original.of(original))[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_come_nearer_to_those_of_the_original(family):
    original = tiny_model(family)
    plan = light(original)
    small = compressed(original, plan)
    before = loss_of(small, plan, original)
    assert loss_of(recovered(copy.deepcopy(small), plan, original), plan, original) < 0.7 * before


def test_what_adapters_can_make_good_is_made_good():
    """Adapters of full rank that were the original's weights before noise was put on them."""
    original = tiny_model("olmoe", num_hidden_layers=1)
    (shape,) = shape_of(original).layers
    plan = make_plan(shape_of(original), [LayerPlan(shape.name, (KEPT,) * 6 + (stand_in(rank=16, start="svd"),) * 2)])
    small, generator = compressed(original, plan), torch.Generator().manual_seed(0)
    assert loss_of(small, plan, original) < 1e-6
    with torch.no_grad():
        for parameter in find_layers(small)[0].experts.stack("adapters.0").parameters():
            parameter.add_(0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    before = loss_of(small, plan, original)
    assert loss_of(recovered(small, plan, original, steps=120, schedule="cosine"), plan, original) < 0.1 * before


def test_a_layer_that_the_plan_left_alone_stays_to_the_bit():
    original = tiny_model("olmoe")
    first, *rest = light(original).layers
    plan = make_plan(shape_of(original), [LayerPlan(first.layer, (KEPT,) * 8), *rest])
    model = recovered(compressed(original, plan), plan, original, steps=3)
    before, after = (find_layers(m)[0].experts.state_dict() for m in (original, model))
    assert all(torch.equal(before[name], after[name]) for name in before)
    changed = find_layers(model)[1].experts.state_dict()
    assert any("adapter" in name for name in changed)


@pytest.mark.parametrize("routers", [False, True])
def test_routers_are_trained_when_asked_for(routers):
    original = tiny_model("olmoe")
    plan = light(original)
    model = recovered(compressed(original, plan), plan, original, steps=3, routers=routers)
    same = [
        torch.equal(a.router.weight, b.router.weight) for a, b in zip(*map(find_layers, (original, model)), strict=True)
    ]
    assert same == [not routers] * 2


def test_the_model_runs_as_ever_after_an_error():
    original = tiny_model("olmoe")
    plan = light(original)
    context = Context(compressed(original, plan), plan, 1, 0, Original.of(original))
    way = make_recovery({"how": "layerwise"}).way
    way.prepare(context, 0)
    find_layers(context.original.model)[1].block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        way.loss(context, next(batches(tiny_tokens(), 2)))
    assert all("forward" not in layer.block.__dict__ for layer in find_layers(context.model))


def test_the_wrong_original_is_refused():
    original = tiny_model("olmoe")
    plan = light(original)
    with pytest.raises(OptionError, match="lacks 1 of the model's layers"):
        recovered(compressed(original, plan), plan, tiny_model("olmoe", num_hidden_layers=1))
