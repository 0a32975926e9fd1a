"""Planted truth on real models: experts that are duplicates, dead, low-rank, constant or vital must be found as such."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from locum.checkpoints.application import apply_plan
from locum.criteria.criterion import CRITERIA
from locum.experts.weights import permute_hidden
from locum.measure.calibration import calibrate
from locum.methods.d2_moe import D2MoE
from locum.methods.hc_smoe import HCSMoE
from locum.methods.lightmoe import LightMoE
from locum.methods.m_smoe import MSMoE
from locum.methods.mone import MoNE
from locum.methods.prune import Prune
from locum.methods.replace import Replace
from locum.methods.res_moe import ResMoE
from locum.models.families import find_layers
from locum.models.sizes import shape_of
from locum.plans.plan import DROPPED, KEPT, NOTHING, LayerPlan, Plan, Slot, make_plan
from making.handmade import layers_of, tokens_of
from making.planted import IDS, TWINS, close, compressed, copy_of, edit, logits, measured, with_twins
from making.tiny_models import tiny_model

# --- duplicates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "amount"),
    [
        (LightMoE(selection="average", bases=2, rank=0), 6 / 8),
        (MSMoE(budget="uniform"), 4 / 7),
        (MSMoE(align=False), 4 / 7),
        (HCSMoE(over="all"), 4 / 7),
    ],
)
def test_duplicates_are_grouped_and_merging_them_changes_nothing(method: object, amount: float) -> None:
    model = with_twins(permuted=False)
    before, shape = logits(model), shape_of(model)
    layers = layers_of(method, calibrate(model, tokens_of(IDS), needs=method.needs()), shape, amount)
    for layer in layers:
        assert sorted(base.experts for base in layer.bases) == sorted(TWINS.values())
    assert make_plan(shape, layers).removed(shape) == 0.5
    assert close(compressed(model, layers), before)


def test_merging_what_differs_does_change_something() -> None:
    model = with_twins(permuted=False)
    before, shape = logits(model), shape_of(model)
    layers = layers_of(LightMoE(selection="average", bases=1, rank=0), measured(model), shape, 6 / 8)
    assert not close(compressed(model, layers), before, 1e-2)


@pytest.mark.parametrize(("align", "exact"), [(True, True), (False, False)])
def test_shuffled_duplicates_merge_exactly_when_aligned(align: bool, exact: bool) -> None:
    """With weights that are near each other: by gate mass the first of three copies has nearly all of it."""
    model = with_twins(permuted=True)
    before, shape = logits(model), shape_of(model)
    layers = layers_of(LightMoE(selection="average", bases=2, rank=0, align=align), measured(model), shape, 6 / 8)
    even = [
        dataclasses.replace(
            layer, bases=tuple(dataclasses.replace(base, weights=(0.4, 0.3, 0.3)) for base in layer.bases)
        )
        for layer in layers
    ]
    assert all(sorted(base.experts for base in layer.bases) == sorted(TWINS.values()) for layer in even)
    assert close(compressed(model, even), before) == exact


# --- one base under all -----------------------------------------------------------------------------------------


def of_one_direction(permuted: bool) -> PreTrainedModel:
    """Every expert is one expert and a multiple of one matrix of rank 1; if `permuted`, with its hidden units shuffled."""
    model = tiny_model("olmoe")
    for number, layer in enumerate(find_layers(model)):
        first, second = copy_of(layer, 0), copy_of(layer, 1)
        for e in range(layer.shape.num_experts):
            apart = second.map(lambda _, w, e=e: 0.3 * e * w[:, :1] @ w[:1] / w.norm())
            made = first.map(lambda name, w, apart=apart: w + getattr(apart, name))
            order = torch.randperm(made.up_FD.shape[0], generator=torch.Generator().manual_seed(100 * number + e))
            edit(layer, {e: permute_hidden(made, order) if permuted and e else made})
    return model


@pytest.mark.parametrize(
    ("method", "permuted", "exact"),
    [
        (D2MoE(start="svd", multiple=1), False, True),
        (D2MoE(multiple=1), False, True),
        (D2MoE(multiple=1), True, False),
        (ResMoE(multiple=1), True, True),
        (ResMoE(multiple=1), False, True),
    ],
)
def test_what_differs_in_one_direction_is_kept_whole_in_little(method: object, permuted: bool, exact: bool) -> None:
    model = of_one_direction(permuted)
    before, shape = logits(model), shape_of(model)
    statistics = calibrate(model, tokens_of(IDS), needs=("gate_sum", *method.needs())) if method.needs() else None
    layers = layers_of(method, statistics, shape, 0.8)
    assert {len(layer.bases) for layer in layers} == {1} and make_plan(shape, layers).removed(shape) > 0.5
    assert close(compressed(model, layers, statistics), before, 1e-4) == exact


# --- dead -------------------------------------------------------------------------------------------------------

DEAD = 5


def with_dead_expert(model_type: str) -> PreTrainedModel:
    """No token selects expert 5, by its selection bias (deepseek_v3) or its router bias (gpt_oss)."""
    model = tiny_model(model_type, **({"n_group": 1, "topk_group": 1} if model_type == "deepseek_v3" else {}))
    for layer in find_layers(model):
        bias = layer.router.bias if model_type == "gpt_oss" else layer.router.e_score_correction_bias
        with torch.no_grad():
            bias[DEAD] = -100.0
    return model


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss"])
def test_a_dead_expert_goes_first_and_is_not_missed(model_type: str) -> None:
    """Gates that are normalised after top-k do not see an expert that is never selected."""
    model = with_dead_expert(model_type)
    before, shape, statistics = logits(model), shape_of(model), measured(model)
    assert all(layer.renormalised for layer in shape.layers)
    for name in statistics.layers:
        assert statistics.layer(name)["count"][DEAD] == 0
    for score in ("reap", "frequency", "gate", "ean", "ean_dims", "mone"):
        layers = layers_of(Prune(score=score), statistics, shape, 1 / 6)
        assert [tuple(e for e, s in enumerate(layer.slots) if s == DROPPED) for layer in layers] == [(DEAD,)] * 2
    assert close(compressed(model, layers), before)


def test_a_dead_expert_is_missed_where_gates_are_not_renormalised() -> None:
    """OLMoE's gates are a softmax over all experts: without the dead row they grow; a silent expert keeps its row."""
    model = tiny_model("olmoe")
    layer = find_layers(model)[0]
    seen = []
    handle = layer.router.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].detach()))
    few = IDS[:1, :20]
    with torch.no_grad():
        model(few)
        handle.remove()
        x_TD = seen[0].reshape(20, -1)
        logits_TE = x_TD @ layer.router.weight.T
        logits_TE[:, DEAD] = -torch.inf
        just_below_T = logits_TE.topk(2).values[:, 1] - 0.1
        layer.router.weight[DEAD] = torch.linalg.lstsq(x_TD, just_below_T[:, None]).solution[:, 0]
        before = model(few).logits
        statistics = calibrate(model, tokens_of(few))
    assert not shape_of(model).layers[0].renormalised
    assert statistics.layer(layer.shape.name)["count"][DEAD] == 0

    def after(fate: Slot) -> Tensor:
        twin = tiny_model("olmoe")
        twin.load_state_dict(model.state_dict())
        slots = tuple(fate if e == DEAD else KEPT for e in range(8))
        apply_plan(twin, make_plan(shape_of(twin), [LayerPlan(layer.shape.name, slots)]))
        with torch.no_grad():
            return twin(few).logits

    assert close(after(NOTHING), before)
    assert not close(after(DROPPED), before, 1e-3)


# --- low rank ---------------------------------------------------------------------------------------------------


def low_rank(tensor: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    rows, columns = tensor.shape
    left, right = (torch.randn(*size, generator=generator) for size in ((rows, rank), (rank, columns)))
    return 0.3 * left @ right / rank**0.5


@pytest.mark.parametrize("model_type", ["olmoe", "deepseek_v3"])
def test_experts_of_low_rank_are_replaced_exactly(model_type: str) -> None:
    model = tiny_model(model_type)
    generator = torch.Generator().manual_seed(1)
    for layer in find_layers(model):
        edit(layer, {e: copy_of(layer, e).map(lambda _, t: low_rank(t, 3, generator)) for e in range(8)})
    before, shape = logits(model), shape_of(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    statistics = measured(model)
    layers = layers_of(Replace(shared=False, selection="average", rank=3, start="svd"), statistics, shape, 1.0)
    assert all(len(layer.replaced) == 8 for layer in layers) and make_plan(shape, layers).removed(shape) > 0.6
    assert close(compressed(model, layers), before)
    again = tiny_model(model_type)
    again.load_state_dict(state)
    layers = layers_of(Replace(shared=False, selection="average", rank=2, start="svd"), statistics, shape, 1.0)
    assert not close(compressed(again, layers), before, 1e-2)


@pytest.mark.parametrize(("rank", "start", "exact"), [(3, "svd", True), (2, "svd", False), (3, "gaussian", False)])
def test_experts_at_low_rank_from_each_other_are_rebuilt_from_their_mean(rank: int, start: str, exact: bool) -> None:
    """Experts are S + B C_e A with common S, B and A: whatever the mean's weights, what it leaves over has rank 3."""
    model = tiny_model("olmoe")
    generator = torch.Generator().manual_seed(2)
    for layer in find_layers(model):
        common = copy_of(layer, 0)
        sides = {
            name: (torch.randn(t.shape[0], 3, generator=generator), torch.randn(3, t.shape[1], generator=generator))
            for name, t in vars(common).items()
            if t is not None
        }

        def own(name: str, tensor: Tensor, sides: dict = sides) -> Tensor:
            left, right = sides[name]
            return tensor + 0.2 * left @ torch.randn(3, 3, generator=generator) @ right

        edit(layer, {e: common.map(own) for e in range(8)})
    before, shape = logits(model), shape_of(model)
    method = LightMoE(selection="average", bases=1, rank=rank, start=start)
    layers = layers_of(method, measured(model), shape, 1.0)
    assert all(len(layer.replaced) == 8 for layer in layers)
    after = compressed(model, layers)
    assert close(after, before, 1e-4) if exact else not close(after, before, 1e-2)


# --- constant ---------------------------------------------------------------------------------------------------


def test_constant_experts_are_found_and_replaced_exactly() -> None:
    """gpt_oss experts have a bias after the last product: without the product they say the same to every token."""
    model = tiny_model("gpt_oss")
    constant = (1, 4, 6)
    for layer in find_layers(model):
        edits = {}
        for e in constant:
            weights = copy_of(layer, e)
            edits[e] = dataclasses.replace(weights, down_DF=torch.zeros_like(weights.down_DF))
        edit(layer, edits)
    before, shape, statistics = logits(model), shape_of(model), measured(model)
    layers = layers_of(MoNE(), statistics, shape, 0.5)
    assert [layer.replaced for layer in layers] == [constant] * 2
    assert close(compressed(model, layers, statistics), before)


def test_replacing_a_changing_expert_by_a_constant_is_not_exact() -> None:
    model = tiny_model("gpt_oss")
    before, shape, statistics = logits(model), shape_of(model), measured(model)
    assert not close(compressed(model, layers_of(MoNE(), statistics, shape, 0.5), statistics), before, 1e-2)


# --- vital ------------------------------------------------------------------------------------------------------

VITAL = 3


def with_vital_expert() -> PreTrainedModel:
    """In the last layer, expert 3 is selected by every token, weighs most and speaks loudest."""
    model = tiny_model("gpt_oss")
    layer = find_layers(model)[-1]
    with torch.no_grad():
        layer.router.bias[VITAL] = 4.0
    edit(layer, {VITAL: dataclasses.replace(copy_of(layer, VITAL), down_DF=3 * copy_of(layer, VITAL).down_DF)})
    return model


def test_dropping_the_vital_expert_is_worst_and_every_criterion_knows() -> None:
    model = with_vital_expert()
    before, shape, statistics = logits(model), shape_of(model), measured(model)
    name = shape.layers[-1].name
    harm = []
    for e in range(8):
        slots = tuple(DROPPED if i == e else KEPT for i in range(8))
        after = compressed(with_vital_expert(), [LayerPlan(name, slots)])
        divergence = torch.nn.functional.kl_div(
            after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="none"
        )
        harm.append(float(divergence.sum(-1).mean()))
    assert harm.index(max(harm)) == VITAL and harm[VITAL] > 2 * sorted(harm)[-2]
    known = [s for s in CRITERIA if set(CRITERIA[s].needs) <= set(statistics.names) and not s.endswith("_max")]
    assert len(known) > 10
    for score in (score for score in known if score != "random"):
        assert int(CRITERIA[score](statistics.layer(name)).argmax()) == VITAL, score
    for method in (
        Prune(),
        MoNE(),
        LightMoE(rank=2, selection="average"),
        Replace(rank=2, selection="average"),
    ):
        plan: Plan = make_plan(shape, layers_of(method, statistics, shape, 0.5))
        assert plan.layer(name).slots[VITAL] == KEPT, method
