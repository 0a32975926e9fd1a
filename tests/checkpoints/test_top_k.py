"""Plans that let routers select fewer experts: down to one, with which a layer is that expert, in files and in memory alike."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.checkpoints.skeleton import active_parameters_in, read_shape
from locum.containers.container import StandInExperts
from locum.containers.layout import active_parameters
from locum.errors import PlanError, UnsupportedModel
from locum.methods.prune import Prune
from locum.models.families import find_layers, read_expert
from locum.models.sizes import shape_of
from locum.plans.following import following
from locum.plans.plan import DROPPED, KEPT, LayerPlan, Plan, diff, make_plan
from locum.shapes import ModelShape
from locum.stages.application import apply
from making.checkpoints import write_checkpoint
from making.handmade import layers_of, make_statistics, toy_shape
from making.tiny_models import CONFIGS, tiny_ids, tiny_model


def leaving(shape: ModelShape, top_k: int | None, *left: tuple[int, ...]) -> Plan:
    layers = [
        LayerPlan(layer.name, tuple(KEPT if e in kept else DROPPED for e in range(8)), top_k=top_k)
        for layer, kept in zip(shape.layers, left, strict=True)
    ]
    return make_plan(shape, layers)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe"])  # gates stay, or are divided by their sum
def test_with_one_expert_left_a_layer_is_that_expert(family, tmp_path) -> None:
    source = write_checkpoint(tmp_path / "model", family)
    shape = read_shape(source)
    plan = leaving(shape, 1, *((3 + index,) for index in range(len(shape.layers))))
    out = apply(source, plan=plan, out=tmp_path / "dense")
    dense, live = AutoModelForCausalLM.from_pretrained(out), apply_plan(load_model(source), plan)
    assert dense.config.num_experts_per_tok == live.config.num_experts_per_tok == 1
    assert "quantization_config" not in dense.config.to_dict()
    ids = tiny_ids()
    with torch.no_grad():
        assert torch.equal(dense(ids).logits, live(ids).logits)
        for index, (layer, before) in enumerate(zip(find_layers(dense), find_layers(load_model(source)), strict=True)):
            x_BSD = torch.randn(2, 3, layer.shape.hidden_size, generator=torch.Generator().manual_seed(index))
            found, expert = layer.block(x_BSD), read_expert(before.experts, 3 + index)
            hidden = torch.nn.functional.silu(x_BSD @ expert.gate_FD.T) * (x_BSD @ expert.up_FD.T)
            torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, hidden @ expert.down_DF.T)
    assert dense.generate(ids[:, :8], max_new_tokens=4, do_sample=False, pad_token_id=0).shape[1] == 12
    left = read_shape(out)
    assert [(layer.num_experts, layer.top_k) for layer in left.layers] == [(1, 1)] * len(shape.layers)
    assert active_parameters(shape, plan) == active_parameters_in(out, left)


@torch.no_grad()
def test_where_layers_keep_different_numbers_all_select_as_many_as_the_plan_says(tmp_path) -> None:
    source = write_checkpoint(tmp_path / "model", "olmoe", num_experts_per_tok=4)
    plan = leaving(read_shape(source), 2, (0, 5, 6), (1, 7))
    out = apply(source, plan=plan, out=tmp_path / "few")
    model, ids = load_model(out), tiny_ids()
    assert torch.equal(model(ids).logits, apply_plan(load_model(source), plan)(ids).logits)
    for layer, kept in zip(find_layers(model), ((0, 5, 6), (1, 7)), strict=True):
        assert isinstance(layer.experts, StandInExperts) and layer.shape.top_k == 2
        x_TD = torch.randn(5, layer.shape.hidden_size, generator=torch.Generator().manual_seed(0))
        before = next(each for each in find_layers(load_model(source)) if each.shape.name == layer.shape.name)
        share_TE = (x_TD @ before.router.weight[list(kept)].T).softmax(dim=1)
        expected_TD = torch.zeros_like(x_TD)
        for t, share_E in enumerate(share_TE):
            for e in share_E.topk(2).indices.tolist():
                expert = read_expert(before.experts, kept[e])
                hidden_F = torch.nn.functional.silu(expert.gate_FD @ x_TD[t]) * (expert.up_FD @ x_TD[t])
                expected_TD[t] += share_E[e] * (expert.down_DF @ hidden_F)
        found = layer.block(x_TD[None])
        torch.testing.assert_close((found[0] if isinstance(found, tuple) else found)[0], expected_TD)


def test_the_plan_is_kept_joined_and_told_apart() -> None:
    model = tiny_model("olmoe", num_experts_per_tok=4)
    shape, ids = shape_of(model), tiny_ids()
    plan = leaving(shape, 2, (0, 5, 6), (1, 7, 2))
    assert Plan.loads(plan.dumps()) == plan and '"top_k": 2' in plan.dumps()
    other = leaving(shape, 1, (0, 5, 6), (1, 7, 2))
    assert plan.id != other.id and diff(plan, other)[0].endswith("top-k: 2 -> 1")
    first = leaving(shape, 3, (0, 5, 6), (1, 7, 2))
    left = apply_plan(copy.deepcopy(model), first)
    second = [LayerPlan(layer.name, (KEPT, DROPPED, DROPPED), top_k=1) for layer in shape.layers]
    joined = following(first, make_plan(shape_of(left), second), shape)
    assert [layer.survivors for layer in joined.layers] == [(0,), (1,)]
    with torch.no_grad():
        twice = apply_plan(left, make_plan(shape_of(left), second))
        assert torch.equal(twice(ids).logits, apply_plan(copy.deepcopy(model), joined)(ids).logits)
    untouched = [LayerPlan(layer.name, (KEPT,) * 3) for layer in shape.layers]
    assert following(first, make_plan(shape_of(apply_plan(model, first)), untouched), shape) == first


@pytest.mark.parametrize(
    ("top_k", "words"),
    [(0, "top_k 0; allowed: 1 to 4"), (5, "top_k 5; allowed: 1 to 4"), (None, "selects top_k=4.*keep at least 4")],
)
def test_what_no_router_can_select_is_refused(top_k, words) -> None:
    shape = shape_of(tiny_model("olmoe", num_experts_per_tok=4))
    with pytest.raises(PlanError, match=words):
        leaving(shape, top_k, (0, 5, 6), (1, 7))


def test_one_number_is_for_all_layers_and_groups_keep_theirs() -> None:
    shape = shape_of(tiny_model("olmoe", num_experts_per_tok=4))
    with pytest.raises(PlanError, match="select 1 or 4 experts, and the config has one number for all"):
        make_plan(shape, [LayerPlan(shape.layers[0].name, (KEPT,) * 8, top_k=1)])
    grouped = shape_of(tiny_model("deepseek_v3"))
    with pytest.raises(PlanError, match="its router ranks 2 groups"):
        make_plan(grouped, [LayerPlan(layer.name, (KEPT,) * 8, top_k=1) for layer in grouped.layers])


def test_a_config_that_does_not_say_the_number_is_refused_before_anything_changes(monkeypatch) -> None:
    model = tiny_model("olmoe")
    monkeypatch.setattr("locum.models.families.TOP_KS", ("some_other_name",))
    with pytest.raises(UnsupportedModel, match="under no name that Locum knows"):
        apply_plan(model, leaving(shape_of(model), 1, (0,), (1,)))
    assert all(layer.shape.num_experts == 8 for layer in find_layers(model))


def test_a_router_that_selects_two_whatever_is_said_is_refused(tmp_path) -> None:
    model, source = tiny_model("phimoe"), write_checkpoint(tmp_path / "model", "phimoe")
    plan = leaving(shape_of(model), 1, (0,), (1,))
    with pytest.raises(UnsupportedModel, match="router selects 2 experts where its config says 1"):
        apply_plan(model, plan)
    assert all(layer.shape.num_experts == 8 for layer in find_layers(model))
    with pytest.raises(UnsupportedModel, match="selects 2 experts"):
        apply(source, plan=plan, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", [name for name in CONFIGS if name not in ("phimoe", "deepseek_v3")])
def test_families_run_one_expert_with_a_weight_of_one(family) -> None:
    model = tiny_model(family)
    shape = shape_of(model)
    apply_plan(model, leaving(shape, 1, *((2,) for _ in shape.layers)))
    seen: list[torch.Tensor] = []
    for layer in find_layers(model):
        layer.experts.register_forward_pre_hook(lambda module, given: seen.append(given[2]))
    with torch.no_grad():
        assert model(tiny_ids()).logits.isfinite().all()
    assert len(seen) == len(shape.layers) and all(weight_TK.shape[1] == 1 for weight_TK in seen)
    for weight_TK in seen:
        torch.testing.assert_close(weight_TK, torch.ones_like(weight_TK))


def test_pruning_goes_below_top_k_where_routers_may_select_fewer() -> None:
    shape = toy_shape(layers=2, experts=8, top_k=4)
    statistics = make_statistics(shape)

    def left(amount: float, **options: object) -> list[tuple[int, int | None]]:
        layers = layers_of(Prune(score="frequency", protect=False, **options), statistics, shape, amount)
        assert make_plan(shape, layers)
        return [(len(layer.survivors), layer.top_k) for layer in layers]

    assert left(1.0) == [(4, None)] * 2
    assert left(1.0, lower_top_k=True) == [(1, 1)] * 2
    assert left(5 / 7, lower_top_k=True) == [(3, 3)] * 2
    assert left(4 / 7, lower_top_k=True) == [(4, None)] * 2
    uneven = left(0.8, lower_top_k=True, budget="global")
    assert len({count for count, _ in uneven}) == 2
    assert {top_k for _, top_k in uneven} == {min(count for count, _ in uneven)}
