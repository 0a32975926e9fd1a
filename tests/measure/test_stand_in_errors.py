"""What stand-ins lose on a live model, and what noise costs it, against slow loops; answers are remembered.

Letters: E experts.
"""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from torch.nn.functional import silu

from locum.checkpoints.application import apply_plan
from locum.containers.container import StandInExperts
from locum.errors import UnsupportedModel
from locum.experts.parts.constant import Constant
from locum.experts.parts.low_rank import LowRank
from locum.experts.parts.shared_base import SharedBase
from locum.measure.calibration import calibrate
from locum.measure.remembered import RememberedAnswers
from locum.measure.removals import ModelExplorer
from locum.models.families import find_layers, read_expert
from locum.models.sizes import shape_of
from locum.plans.plan import DROPPED, KEPT, NOTHING, Base, LayerPlan, Slot, make_plan
from locum.stats.sums import mean_output
from making.handmade import tokens_of
from making.tiny_models import tiny_ids, tiny_model

IDS = tiny_ids(3, 16)
NEEDS = ("count", "output_sum")


@pytest.fixture(scope="module")
def model():
    return tiny_model("olmoe")


@pytest.fixture(scope="module")
def explorer(model):
    tokens = tokens_of(IDS)
    return ModelExplorer(model, tokens, sample=48, seed=5, statistics=calibrate(model, tokens, needs=NEEDS))


def plan_of(layer: str) -> LayerPlan:
    """One of each: kept, two on the base of a third, low rank, a constant, nothing."""
    low, constant, on_base = Slot((LowRank(4, "svd"),)), Slot((Constant(),)), Slot((SharedBase(0),))
    slots = (KEPT, on_base, on_base, low, constant, NOTHING, KEPT, low)
    return LayerPlan(layer, slots, (Base((6,), (1.0,)),))


def slow_errors(model, explorer, plan: LayerPlan) -> list[float]:
    """Token by token and expert by expert, with whole matrices."""
    layer = next(layer for layer in find_layers(model) if layer.shape.name == plan.layer)
    seen = {}
    hook = layer.experts.register_forward_pre_hook(lambda _, given: seen.update(zip("xig", given, strict=True)))
    with torch.no_grad():
        model(explorer.batches[0].ids_BS)
    hook.remove()
    mean_ED = mean_output(explorer.statistics.layer(plan.layer)).float()

    def gives(e: int, x, whole=None):
        expert = read_expert(layer.experts, e if whole is None else whole)
        return expert.down_DF @ (silu(expert.gate_FD @ x) * (expert.up_FD @ x))

    def of_rank(matrix):
        u, s, v = torch.linalg.svd(matrix)
        return u[:, :4] @ torch.diag(s[:4]) @ v[:4]

    def becomes(e: int, x):
        if e in (1, 2):
            return gives(e, x, 6)
        if e in (3, 7):
            old = read_expert(layer.experts, e)
            hidden = silu(of_rank(old.gate_FD) @ x) * (of_rank(old.up_FD) @ x)
            return of_rank(old.down_DF) @ hidden
        return {4: mean_ED[4], 5: torch.zeros_like(x)}.get(e, gives(e, x))

    errors = [0.0] * 8
    with torch.no_grad():
        for x, chosen, gates in zip(seen["x"], seen["i"].tolist(), seen["g"].tolist(), strict=True):
            for e, gate in zip(chosen, gates, strict=True):
                errors[e] += gate**2 * float((gives(e, x) - becomes(e, x)).square().sum())
    return errors


def test_errors_of_stand_ins_are_those_of_a_slow_loop(model, explorer):
    for layer in explorer.shape.layers:
        plan = plan_of(layer.name)
        (found_E,), (loss,) = explorer.stand_ins([plan], with_losses=False)
        assert loss == torch.inf
        nearly = 1e-9 * float(found_E.max())  # products of other rows together round otherwise
        assert found_E[[0, 6]].max() < nearly
        is_used_E = explorer.statistics.layer(layer.name)["count"] > 0
        assert torch.equal(found_E > nearly, is_used_E & torch.tensor([e not in (0, 6) for e in range(8)]))
        assert found_E.tolist() == pytest.approx(slow_errors(model, explorer, plan), rel=1e-3, abs=nearly)
    (nothing_E,), _ = explorer.stand_ins([LayerPlan(layer.name, (NOTHING,) * 8)], with_losses=False)
    assert 0 < float(explorer.output_square(layer.name)) < 4 * float(nothing_E.sum())  # outputs of top-2 add up


def test_the_loss_of_stand_ins_is_that_of_the_model_that_has_them(model, explorer):
    """A copy of the model that a plan was applied to, and the sum written out."""
    before = [parameter.clone() for parameter in model.parameters()]
    plan = plan_of(explorer.shape.layers[1].name)
    kept = LayerPlan(plan.layer, (KEPT,) * 8)
    error_CE, (found, none) = explorer.stand_ins([plan, kept], with_losses=True)
    assert torch.equal(error_CE[:1], explorer.stand_ins([plan], with_losses=False)[0])
    small = apply_plan(copy.deepcopy(model), make_plan(shape_of(model), [plan]), explorer.statistics, 5)
    (batch,) = explorer.batches
    kl, count = 0.0, 0
    with torch.no_grad():
        for whole_V, changed_V in zip(
            *(x(batch.ids_BS).logits[:, :-1].flatten(0, 1) for x in (model, small)), strict=True
        ):
            kl += float((whole_V.softmax(-1) * (whole_V.log_softmax(-1) - changed_V.log_softmax(-1))).sum())
            count += 1
    assert float(found) == pytest.approx(kl / count, rel=1e-3) and kl > 0
    assert float(none) == pytest.approx(0, abs=1e-6)
    assert all(map(torch.equal, before, model.parameters())) and not any(
        isinstance(module, StandInExperts) for module in model.modules()
    )


def test_the_divergence_of_a_plan_is_that_of_the_model_that_it_makes(model, explorer):
    """Two layers at once, one of which drops experts: a copy of the model that the plans were applied to."""
    first, second = (layer.name for layer in explorer.shape.layers)
    dropping = LayerPlan(second, (DROPPED, KEPT, NOTHING, DROPPED, KEPT, Slot((LowRank(4, "svd"),)), KEPT, DROPPED))
    variants = [{first: plan_of(first), second: dropping}, {first: plan_of(first)}, {second: dropping}, {}]
    found = explorer.divergences(variants)
    (batch,) = explorer.batches
    for variant, kl in zip(variants, found, strict=True):
        small = apply_plan(copy.deepcopy(model), make_plan(shape_of(model), variant.values()), explorer.statistics, 5)
        with torch.no_grad():
            whole_MV, small_MV = (x(batch.ids_BS).logits[:, :-1].flatten(0, 1).log_softmax(-1) for x in (model, small))
        expected = float((whole_MV.exp() * (whole_MV - small_MV)).sum(-1).mean())
        assert float(kl) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert not any(isinstance(module, StandInExperts) for module in model.modules())


def test_the_price_of_noise_is_what_it_costs_the_model(model, explorer):
    price_L = explorer.noise_price(0.1)
    (batch,) = explorer.batches
    with torch.no_grad():
        whole_MV = model(batch.ids_BS).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    for index, layer in enumerate(find_layers(model)):
        drawn = torch.Generator().manual_seed((5 * 1_000_003 + index) * 1_000_003)
        squares = []

        def add(_experts, _given, output, drawn=drawn, squares=squares):
            noise = torch.randn(output.shape, generator=drawn) * 0.1 * output.square().mean().sqrt()
            squares.append(float(noise.square().sum()))
            return output + noise

        hook = layer.experts.register_forward_hook(add)
        with torch.no_grad():
            noisy_MV = model(batch.ids_BS).logits[:, :-1].flatten(0, 1).log_softmax(-1)
        hook.remove()
        kl = float((whole_MV.exp() * (whole_MV - noisy_MV)).sum(-1).mean())
        assert float(price_L[index]) == pytest.approx(kl / squares[0], rel=1e-3) and kl > 0
    halved = explorer.noise_price(0.05)
    assert bool((halved / price_L - 1).abs().max() < 0.5)  # small noise costs its square


def test_answers_are_remembered(model, explorer, monkeypatch, tmp_path):
    name = explorer.shape.layers[0].name
    plans, nothing = [plan_of(name), LayerPlan(name, (KEPT,) * 8)], LayerPlan(name, (NOTHING,) * 8)

    def asked(answers: RememberedAnswers) -> list[torch.Tensor]:
        errors, losses = answers.stand_ins(plans, with_losses=True)
        more = answers.divergences([{name: plan_of(name)}, {}])
        return [errors, losses, more, answers.noise_price(0.1), answers.output_square(name)[None]]

    first = RememberedAnswers(explorer, tmp_path / "answers", {"model": "tiny"})
    found = asked(first)
    first.save()
    direct = explorer.stand_ins(plans, with_losses=True)
    assert torch.equal(found[0], direct[0]) and torch.equal(found[1], direct[1]) and found[1][0] == found[2][0] > 0
    again = RememberedAnswers(explorer, tmp_path / "answers", {"model": "tiny"})
    real = ModelExplorer.stand_ins
    for question in ("stand_ins", "divergences", "noise_price", "output_square"):
        monkeypatch.setattr(ModelExplorer, question, None)
    assert all(map(torch.equal, asked(again), found))
    errors, none = again.stand_ins(plans, with_losses=False)
    assert torch.equal(errors, found[0]) and bool((none == torch.inf).all())
    with pytest.raises(TypeError):
        again.stand_ins([nothing], with_losses=True)  # which nobody asked before
    asked_now = []
    monkeypatch.setattr(
        ModelExplorer, "stand_ins", lambda self, plans, x: asked_now.append(plans) or real(self, plans, x)
    )
    mixed = again.stand_ins([plans[0], nothing], with_losses=True)
    assert asked_now == [[nothing]] and torch.equal(mixed[0][0], found[0][0])


def test_a_model_that_predicts_nothing_has_no_price(explorer, monkeypatch):
    monkeypatch.setattr(type(explorer.model), "get_output_embeddings", lambda _: None)
    with pytest.raises(UnsupportedModel, match="does not predict tokens"):
        explorer.noise_price(0.1)


def test_plans_built_in_turn_and_together_lose_the_same(model, explorer):
    """With room for all of them, and for one at a time."""
    name = explorer.shape.layers[0].name
    plans = [plan_of(name), *(LayerPlan(name, (Slot((LowRank(rank, "svd"),)),) * 8) for rank in (8, 4, 2))]
    asked = []
    for built in (0, 2**30):
        with mock.patch("locum.measure.stand_ins.BUILT", built):
            asked.append(explorer.stand_ins(plans, with_losses=True))
        assert len(explorer._trials._made) == (len(plans) if built else 1)
    assert all(map(torch.equal, *asked))
