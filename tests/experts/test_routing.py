"""Routing policies: a layer with one against Compressed Experts written out token by token, whatever else it holds."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from locum.containers.container import StandInExperts
from locum.containers.layout import Layout
from locum.experts.policies.main_with_vectors import VECTORS, MainWithVectors
from locum.plans.plan import KEPT, LayerPlan
from locum.training.experts import TrainingExperts
from making.containers import KINDS, D, E, F, anneal, assert_near, filled, layer_shape, relative_error, routing
from making.oracles import expert_parts, random_layer_plan, slow_experts, slow_routed

TOP_K = 4
WITH_VECTORS = [kind for kind in VECTORS if kind != "none"]


def with_policy(kind, policy, seed=0, dtype=torch.float32, annealed=False, kept=False):
    """A layer of every kind of slot (or of kept experts) with a policy; its vectors are drawn around one."""
    activate, has_gate, has_bias = KINDS[kind]
    shape = dataclasses.replace(layer_shape(has_gate, has_bias), top_k=TOP_K)
    plan = LayerPlan("experts", (KEPT,) * E) if kept else random_layer_plan(shape, seed)
    plan = dataclasses.replace(plan, routing=policy)
    container = filled(Layout.of(plan, shape), activate, dtype, seed, TrainingExperts if annealed else StandInExperts)
    if annealed:
        anneal(container, plan, dtype)
    return container


def route(policy, offsets, x, index, gates, has_gate):
    """A policy applied by hand; what it stores is `offsets`."""
    sizes = SimpleNamespace(num_experts=E, hidden_size=x.shape[1], expert_width=F, has_gate=has_gate)
    return policy.route(sizes, {} if offsets is None else {"offsets_NV": offsets}, x, index, gates)


def vectors(container):
    return None if not container.policy_tensors else 1 + container.offsets_NV


def slow(container, x, index, gates, norm=lambda out_D: out_D):
    parts = lambda e: expert_parts(container, e)  # noqa: E731
    policy = container.layout.routing
    return slow_routed(parts, container.activate, policy, vectors(container), x, index, gates, norm)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("annealed", [False, True])
@pytest.mark.parametrize("learnt", VECTORS)
def test_output_equals_the_formulas_written_out(kind, annealed, learnt):
    for seed in range(4):
        policy = MainWithVectors(1 + seed % 3, learnt, renormalise=seed % 2 == 1)
        container = with_policy(kind, policy, seed, annealed=annealed)
        x, index, gates = routing(container.num_experts, 7, TOP_K, seed)
        expected = slow(container, x, index, gates)
        assert_near(container(x, index, gates), expected, 1e-5)
        if learnt != "none":  # the vectors matter
            with torch.no_grad():
                container.offsets_NV.zero_()
            assert relative_error(container(x, index, gates), expected) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learnt", VECTORS)
def test_gradients_equal_the_formulas_written_out_in_float64(kind, learnt):
    for seed in range(2):
        container = with_policy(
            kind, MainWithVectors(2, learnt, renormalise=seed == 1), seed, torch.float64, annealed=seed == 1
        )
        x, index, gates = routing(container.num_experts, 5, TOP_K, seed, torch.float64)
        x.requires_grad_(True), gates.requires_grad_(True)
        wanted = {"x": x, "gates": gates, **dict(container.named_parameters())}
        direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        found = []
        for forward in (container, lambda *args, container=container: slow(container, *args)):
            loss = (forward(x, index, gates) * direction).sum()
            found.append(torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True))
        for actual, expected in zip(*found, strict=True):
            assert_near(actual, expected, 1e-10)


@pytest.mark.parametrize("learnt", WITH_VECTORS)
def test_gradcheck_by_finite_differences(learnt):
    container = with_policy("swiglu", MainWithVectors(2, learnt, renormalise=True), 1, torch.float64, kept=True)
    x, index, gates = routing(E, 3, TOP_K, 0, torch.float64)
    x.requires_grad_(True), gates.requires_grad_(True)
    offsets = container.offsets_NV.detach().clone().requires_grad_(True)
    del container.offsets_NV

    def forward(x, gates, offsets):
        container.offsets_NV = offsets
        return container(x, index, gates)

    assert torch.autograd.gradcheck(forward, (x, gates, offsets))


@pytest.mark.parametrize("kind", ["swiglu", "no_gate_bias"])
@pytest.mark.parametrize("learnt", VECTORS)
def test_a_norm_after_each_expert_is_the_familys_own(kind, learnt):
    norm = torch.nn.RMSNorm(D)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    for seed in range(3):
        container = with_policy(kind, MainWithVectors(2, learnt), seed)
        container.post_expert_norm = norm
        x, index, gates = routing(container.num_experts, 9, TOP_K, seed)
        assert_near(container(x, index, gates), slow(container, x, index, gates, norm), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learnt", WITH_VECTORS)
def test_vectors_at_one_are_plain_top_k_main_to_the_bit(learnt, dtype):
    """In bfloat16 too, where weighted ones would not sum to one."""
    container = with_policy("swiglu", MainWithVectors(2, learnt), 3, dtype, kept=True)
    with torch.no_grad():
        container.offsets_NV.zero_()
    plain = with_policy("swiglu", None, 3, dtype, kept=True)
    plain.load_state_dict({k: v for k, v in container.state_dict().items() if k != "offsets_NV"})
    x, index, gates = routing(E, 16, TOP_K, 1, dtype)
    order = gates.argsort(dim=1, descending=True, stable=True)[:, :2]
    expected = plain(x, index.gather(1, order), gates.gather(1, order))
    actual = container(x, index, gates)
    if learnt == "hidden":
        assert torch.equal(actual, expected)
    else:  # two halves of a product are summed in another order than the whole
        assert relative_error(actual, expected.float()) < (1e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("learnt", ["projections", "hidden", "none"])
@pytest.mark.parametrize("renormalise", [False, True])
def test_all_experts_main_is_the_layer_without_a_policy(learnt, renormalise):
    container = with_policy("gpt_oss", MainWithVectors(TOP_K, learnt, renormalise), 2)
    plain = copy.deepcopy(container)
    plain.layout = dataclasses.replace(container.layout, routing=None)
    x, index, gates = routing(container.num_experts, 9, TOP_K, 2)
    assert_near(container(x, index, gates), plain(x, index, gates), 1e-6)


def test_renormalised_weights_sum_to_what_all_of_them_sum_to():
    x, index, gates = routing(E, 11, TOP_K, 4)
    kept = route(MainWithVectors(2, "none"), None, x, index, gates, True)
    scaled = route(MainWithVectors(2, "none", True), None, x, index, gates, True)
    torch.testing.assert_close(scaled.weight_TM.sum(1), gates.sum(1))
    torch.testing.assert_close(kept.weight_TM, gates.sort(dim=1, descending=True).values[:, :2])
    assert torch.equal(kept.index_TM, scaled.index_TM)


def test_equal_weights_go_by_position_and_zero_weights_do_no_harm():
    index = torch.tensor([[5, 3, 1, 0]])
    x = torch.randn(1, D, generator=torch.Generator().manual_seed(0))
    offsets = torch.randn(E, D, generator=torch.Generator().manual_seed(1), requires_grad=True)
    tied = route(MainWithVectors(2, "hidden"), offsets, x, index, torch.full((1, 4), 0.25), True)
    assert tied.index_TM.tolist() == [[5, 3]]
    for gates in ([[0.5, 0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 0.0]]):
        gates = torch.tensor(gates, requires_grad=True)
        got = route(MainWithVectors(1, "hidden", True), offsets, x, index, gates, True)
        torch.testing.assert_close(got.inputs[0], x * (1 + offsets[[3, 1, 0]].mean(0)))
        (got.inputs[0].sum() + got.weight_TM.sum()).backward()
        assert bool(gates.grad.isfinite().all()) and bool(offsets.grad.isfinite().all())


@pytest.mark.parametrize("learnt", ["projections", "hidden"])
def test_gradients_reach_only_the_selected_rows(learnt):
    container = with_policy("swiglu", MainWithVectors(2, learnt), 0, kept=True)
    x, index, gates = routing(E, 3, TOP_K, 5)
    order = gates.argsort(dim=1, descending=True)
    auxiliary = set(index.gather(1, order)[:, 2:].flatten().tolist())
    assert 0 < len(auxiliary) < E
    container(x, index, gates).square().sum().backward()
    touched = container.offsets_NV.grad.abs().sum(dim=1).nonzero().flatten().tolist()
    assert set(touched) == auxiliary


@pytest.mark.parametrize("learnt", VECTORS)
@pytest.mark.parametrize("kind", ["swiglu", "gpt_oss", "no_gate"])
def test_numbering_of_experts_does_not_matter(kind, learnt):
    container = with_policy(kind, MainWithVectors(2, learnt), 0, kept=True)
    turned = copy.deepcopy(container)
    order = torch.randperm(E, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for name, tensor in turned.named_parameters():
            if tensor.shape[0] == E:
                tensor.copy_(container.get_parameter(name)[order])
    x, index, gates = routing(E, 9, TOP_K, 6)
    assert_near(turned(x, order.argsort()[index], gates), container(x, index, gates), 1e-6)


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("learnt", VECTORS)
@pytest.mark.parametrize("norm", [False, True])
def test_no_tokens_and_one_token(tokens, learnt, norm):
    container = with_policy("swiglu", MainWithVectors(2, learnt), 3)
    if norm:
        container.post_expert_norm = torch.nn.RMSNorm(D)
    x, index, gates = routing(container.num_experts, tokens, TOP_K)
    x.requires_grad_(True)
    output = container(x, index, gates)
    assert output.shape == (tokens, D) and output.dtype == x.dtype
    output.sum().backward()


@pytest.mark.parametrize("learnt", VECTORS)
def test_bfloat16_stays_within_its_rounding(learnt):
    """As the container's own bound (test_container.py), and two roundings more for the modulated inputs."""
    container = with_policy("swiglu", MainWithVectors(2, learnt), 1, torch.bfloat16)
    x, index, gates = routing(container.num_experts, 16, TOP_K, 1, torch.bfloat16)
    exact = copy.deepcopy(container).double()
    actual = container(x, index, gates)
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual, slow(exact, x.double(), index, gates.double())) < 5 * 2**-8
    with torch.autocast("cpu", torch.bfloat16):
        mixed = copy.deepcopy(container).float()(x.float(), index, gates.float())
    assert relative_error(mixed, slow(exact, x.double(), index, gates.double())) < 5 * 2**-8


def test_small_steps_from_one_survive_being_saved_in_bfloat16():
    """A vector of 1.001 is 1 in bfloat16; stored as what it is more than one, a float32 model has it back."""
    offsets = torch.full((E, D), 0.001).bfloat16()
    x, index, gates = routing(E, 40, TOP_K, 0)
    moved = route(MainWithVectors(2, "hidden"), offsets.float(), x, index, gates, True).inputs[0] / x
    assert float(torch.tensor(1.001).bfloat16()) == 1.0
    torch.testing.assert_close(moved, torch.full_like(x, 1.001), atol=1e-5, rtol=0)


def test_nothing_larger_than_what_is_needed_is_made():
    """No [T, K, 3, D]: the largest tensor that the policy makes for T tokens is theta, [T, 2D + F]."""
    container = with_policy("swiglu", MainWithVectors(2), 0, kept=True)
    x, index, gates = routing(E, 64, TOP_K, 0)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            nonlocal largest
            result = function(*arguments, **(options or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        route(container.layout.routing, getattr(container, "offsets_NV", None), x, index, gates, True)
    assert largest == 64 * (2 * D + F)


def test_a_policy_does_not_change_a_layer_that_has_none():
    container = with_policy("swiglu", None, 2)
    x, index, gates = routing(container.num_experts, 9, TOP_K, 2)
    expected = slow_experts(lambda e: expert_parts(container, e), container.activate, x, index, gates)
    assert_near(container(x, index, gates), expected, 1e-5)
    assert "offsets_NV" not in container.state_dict() and "routing" not in container.layout.to_json()
