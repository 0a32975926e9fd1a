"""One rule finds the MoE layers of real models; reading, writing and slicing them; what is refused and how it says so."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from locum.checkpoints.application import apply_plan
from locum.errors import PlanError, UnsupportedModel
from locum.experts.weights import ExpertWeights
from locum.models.families import (
    FAMILIES,
    Family,
    canonical_activation,
    family_of,
    find_layers,
    is_stock_experts,
    model_class,
    read_expert,
    set_expert_count,
    slice_experts,
    slice_router,
    write_expert,
)
from locum.models.sizes import shape_of
from locum.plans.plan import DROPPED, KEPT, NOTHING, LayerPlan, make_plan, stand_in
from making.tiny_models import CONFIGS, SIZE, tiny_ids, tiny_model

ROUTERS = {  # router kind, gates renormalised
    "olmoe": ("softmax", False),
    "qwen2_moe": ("softmax", False),
    "qwen3_moe": ("softmax", True),
    "mixtral": ("softmax", True),
    "phimoe": ("other", None),
    "granitemoe": ("softmax", True),
    "deepseek_v2": ("softmax", False),
    "deepseek_v3": ("sigmoid", True),
    "gpt_oss": ("softmax", True),
}
SHARED = ("qwen2_moe", "deepseek_v2", "deepseek_v3")
families = pytest.mark.parametrize("model_type", CONFIGS)


def empty_model(model_type, **changes):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **changes))


@families
def test_layers_are_found_with_their_sizes(model_type):
    model = tiny_model(model_type)
    layers = find_layers(model)
    assert len(layers) == 2
    for layer in layers:
        shape = layer.shape
        assert model.get_submodule(shape.name) is layer.experts and model.get_submodule(shape.router) is layer.router
        assert is_stock_experts(layer.experts)
        assert (shape.num_experts, shape.top_k, shape.hidden_size, shape.expert_width) == (8, 2, 32, 16)
        kind, renormalised = ROUTERS[model_type]
        assert shape.router_kind == kind
        assert renormalised is None or shape.renormalised == renormalised
        assert shape.num_groups == (2 if model_type == "deepseek_v3" else 1)
        assert shape.min_per_group == (2 if model_type == "deepseek_v3" else 1)
        assert shape.shared_experts == (1 if model_type in SHARED else 0)
        assert (shape.has_gate, shape.has_bias) == (True, model_type == "gpt_oss")
        per_row = 32 + (model_type in ("deepseek_v3", "gpt_oss"))
        assert (shape.router_numel, shape.router_bytes) == (per_row, 4 * per_row)
        assert sum(p.numel() for p in layer.experts.parameters()) == 8 * shape.parameters()


@families
def test_a_model_without_weights_has_the_same_shape(model_type):
    model = tiny_model(model_type)
    assert [x.shape for x in find_layers(copy.deepcopy(model).to("meta"))] == [x.shape for x in find_layers(model)]


def test_dense_layers_are_passed_over():
    model = tiny_model("deepseek_v3", first_k_dense_replace=1)
    assert [x.shape.name for x in find_layers(model)] == ["model.layers.1.mlp.experts"]
    model = tiny_model("qwen2_moe", mlp_only_layers=[1])
    assert [x.shape.name for x in find_layers(model)] == ["model.layers.0.mlp.experts"]


def test_an_unused_group_setting_does_not_count():
    greedy = tiny_model("deepseek_v2", n_group=2, topk_group=1, topk_method="greedy")
    limited = tiny_model("deepseek_v2", n_group=2, topk_group=1, topk_method="group_limited_greedy")
    assert [find_layers(m)[0].shape.num_groups for m in (greedy, limited)] == [1, 2]


def gate_of(model_type, experts, weights, x_D):
    """The family's math, from its paper or model code, on one expert."""
    gate, up = weights.gate_FD @ x_D, weights.up_FD @ x_D
    if model_type == "gpt_oss":
        gate = (gate + weights.gate_bias_F).clamp(max=7.0)
        up = (up + weights.up_bias_F).clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return torch.nn.functional.silu(gate) * up


@families
def test_read_expert_and_canonical_gate_reproduce_the_familys_own_experts(model_type):
    experts = find_layers(tiny_model(model_type))[0].experts
    gate = canonical_activation(experts)
    x_TD = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)) * 3
    for e in range(8):
        own = experts(x_TD, torch.full((5, 1), e), torch.ones(5, 1))
        weights = read_expert(experts, e)
        bias_G = 0 if weights.gate_up_bias_G is None else weights.gate_up_bias_G
        bias_D = 0 if weights.down_bias_D is None else weights.down_bias_D
        hidden_TF = gate(x_TD @ weights.gate_up_GD.T + bias_G)
        slow_TF = torch.stack([gate_of(model_type, experts, weights, x_D) for x_D in x_TD])
        torch.testing.assert_close(hidden_TF, slow_TF, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(hidden_TF @ weights.down_DF.T + bias_D, own, atol=1e-4, rtol=1e-5)


def test_canonical_gate_holds_no_weights():
    experts = find_layers(tiny_model("gpt_oss"))[0].experts
    before = experts.gate_up_proj
    gate = canonical_activation(experts)
    del experts.gate_up_proj
    assert gate(torch.randn(3, 32)).shape == (3, 16)
    assert before.shape[0] == 8


@families
def test_write_expert_is_the_inverse_of_read_expert(model_type):
    source, target = (find_layers(tiny_model(model_type, seed=s))[0].experts for s in (0, 1))
    for e in range(8):
        write_expert(target, e, read_expert(source, e))
    for name, parameter in source.named_parameters():
        assert torch.equal(parameter, target.get_parameter(name))


@families
def test_slicing_keeps_the_rows_of_everything_per_expert(model_type):
    keep = (0, 2, 3, 4, 5, 7)
    layer, original = (find_layers(tiny_model(model_type))[0] for _ in range(2))
    slice_router(layer, keep)
    slice_experts(layer.experts, keep)
    state, before = layer.router.state_dict(), original.router.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name][list(keep)]) for name in state)
    for new, e in enumerate(keep):
        one, two = read_expert(layer.experts, new), read_expert(original.experts, e)
        assert all(
            torch.equal(a, b) for a, b in zip(vars(one).values(), vars(two).values(), strict=True) if a is not None
        )
    assert (layer.router.num_experts, layer.experts.num_experts) == (6, 6)


def test_making_room_in_a_router_needs_no_rows():
    layer = find_layers(tiny_model("deepseek_v3").to("meta"))[0]
    slice_router(layer, 6)
    assert {name: tuple(t.shape) for name, t in layer.router.state_dict().items()} == {
        "weight": (6, 32),
        "e_score_correction_bias": (6,),
    }


BIAS_IN_BLOCK = {
    "minimax_m2": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16, "head_dim": 8},
    "hy_v3": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "intermediate_size": 48,
        "head_dim": 8,
    },
    "afmoe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "intermediate_size": 48,
        "head_dim": 8,
    },
}
NAMES = {"minimax_m2": "e_score_correction_bias", "hy_v3": "e_score_correction_bias", "afmoe": "expert_bias"}


def model_with_bias_in_block(model_type):
    changes = {**SIZE, **BIAS_IN_BLOCK[model_type]}
    if model_type == "afmoe":
        changes |= {"num_dense_layers": 0, "layer_types": ["full_attention"] * 2}
    if model_type == "hy_v3":
        changes |= {"first_k_dense_replace": 0, "mlp_layer_types": ["sparse"] * 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **changes), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" not in name:
                tensor.normal_(std=0.3)
    return model


@pytest.mark.parametrize("model_type", BIAS_IN_BLOCK)
def test_a_selection_bias_in_the_block_is_sliced_with_the_router(model_type):
    """Dropping must equal adding -inf to the bias of the dropped: they are then never selected, nothing else changes."""
    model, masked = model_with_bias_in_block(model_type), model_with_bias_in_block(model_type)
    shape = shape_of(model)
    assert shape.layers[0].router_numel == 33
    plan = make_plan(
        shape, [LayerPlan(x.name, (KEPT, DROPPED, KEPT, KEPT, DROPPED, KEPT, KEPT, KEPT)) for x in shape.layers]
    )
    apply_plan(model, plan)
    for layer in find_layers(model):
        assert getattr(layer.block, NAMES[model_type]).shape == (6,)
    with torch.no_grad():
        for layer in find_layers(masked):
            getattr(layer.block, NAMES[model_type])[[1, 4]] = float("-inf")
        torch.testing.assert_close(model(tiny_ids()).logits, masked(tiny_ids()).logits, atol=1e-5, rtol=1e-5)


def test_expert_count_is_written_under_every_name():
    for model_type, name in (
        ("olmoe", "num_experts"),
        ("mixtral", "num_local_experts"),
        ("deepseek_v3", "n_routed_experts"),
    ):
        config = tiny_model(model_type).config
        set_expert_count(config, 6)
        assert getattr(config, name) == 6
        assert type(config)(**config.to_dict()).to_dict()[name] == 6


# --- what is refused --------------------------------------------------------------------------------------------


def test_a_dense_model_is_refused():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZE, intermediate_size=16))
    with pytest.raises(UnsupportedModel, match="'llama' has no mixture-of-experts layers"):
        find_layers(model)


def test_experts_outside_the_interface_are_refused(monkeypatch):
    """Also in a family that no row names."""
    for model_type, row in (("jetmoe", "jetmoe"), ("llama4_text", "llama4")):
        model = empty_model(model_type, num_hidden_layers=1)
        monkeypatch.delitem(FAMILIES, row)
        with pytest.raises(UnsupportedModel, match=f"'{model_type}' has experts, but not behind transformers' experts"):
            find_layers(model)


def test_a_family_that_has_no_class_to_load_says_why_too():
    """An encoder-decoder has no language model head; its row's reason says more than that."""
    for model_type in ("nllb-moe", "switch_transformers"):
        with pytest.raises(UnsupportedModel, match=f"'{model_type}' is not supported: it is an encoder-decoder"):
            model_class(AutoConfig.for_model(model_type))
    with pytest.raises(UnsupportedModel, match="'vit' is not a language model that transformers can load"):
        model_class(AutoConfig.for_model("vit"))
    for odd in (
        [0.5],
        5,
        "OlmoeForCausalLM",
        [None],
    ):  # as a damaged config.json may say; older releases refuse to read it
        config = AutoConfig.for_model("olmoe")
        vars(config)["architectures"] = odd
        assert model_class(config).__name__ == "OlmoeForCausalLM"


SINCE = {"inkling2_loop": (5, 24)}  # families that older releases of transformers lack


def test_every_exception_names_a_family_that_transformers_has_and_a_reason():
    installed = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    for model_type, family in FAMILIES.items():
        assert (model_type in CONFIG_MAPPING) == (installed >= SINCE.get(model_type, (5, 0)))
        assert family != Family()
        assert all(len(reason) > 20 for reason in (family.refuse, family.refuse_dropping) if reason)
        assert not (family.undecorated and family.refuse)


@pytest.mark.parametrize("model_type", ["longcat_flash", "zaya", "llama4_text", "jetmoe"])
def test_refused_families_say_why(model_type):
    with pytest.raises(UnsupportedModel, match=f"'{model_type}' is not supported: {family_of(model_type).refuse}"):
        find_layers(empty_model(model_type, num_hidden_layers=2))


def test_a_new_row_changes_what_happens_and_removing_it_restores_it(monkeypatch, olmoe):
    with monkeypatch.context() as patch:
        patch.setitem(FAMILIES, "olmoe", Family(refuse="this test says so"))
        with pytest.raises(UnsupportedModel, match="'olmoe' is not supported: this test says so"):
            find_layers(olmoe)
    assert len(find_layers(olmoe)) == 2


def test_naming_an_experts_class_undecorated_is_what_puts_it_behind_the_interface(monkeypatch, olmoe):
    """OLMoE's experts in a class without the decorator are refused; a row makes them what they were, to the bit."""
    olmoe.set_experts_implementation("eager")
    with torch.no_grad():
        expected = olmoe(tiny_ids()).logits
    shapes = [layer.shape for layer in find_layers(olmoe)]
    for layer in find_layers(olmoe):
        bare = {"forward": type(layer.experts).forward.__wrapped__}
        layer.experts.__class__ = type("BareExperts", (type(layer.experts),), bare)
        for flag in ("has_gate", "is_transposed", "is_concatenated", "has_bias", "config"):
            delattr(layer.experts, flag)
    with pytest.raises(UnsupportedModel, match="'olmoe' has experts, but not behind transformers' experts interface"):
        find_layers(olmoe)
    monkeypatch.setitem(FAMILIES, "olmoe", Family(undecorated="BareExperts"))
    layers = find_layers(olmoe)
    assert [layer.shape for layer in layers] == shapes
    assert all(layer.experts.config is olmoe.config and layer.experts.has_gate for layer in layers)
    with torch.no_grad():
        assert torch.equal(olmoe(tiny_ids()).logits, expected)


def test_a_router_whose_tensors_do_not_fit_the_rule_is_refused(olmoe):
    olmoe.model.layers[1].mlp.gate.scale = nn.Parameter(torch.ones(5))
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.gate.*scale.*\[5\].*8 experts"):
        find_layers(olmoe)


def test_a_missing_or_second_router_is_refused(olmoe):
    olmoe.model.layers[0].mlp.router = nn.Linear(32, 8)
    with pytest.raises(UnsupportedModel, match="one router named 'gate' or 'router'"):
        find_layers(olmoe)
    del olmoe.model.layers[0].mlp.router, olmoe.model.layers[0].mlp.gate
    with pytest.raises(UnsupportedModel, match="found none"):
        find_layers(olmoe)


def test_a_plan_that_starves_a_group_is_refused():
    """DeepSeek-V3 ranks groups by their best two experts: with one in a group its router fails."""
    shape = shape_of(tiny_model("deepseek_v3"))
    lonely = LayerPlan(shape.layers[0].name, (KEPT, DROPPED, DROPPED, DROPPED) * 2)
    with pytest.raises(PlanError, match="groups; keep at least 2"):
        make_plan(shape, [lonely])


# --- compressed models ------------------------------------------------------------------------------------------


def test_layers_of_a_compressed_model_are_found_too(olmoe):
    shape = shape_of(olmoe)
    slots = (DROPPED, NOTHING, stand_in(rank=2, start="svd"), *[KEPT] * 5)
    gate = canonical_activation(find_layers(olmoe)[0].experts)
    apply_plan(olmoe, make_plan(shape, [LayerPlan(shape.layers[0].name, slots)]))
    found = find_layers(olmoe)
    assert [x.shape.num_experts for x in found] == [7, 8]
    assert [(x.shape.hidden_size, x.shape.expert_width, x.shape.top_k) for x in found] == [(32, 16, 2)] * 2
    pre = torch.randn(3, 32)
    assert torch.equal(canonical_activation(found[0].experts)(pre), gate(pre))


def test_expert_weights_map_leaves_missing_tensors_out():
    weights = ExpertWeights(None, torch.ones(2, 3), torch.ones(3, 2))
    doubled = weights.map(lambda name, t: 2 * t)
    assert doubled.gate_FD is None and bool((doubled.up_FD == 2).all())


def test_finding_layers_leaves_the_global_random_state_alone(olmoe):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    find_layers(olmoe)
    assert torch.equal(torch.get_rng_state(), before)
