"""The arithmetic on weights: means, alignment, adapters, and a layer built from a plan computes what the plan says."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.nn import functional

from locum.containers.build import build_layer, old_weights
from locum.containers.container import StandInExperts
from locum.errors import CheckpointError, PlanError, StatisticsError
from locum.experts.factors import gaussian_factors, svd_factors, whitened_factors
from locum.experts.parts.low_rank import RIDGE, LowRank
from locum.experts.weights import ExpertWeights, align, mean_expert, permute_hidden
from locum.plans.plan import KEPT, Base, LayerPlan, stand_in
from locum.shapes import LayerShape
from locum.stats.sums import LayerStatistics
from making.oracles import expert_parts, random_layer_plan
from making.slots import base_of, has_constant, rank_of, start_of

D, F, E = 12, 10, 8
KINDS = {"gate": (True, False), "gate and bias": (True, True), "no gate": (False, False), "only bias": (False, True)}


def draw(*shape, generator, dtype=torch.float32):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def expert(seed, has_gate=True, has_bias=False, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    gate, up, down = (draw(*s, generator=g, dtype=dtype) for s in ((F, D), (F, D), (D, F)))
    gate_bias, up_bias, down_bias = (draw(n, generator=g, dtype=dtype) for n in (F, F, D))
    return ExpertWeights(
        gate if has_gate else None,
        up,
        down,
        gate_bias if has_gate and has_bias else None,
        up_bias if has_bias else None,
        down_bias if has_bias else None,
    )


def adapter_of(rank, start, old, over, generator):
    """The row of one adapter, from an expert and what stands beside the adapter."""
    site = SimpleNamespace(original=lambda e: old, others=lambda e: over, generator=generator)
    return SimpleNamespace(**LowRank(rank, start).build(0, site))


def run(weights, x):
    def first(weight, bias):
        return weight @ x + (0 if bias is None else bias)

    up = first(weights.up_FD, weights.up_bias_F)
    hidden = (
        functional.relu(up) if weights.gate_FD is None else torch.tanh(first(weights.gate_FD, weights.gate_bias_F)) * up
    )
    return weights.down_DF @ hidden + (0 if weights.down_bias_D is None else weights.down_bias_D)


def tensors_of(weights):
    return {name: t for name, t in vars(weights).items() if t is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_mean_of_experts(kind):
    experts = [expert(s, *KINDS[kind]) for s in range(3)]
    mean = mean_expert(experts, [0.5, 0.3, 0.2])
    for name, tensor in tensors_of(mean).items():
        a, b, c = (getattr(e, name) for e in experts)
        torch.testing.assert_close(tensor, 0.5 * a + 0.3 * b + 0.2 * c)
    assert tensors_of(mean).keys() == tensors_of(experts[0]).keys()


def test_mean_of_bfloat16_is_summed_in_float32():
    experts = [expert(s, dtype=torch.bfloat16) for s in range(4)]
    mean = mean_expert(experts, [0.25] * 4)
    exact = sum(e.up_FD.double() for e in experts) / 4
    assert mean.up_FD.dtype == torch.bfloat16
    assert torch.equal(mean.up_FD, exact.float().bfloat16())  # one rounding, at the end


@pytest.mark.parametrize("kind", KINDS)
def test_permuting_hidden_units_keeps_the_function(kind):
    weights = expert(0, *KINDS[kind])
    order = torch.randperm(F, generator=torch.Generator().manual_seed(1))
    x = draw(D, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(run(permute_hidden(weights, order), x), run(weights, x))


@pytest.mark.parametrize("kind", KINDS)
def test_alignment_undoes_a_permutation(kind):
    reference = expert(0, *KINDS[kind])
    noise = expert(1, *KINDS[kind])
    noisy = reference.map(lambda name, t: t + 0.05 * getattr(noise, name))
    order = torch.randperm(F, generator=torch.Generator().manual_seed(1))
    found = align(permute_hidden(noisy, order), reference)
    for name, tensor in tensors_of(found).items():
        assert torch.equal(tensor, getattr(noisy, name))


def test_alignment_finds_the_best_matching():
    """Against all 5! permutations."""
    reference, other = (e.map(lambda name, t: t[:, :5] if name == "down_DF" else t[:5]) for e in (expert(0), expert(1)))

    def likeness(candidate):
        names = ("gate_FD", "up_FD", "down_DF")
        return sum(
            float((getattr(candidate, n) * getattr(reference, n)).sum())
            / float(getattr(candidate, n).norm() * getattr(reference, n).norm())
            for n in names
        )

    best = max(likeness(permute_hidden(other, torch.tensor(p))) for p in itertools.permutations(range(5)))
    assert likeness(align(other, reference)) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(9, 7), (7, 9)])
def test_svd_factors_are_the_best_of_their_rank(rows, columns):
    matrix = draw(rows, columns, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(matrix)
    for rank in (1, 3, 7):
        a, b = svd_factors(matrix, rank)
        assert a.shape == (rank, columns) and b.shape == (rows, rank)
        error = float((matrix - b @ a).norm())
        assert error == pytest.approx(float(values[rank:].norm()), abs=1e-5)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))  # shared evenly


def gram(size, tokens, seed=0, dtype=torch.float64):
    x = draw(tokens, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    x = x * torch.logspace(0, -2, size, dtype=dtype)  # inputs that differ much in size
    return x.T @ x


def slow_whitened(matrix, gram_II, rank):
    """SVD-LLM to the letter: truncate the SVD of W S, S the Cholesky factor of the Gram; then undo S."""
    s = torch.linalg.cholesky(gram_II)
    u, sigma, vh = torch.linalg.svd(matrix.double() @ s, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vh[:rank] @ torch.linalg.inv(s)


@pytest.mark.parametrize(("rows", "columns"), [(9, 7), (7, 9)])
def test_whitened_factors_equal_svd_llm(rows, columns):
    matrix = draw(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram_II = gram(columns, 200)
    for rank in (1, 3, 7):
        a, b = whitened_factors(matrix, gram_II, rank)
        assert a.shape == (rank, columns) and b.shape == (rows, rank)
        torch.testing.assert_close(b @ a, slow_whitened(matrix, gram_II, rank), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))  # shared evenly
    torch.testing.assert_close(b @ a, matrix)  # full rank


def test_a_ridge_is_inputs_of_every_direction():
    """A share of the mean square of an input, in every input: the Gram matrix of text that nobody saw. All of it is the plain SVD."""
    for rows, columns, rank in ((9, 7, 3), (450, 470, 8)):  # by eigenvectors, in steps
        matrix = draw(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        gram_II = gram(columns, 600)
        mixed_II = gram_II + 0.1 * gram_II.diagonal().mean() * torch.eye(columns)
        root_II = torch.linalg.cholesky(mixed_II)

        def left(factors, matrix=matrix, root_II=root_II):
            return float(((matrix - factors[1] @ factors[0]) @ root_II).square().sum())

        with_ridge, without = (whitened_factors(matrix, gram_II, rank, ridge) for ridge in (0.1, 1e-6))
        assert left(with_ridge) == pytest.approx(
            left((torch.eye(columns, dtype=torch.float64), slow_whitened(matrix, mixed_II, rank))), rel=2e-3
        )
        assert left(with_ridge) < left(without)
    a, b = whitened_factors(matrix, gram_II, rank, 1e9)
    plain_a, plain_b = svd_factors(matrix, rank)
    assert float((b @ a - matrix).norm()) == pytest.approx(float((plain_b @ plain_a - matrix).norm()), rel=1e-4)


@pytest.mark.parametrize("seed", range(10))
def test_whitened_factors_lose_less_of_the_outputs_than_plain_ones(seed):
    matrix = draw(10, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tokens = draw(80, 12, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64)
    tokens = tokens * torch.logspace(0, -2, 12)
    for rank in (1, 4, 8):
        losses = []
        for a, b in (whitened_factors(matrix, tokens.T @ tokens, rank), svd_factors(matrix, rank)):
            losses.append(float((tokens @ (matrix - b.double() @ a.double()).T).norm()))
        assert losses[0] < losses[1]


def test_whitening_with_nothing_to_whiten_is_the_plain_svd():
    """A Gram that is a multiple of the identity, and one without any token."""
    matrix = draw(9, 7, generator=torch.Generator().manual_seed(0))
    a, b = svd_factors(matrix, 3)
    for gram_II in (5.0 * torch.eye(7), torch.zeros(7, 7)):
        white_a, white_b = whitened_factors(matrix, gram_II.double(), 3)
        torch.testing.assert_close(white_b @ white_a, b @ a, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(white_a.norm(dim=1), a.norm(dim=1))


def test_whitening_with_fewer_tokens_than_inputs_is_exact_on_them_and_uses_the_rest_of_the_rank():
    matrix = draw(9, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = draw(3, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for rank in (3, 6):
        a, b = whitened_factors(matrix, tokens.T @ tokens, rank)
        torch.testing.assert_close(tokens @ (b @ a).T, tokens @ matrix.T, atol=1e-3, rtol=1e-3)
    a3, b3 = whitened_factors(matrix, tokens.T @ tokens, 3)
    assert float((matrix - b @ a).norm()) < float((matrix - b3 @ a3).norm()) - 0.5


def test_a_matrix_of_low_rank_is_reproduced_by_it_whatever_its_inputs():
    g = torch.Generator().manual_seed(0)
    matrix = draw(20, 3, generator=g) @ draw(3, 16, generator=g)
    for gram_II in (gram(16, 100), gram(16, 5), torch.zeros(16, 16)):
        a, b = whitened_factors(matrix, gram_II, 3)
        torch.testing.assert_close(b @ a, matrix, atol=1e-4, rtol=1e-3)
    a, b = whitened_factors(matrix, gram(16, 100), 2)
    assert float((b @ a - matrix).norm()) > 0.1
    a, b = whitened_factors(matrix.bfloat16(), gram(16, 100), 3)
    assert a.dtype == b.dtype == torch.bfloat16


@pytest.mark.parametrize("decay", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("tall", [False, True])
def test_factors_of_a_small_rank_are_almost_the_best(decay, tall):
    """They are found in steps. The oracle is LAPACK's SVD, of a flat spectrum, a falling and a steep one."""
    generator = torch.Generator().manual_seed(0)
    matrix = draw(450, 470, generator=generator, dtype=torch.float64)
    if decay:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        matrix = u * torch.arange(1, len(s) + 1) ** -decay @ v
    matrix = matrix.T.contiguous() if tall else matrix
    gram_II = gram(matrix.shape[1], 300)
    root_II = torch.linalg.cholesky(gram_II + 1e-6 * gram_II.diagonal().mean() * torch.eye(len(gram_II)))
    for factors, seen in ((svd_factors(matrix, 8), matrix), (whitened_factors(matrix, gram_II, 8), matrix @ root_II)):
        a, b = factors
        assert a.shape == (8, matrix.shape[1]) and b.shape == (len(matrix), 8)
        left = (matrix - b @ a) @ (root_II if seen is not matrix else torch.eye(len(root_II), dtype=torch.float64))
        least = torch.linalg.svdvals(seen)[8:].square().sum()
        assert left.square().sum() <= (1.0001 if decay else 1.002) * least
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-5, atol=1e-5)


def test_a_small_rank_of_a_large_matrix_may_have_nothing_left_or_nothing_at_all():
    generator = torch.Generator().manual_seed(0)
    matrix = draw(480, 3, generator=generator) @ draw(3, 460, generator=generator)
    for gram_II in (gram(460, 100), torch.zeros(460, 460)):
        for a, b in (svd_factors(matrix, 5), whitened_factors(matrix, gram_II, 5)):
            torch.testing.assert_close(b @ a, matrix, atol=1e-4, rtol=1e-4)
    for a, b in (svd_factors(0 * matrix, 5), whitened_factors(0 * matrix, gram(460, 100), 5)):
        assert not a.any() and not b.any()
    with pytest.raises(torch.linalg.LinAlgError, match="not finite"):
        svd_factors(matrix * torch.nan, 5)


def test_gaussian_factors_start_at_nothing():
    a, b = gaussian_factors(200, 300, 50, torch.zeros(1), torch.Generator().manual_seed(0))
    assert not b.any()
    assert float(a.var()) == pytest.approx(1 / 300, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_from_svd_at_full_rank_is_the_expert(kind):
    old, base = expert(0, *KINDS[kind]), expert(1, *KINDS[kind])
    rank = min(D, F)
    for over in (base, None):
        adapter = adapter_of(rank, "svd", old, over, torch.Generator())
        a = adapter.gate_up_A
        products = {"up_FD": adapter.up_B_FR @ a[-rank:], "down_DF": adapter.down_B_DR @ adapter.down_A_RF}
        if old.gate_FD is not None:
            products["gate_FD"] = adapter.gate_B_FR @ a[:rank]
        for name, product in products.items():
            rest = getattr(old, name) - (0 if over is None else getattr(over, name))
            torch.testing.assert_close(product, rest, atol=1e-4, rtol=1e-4)


def test_gaussian_adapter_over_nothing_can_learn():
    """B = 0 in all three projections would make every gradient exactly zero."""
    old = expert(0)
    adapter = adapter_of(4, "gaussian", old, None, torch.Generator().manual_seed(0))
    leaves = [t.clone().requires_grad_(True) for t in vars(adapter).values()]
    a, gate_b, up_b, down_a, down_b = leaves
    x = draw(D, generator=torch.Generator().manual_seed(1))
    y = down_b @ (down_a @ (torch.tanh(gate_b @ (a[:4] @ x)) * (up_b @ (a[4:] @ x))))
    y.sum().backward()
    assert all(leaf.grad.abs().max() > 0 for leaf in leaves)
    variance = torch.stack(
        [
            (t.up_B_FR @ t.gate_up_A[4:]).var()
            for t in (adapter_of(4, "gaussian", old, None, torch.Generator().manual_seed(s)) for s in range(200))
        ]
    ).mean()
    assert float(variance) == pytest.approx(float(old.up_FD.var()), rel=0.15)


def layer_shape(kind):
    has_gate, has_bias = KINDS[kind]
    return LayerShape("experts", E, 2, D, F, "router", "softmax", True, has_gate=has_gate, has_bias=has_bias)


def observed(shape, **sums):
    return LayerStatistics(shape, {name: torch.as_tensor(value).double() for name, value in sums.items()})


def build(plan, shape, read, layer=None, seed=0):
    layout, tensors = build_layer(plan, shape, read, layer, seed)
    container = StandInExperts(layout, torch.relu, torch.float32, "meta")
    container.load_state_dict(tensors, strict=True, assign=True)
    return container


@pytest.mark.parametrize("kind", KINDS)
def test_a_built_layer_holds_what_its_plan_says(kind):
    """Written out per expert: kept is the expert; a stand-in its base (+ the SVD of the rest, or nothing) + constant."""
    shape = layer_shape(kind)
    experts = [expert(s, *KINDS[kind]) for s in range(E)]
    means = draw(E, D, generator=torch.Generator().manual_seed(5))
    layer = observed(shape, output_sum=means, count=torch.ones(E))
    for seed in range(12):
        plan = random_layer_plan(shape, seed)
        container = build(plan, shape, experts.__getitem__, layer, seed)
        old = old_weights(plan, experts.__getitem__)
        for new, e in enumerate(plan.survivors):
            slot, parts = plan.slots[e], expert_parts(container, new)
            expected = experts[e] if slot.is_kept else slow_stand_in(slot, plan, experts, old[e], shape)
            if expected is not None:
                near = (
                    2e-3 if start_of(slot) == "svd" else 2e-5
                )  # float32 turns singular vectors of nearly equal values
                for part, value in expected_parts(expected, shape).items():
                    torch.testing.assert_close(parts[part], value, atol=near, rtol=1e-4)
            constant = means[e] if has_constant(slot) else torch.zeros(D)
            torch.testing.assert_close(parts["c"], constant)


def expected_parts(weights, shape):
    g = shape.gate_width
    b1, b2 = (torch.zeros(g), torch.zeros(D)) if not shape.has_bias else (weights.gate_up_bias_G, weights.down_bias_D)
    return {"W1": weights.gate_up_GD, "W2": weights.down_DF, "b1": b1, "b2": b2}


def slow_stand_in(slot, plan, experts, old, shape):
    """None where chance decides (a gaussian adapter over nothing)."""
    # An adapter without a base keeps the biases of its expert; a constant alone has none.
    base = experts[0].map(lambda n, t: getattr(old, n) if rank_of(slot) and "bias" in n else torch.zeros_like(t))
    if base_of(slot) is not None:
        spec = plan.bases[base_of(slot)]
        members = [experts[e] for e in spec.experts]
        if spec.align:
            heaviest = members[spec.weights.index(max(spec.weights))]
            members = [align(m, heaviest) for m in members]
        base = mean_expert(members, list(spec.weights))
    if not rank_of(slot):
        return base
    if start_of(slot) == "gaussian":
        return base if base_of(slot) is not None else None

    def add(name, t):
        if "bias" in name:
            return t
        u, s, v = torch.linalg.svd((getattr(old, name) - t).double(), full_matrices=False)
        return t + (u[:, : rank_of(slot)] * s[: rank_of(slot)] @ v[: rank_of(slot)]).float()

    return base.map(add)


def test_building_is_deterministic_for_a_seed():
    shape, experts = layer_shape("gate"), [expert(s) for s in range(E)]
    plan = LayerPlan("experts", (KEPT, *[stand_in(0, 3)] * 7), (Base((1, 2), (0.5, 0.5)),))
    one, two, other = (build_layer(plan, shape, experts.__getitem__, None, seed)[1] for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["adapters.0.gate_up_A"], other["adapters.0.gate_up_A"])


def test_constants_need_statistics():
    plan = LayerPlan("experts", (stand_in(constant=True), *[KEPT] * 7))
    with pytest.raises(PlanError, match=r"made from statistics \(constant\), .*missing: output_sum, count"):
        build_layer(plan, layer_shape("gate"), [expert(s) for s in range(E)].__getitem__, None, 0)


# --- whitened layers ----------------------------------------------------------------------------------------------


def grams(shape):
    pairs = (("input_gram", D), ("hidden_gram", F))
    return observed(shape, **{name: torch.stack([gram(n, 50, seed=e) for e in range(E)]) for name, n in pairs})


@pytest.mark.parametrize("align_base", [False, True])
def test_whitened_adapters_are_those_of_each_expert_and_its_own_inputs(align_base):
    """With a base, of what it leaves over; with an aligned one, hidden units and their Gram are reordered alike."""
    shape, experts = layer_shape("gate"), [expert(s) for s in range(E)]
    statistics = grams(shape)
    over = stand_in(0, 3, "whitened")
    base = Base((4, 5, 6), (0.2, 0.5, 0.3), align=align_base)
    plan = LayerPlan("experts", (KEPT,) * 4 + (over, over, over, stand_in(None, 3, "whitened")), (base,))
    container = build(plan, shape, experts.__getitem__, statistics)
    old = old_weights(plan, experts.__getitem__)
    mean = mean_expert([old[e] for e in base.experts], list(base.weights))
    zero = mean.map(lambda _, t: torch.zeros_like(t))
    for e, under in ((4, mean), (5, mean), (6, mean), (7, zero)):
        parts = expert_parts(container, e)
        units = [int((experts[e].up_FD == row).all(dim=1).nonzero()) for row in old[e].up_FD]  # where each came from
        assert (units == list(range(F))) == (not align_base or e in (5, 7))
        given = {"up_FD": statistics["input_gram"][e], "gate_FD": statistics["input_gram"][e]}
        given["down_DF"] = statistics["hidden_gram"][e][units][:, units]
        found = {"gate_FD": parts["W1"][:F], "up_FD": parts["W1"][F:], "down_DF": parts["W2"]}
        for name, weight in found.items():
            a, b = whitened_factors(getattr(old[e], name) - getattr(under, name), given[name], 3, RIDGE)
            torch.testing.assert_close(weight, getattr(under, name) + b @ a, atol=1e-4, rtol=1e-4)


def test_whitened_adapters_need_finite_grams():
    shape, read = layer_shape("gate"), [expert(s) for s in range(E)].__getitem__
    plan = LayerPlan("experts", (KEPT,) * 7 + (stand_in(None, 3, "whitened"),))
    assert plan.needs == ("input_gram", "hidden_gram")
    with pytest.raises(PlanError, match=r"\(rank 3 \(whitened\)\), .*missing: input_gram, hidden_gram"):
        build_layer(plan, shape, read)
    with pytest.raises(PlanError, match=r"missing: hidden_gram"):
        build_layer(plan, shape, read, observed(shape, input_gram=grams(shape)["input_gram"]))
    bad = {name: tensor.clone() for name, tensor in grams(shape).items()}
    bad["hidden_gram"][2, 1, 1] = torch.inf
    with pytest.raises(StatisticsError, match="not finite"):
        build_layer(plan, shape, read, observed(shape, **bad))


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("start", ["gaussian", "svd", "whitened"])
def test_weights_that_are_not_finite_are_refused_by_expert(number, align, start):
    shape, experts = layer_shape("gate"), [expert(s) for s in range(E)]
    experts[6].down_DF[1, 1] = number
    slots = (KEPT,) * 5 + (stand_in(0, 3, start),) * 3
    plan = LayerPlan("experts", slots, (Base((5, 6, 7), (0.2, 0.3, 0.5), align),))
    with pytest.raises(CheckpointError, match="expert 6 of experts are not finite"):
        build_layer(plan, shape, experts.__getitem__, observed(shape, **grams(shape)))


@pytest.mark.parametrize("rank", [2, D])  # some eigenvectors are found by scipy, most of them by torch
def test_weights_that_cannot_be_factored_are_refused_by_expert(monkeypatch, rank):
    def fail(*_, **__):
        raise (
            np.linalg.LinAlgError("it did not converge")
            if rank == 2
            else torch.linalg.LinAlgError("it did not converge")
        )

    monkeypatch.setattr(scipy.linalg if rank == 2 else torch.linalg, "eigh", fail)
    plan = LayerPlan("experts", (KEPT,) * 7 + (stand_in(None, rank, "svd"),))
    with pytest.raises(CheckpointError, match=r"expert 7 of experts .*did not converge.*--start gaussian"):
        build_layer(plan, layer_shape("gate"), [expert(s) for s in range(E)].__getitem__)


def test_old_weights_are_in_the_hidden_order_of_their_base():
    experts = [expert(s) for s in range(E)]
    plan = LayerPlan("experts", (KEPT,) * 5 + (stand_in(0, 2),) * 3, (Base((5, 6, 7), (0.2, 0.5, 0.3), align=True),))
    old = old_weights(plan, experts.__getitem__)
    assert sorted(old) == [5, 6, 7]
    x = draw(D, generator=torch.Generator().manual_seed(2))
    for e in old:
        torch.testing.assert_close(run(old[e], x), run(experts[e], x))
        assert torch.equal(old[e].up_FD, align(experts[e], experts[6]).up_FD)
