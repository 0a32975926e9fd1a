"""The container against weights written out, token by token; and that work on a shared base is really shared."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch

from locum.containers.layout import Layout
from locum.errors import UnsupportedModel
from locum.experts.policies.main_with_vectors import MainWithVectors
from locum.plans.plan import KEPT, NOTHING, LayerPlan
from making.containers import (
    KINDS,
    D,
    E,
    assert_near,
    filled,
    layer_shape,
    random_container,
    relative_error,
    routing,
    shared_base_container,
    slow,
    swiglu,
)
from making.oracles import expert_parts, slow_experts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("annealed", [False, True])
def test_output_equals_written_out_weights(kind, annealed):
    for seed in range(8):
        container = random_container(kind, seed, annealed=annealed)
        x, index, gates = routing(container.num_experts, 9, 3, seed)
        assert_near(container(x, index, gates), slow(container, x, index, gates), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("annealed", [False, True])
def test_gradients_equal_written_out_weights_in_float64(kind, annealed):
    for seed in range(4):
        container = random_container(kind, seed, torch.float64, annealed)
        x, index, gates = routing(container.num_experts, 6, 3, seed, torch.float64)
        x.requires_grad_(True), gates.requires_grad_(True)
        wanted = {"x": x, "gates": gates, **dict(container.named_parameters())}
        direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

        def gradients(forward, wanted=wanted, direction=direction, x=x, index=index, gates=gates):
            loss = (forward(x, index, gates) * direction).sum()
            found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
            return dict(zip(wanted, found, strict=True))

        expected = gradients(lambda *args, container=container: slow(container, *args))
        for name, gradient in gradients(container).items():
            assert_near(gradient, expected[name], 1e-10)


def test_gradcheck_by_finite_differences():
    container = random_container("swiglu", 2, torch.float64, annealed=True)
    x, index, gates = routing(container.num_experts, 3, 2, 0, torch.float64)
    x.requires_grad_(True), gates.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x, g: container(x, index, g), (x, gates))


@pytest.mark.parametrize("kind", ["swiglu", "gpt_oss"])
def test_bfloat16_stays_within_its_rounding(kind):
    """Against float64 on the same bfloat16 numbers, norm against norm.

    One rounding errs by at most u = 2^-8, uniformly, so by u / sqrt(3) in the mean square. On the way from x to y a
    value is rounded some 10 times (base product, A, B, their sum, activation, product with up, gate, sum over members,
    A, B), twice of these squared through gate * up: sqrt(12) u / sqrt(3) = 2u. The bound is 4u, 1.6 %.
    """
    for seed in range(6):
        container = random_container(kind, seed, torch.bfloat16)
        x, index, gates = routing(container.num_experts, 16, 3, seed, torch.bfloat16)
        exact = copy.deepcopy(container).double()
        expected = slow(exact, x.double(), index, gates.double())
        actual = container(x, index, gates)
        assert actual.dtype == torch.bfloat16
        assert relative_error(actual, expected) < 4 * 2**-8


def test_router_weights_of_another_dtype_are_taken_as_they_are():
    """Sigmoid routers give float32 weights to bfloat16 experts."""
    container = random_container("swiglu", 1, torch.bfloat16)
    x, index, gates = routing(container.num_experts, 8, 2)
    actual = container(x.bfloat16(), index, gates)
    expected = slow(copy.deepcopy(container).float(), x.bfloat16().float(), index, gates)
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual, expected) < 4 * 2**-8


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("annealed", [False, True])
def test_no_tokens_and_one_token(tokens, kind, annealed):
    container = random_container(kind, 3, annealed=annealed)
    x, index, gates = routing(container.num_experts, tokens, 2)
    x.requires_grad_(True)
    output = container(x, index, gates)
    assert output.shape == (tokens, D) and output.dtype == x.dtype
    assert_near(output, slow(container, x, index, gates), 1e-5)
    output.sum().backward()


def test_all_tokens_to_one_expert_and_most_experts_never_selected():
    for seed in range(6):
        container = random_container("gpt_oss", seed)
        for e in range(container.num_experts):
            x, _, gates = routing(container.num_experts, 5, 1, seed)
            index = torch.full((5, 1), e)
            assert_near(container(x, index, gates), slow(container, x, index, gates), 1e-5)


def test_one_expert_selected_twice_for_a_token_counts_twice():
    for seed in range(4):
        container = random_container("swiglu", seed)
        x, index, gates = routing(container.num_experts, 7, 4, seed, distinct=False)
        index[:, 1] = index[:, 0]
        gates[:, 1] = gates[:, 0]
        assert_near(container(x, index, gates), slow(container, x, index, gates), 1e-5)


def test_several_members_of_one_base_for_the_same_token():
    container = shared_base_container(constant=True)
    x, _, gates = routing(E, 6, 3)
    index = torch.tensor([[5, 7, 4]] * 6)
    assert_near(container(x, index, gates), slow(container, x, index, gates), 1e-5)


@pytest.mark.parametrize("annealed", [False, True])
def test_a_norm_after_each_expert_is_the_familys_own(annealed):
    norm = torch.nn.RMSNorm(D)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    for seed in range(6):
        container = random_container("swiglu", seed, annealed=annealed)
        x, index, gates = routing(container.num_experts, 9, 3, seed)
        container.post_expert_norm = norm
        expected = slow_experts(lambda e, c=container: expert_parts(c, e), swiglu, x, index, gates, norm)
        assert_near(container(x, index, gates), expected, 1e-5)


def test_experts_that_are_nothing_add_nothing():
    container = filled(Layout.of(LayerPlan("experts", (NOTHING,) * E), layer_shape()), swiglu)
    assert list(container.parameters()) == []
    x, index, gates = routing(E, 5, 2)
    assert torch.equal(container(x, index, gates), torch.zeros_like(x))


def test_the_same_call_gives_the_same_bits():
    container = random_container("swiglu", 5)
    x, index, gates = routing(container.num_experts, 20, 3)
    assert torch.equal(container(x, index, gates), container(x, index, gates))


def test_tokens_do_not_influence_each_other():
    container = random_container("gpt_oss", 6)
    x, index, gates = routing(container.num_experts, 12, 3)
    together = container(x, index, gates)
    alone = torch.cat([container(x[t : t + 1], index[t : t + 1], gates[t : t + 1]) for t in range(12)])
    assert_near(together, alone, 1e-5)


def test_autocast_and_half():
    container = random_container("swiglu", 7)
    x, index, gates = routing(container.num_experts, 8, 2)
    expected = slow(container, x, index, gates)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = container(x, index, gates)
    assert relative_error(mixed, expected) < 4 * 2**-8
    half = copy.deepcopy(container).half()
    output = half(x.half(), index, gates.half())
    assert output.dtype == torch.float16
    assert relative_error(output, expected) < 4 * 2**-11


def test_state_dict_has_the_layouts_names_and_survives_a_deepcopy():
    container = random_container("gpt_oss", 1)
    expected = container.layout.tensor_shapes()
    assert {name: tuple(t.shape) for name, t in container.state_dict().items()} == expected
    twin = copy.deepcopy(container)
    x, index, gates = routing(container.num_experts, 8, 2)
    assert torch.equal(twin(x, index, gates), container(x, index, gates))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("annealed", [False, True])
@pytest.mark.parametrize("tokens", [0, 5])
def test_what_no_token_used_has_a_gradient_of_zeros(kind, annealed, tokens):
    """As fused stock experts have: data-parallel training waits for the gradient of every parameter."""
    container = random_container(kind, 3, annealed=annealed)
    x, _, gates = routing(container.num_experts, tokens, 1)
    index, gates = torch.zeros(tokens, 1, dtype=torch.long), gates.requires_grad_()
    wanted = {"gates": gates, **dict(container.named_parameters())}
    container(x, index, gates).sum().backward()
    loss = slow(container, x, index, gates).sum()
    there = [tensor for tensor in wanted.values() if loss.requires_grad]
    expected = torch.autograd.grad(loss, there, allow_unused=True, materialize_grads=True) if there else ()
    for name, gradient in zip(wanted, expected or [torch.zeros_like(t) for t in wanted.values()], strict=True):
        assert wanted[name].grad is not None, name
        assert_near(wanted[name].grad, gradient, 1e-4)


def test_a_layer_of_mere_nothings_hands_its_router_a_gradient():
    container = filled(Layout.of(LayerPlan("experts", (NOTHING,) * E), layer_shape()), swiglu)
    x, index, gates = routing(E, 5, 2)
    container(x, index, gates.requires_grad_()).sum().backward()
    assert torch.equal(gates.grad, torch.zeros_like(gates))


def test_vectors_that_no_token_used_have_a_gradient_of_zeros():
    plan = LayerPlan("experts", (KEPT,) * E, routing=MainWithVectors(2))
    container = filled(Layout.of(plan, layer_shape()), swiglu)
    x, index, gates = routing(E, 5, 2)  # both run, and leave nothing to vectors
    container(x, index, gates).sum().backward()
    assert torch.equal(container.offsets_NV.grad, torch.zeros_like(container.offsets_NV))


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_come_through_the_modules_that_hold_them(kind):
    """Hooks of accelerate put weights on a device for one call of a module, and take them away after it."""
    container = random_container(kind, 4)
    x, index, gates = routing(container.num_experts, 9, 3)
    with torch.no_grad():
        expected = container(x, index, gates)
        accelerate.cpu_offload(container, torch.device("cpu"))
        assert {p.device.type for p in container.parameters()} == {"meta"}
        assert torch.equal(container(x, index, gates), expected)


@pytest.mark.parametrize("tokens", [1, 400])
def test_weights_that_are_elsewhere_are_refused(tokens):
    """Compiled products are handed addresses, and memory that holds nothing has none."""
    container = random_container("swiglu", 0).to("meta")
    with torch.no_grad(), pytest.raises((UnsupportedModel, RuntimeError, NotImplementedError)):
        container(*routing(container.num_experts, tokens, 2))
