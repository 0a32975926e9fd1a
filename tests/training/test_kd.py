"""Distillation from the original: what it must reach, what it must leave alone, and its loss by hand."""

from __future__ import annotations

import copy

import pytest
import torch

from locum.data.tokens import batches
from locum.errors import OptionError
from locum.measure.loss import evaluate
from locum.models.sizes import shape_of
from locum.plans.plan import KEPT, LayerPlan, make_plan
from locum.training.context import Context, Original
from locum.training.options import make_recovery
from locum.training.recovery import recover_model
from making.tiny_models import tiny_model
from making.training import compressed, light, tiny_tokens

QUICK = {"how": "kd", "batch_size": 4, "learning_rate": 1e-2, "warmup_fraction": 0.0, "validate_every": 0}


@pytest.fixture(scope="module")
def original():
    return tiny_model("olmoe")


def recovered(model, plan, original, **options):
    chosen = make_recovery({**QUICK, "checkpoint_every": 0, **options})
    return recover_model(copy.deepcopy(model), plan, tiny_tokens(), None, chosen, Original.of(original))[0]


def divergence(model, original) -> float:
    rows = evaluate(model, tiny_tokens(), against=original, resamples=1)
    return next(row.value for row in rows if (row.metric, row.domain) == ("kl", "all"))


def test_a_compressed_model_comes_nearer_to_its_original(original):
    plan = light(original)
    small = compressed(original, plan)
    assert divergence(recovered(small, plan, original, steps=30), original) < 0.5 * divergence(small, original)


def test_a_model_that_is_its_original_has_nothing_to_learn(original):
    plan = make_plan(shape_of(original), [LayerPlan(x.name, (KEPT,) * 8) for x in shape_of(original).layers])
    context = Context(copy.deepcopy(original), plan, 1, 0, Original.of(original))
    chosen = make_recovery(QUICK).way
    chosen.prepare(context, 0)
    loss, _ = chosen.loss(context, next(batches(tiny_tokens(), 2)))
    loss.backward()
    gradients = [p.grad for p in context.model.parameters() if p.grad is not None]
    assert float(loss.detach()) == pytest.approx(0, abs=1e-4) and gradients
    assert all(float(gradient.abs().max()) < 1e-5 for gradient in gradients)


@pytest.mark.parametrize(("share", "temperature"), [(0.0, 1.0), (0.3, 2.0), (1.0, 4.0)])
def test_the_loss_mixes_both(share, temperature, original):
    plan = light(original)
    context = Context(compressed(original, plan), plan, 1, 0, Original.of(original))
    chosen = make_recovery({**QUICK, "share": share, "temperature": temperature}).way
    chosen.prepare(context, 0)
    batch, expected = next(batches(tiny_tokens(), 2)), 0.0
    found, _ = chosen.loss(context, batch)
    with torch.no_grad():
        ours, theirs = (model(batch.ids_BS).logits.double() for model in (context.model, original))
    for b, s in batch.loss_mask_BS[:, 1:].nonzero().tolist():
        p, q = (z[b, s].div(temperature).softmax(-1).tolist() for z in (theirs, ours))
        nats = sum(x * float(torch.tensor(x / y).log()) for x, y in zip(p, q, strict=True))
        label = float(ours[b, s].softmax(-1)[batch.ids_BS[b, s + 1]].log())
        expected += share * temperature**2 * nats - (1 - share) * label
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("wrong", [{"share": 1.5}, {"share": float("nan")}, {"temperature": 0.0}])
def test_senseless_options_are_refused(wrong, original):
    plan = light(original)
    with pytest.raises(OptionError, match=f"--{next(iter(wrong))} is"):
        recovered(compressed(original, plan), plan, original, steps=1, **wrong)


def test_an_original_of_another_vocabulary_is_refused(original):
    plan, other = light(original), tiny_model("olmoe", vocab_size=200)
    with pytest.raises(OptionError, match="a vocabulary of"):
        recovered(compressed(original, plan), plan, other, steps=1)
