"""Policies that run fewer experts, or others: each against its rule written out token by token, and at its limits.

Letters: T tokens, K top-k, E experts.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from locum.containers.container import StandInExperts
from locum.containers.costs import container_work
from locum.containers.layout import Layout
from locum.errors import OptionError, PlanError
from locum.experts.policies.group_local import GroupLocal
from locum.experts.policies.in_turn import InTurn
from locum.experts.policies.main_with_vectors import MainWithVectors
from locum.experts.policies.policy import Policy, read_policy
from locum.experts.policies.skip import Skip
from locum.experts.policies.soft_lora import SoftLora
from locum.experts.policies.top_p import TopP
from locum.plans.plan import DROPPED, KEPT, LayerPlan
from making.containers import D, E, F, assert_near, filled, layer_shape, routing, swiglu

TOP_K = 4
COUNTS = SimpleNamespace(num_experts=E, hidden_size=D, expert_width=F, has_gate=True)
SHAPE = dataclasses.replace(layer_shape(), top_k=TOP_K)


def routed(policy: Policy, index: torch.Tensor, gates: torch.Tensor) -> list[dict[int, float]]:
    """Of every token, the experts that run and their weights."""
    made = policy.route(COUNTS, {}, torch.zeros(len(index), D), index, gates)
    rows = zip(made.index_TM.tolist(), made.weight_TM.tolist(), strict=True)
    return [{e: w for e, w in zip(*row, strict=True) if e >= 0} for row in rows]


def assert_routed(policy: Policy, index: torch.Tensor, gates: torch.Tensor, run: list[list[int]]) -> None:
    """These experts run, in the places `run` of what was selected, with the weights that they are to have."""
    for t, found in enumerate(routed(policy, index, gates)):
        scale = sum(gates[t].tolist()) / sum(float(gates[t, k]) for k in run[t]) if policy.renormalise else 1.0
        assert found == pytest.approx({int(index[t, k]): float(gates[t, k]) * scale for k in run[t]}, rel=1e-5)


def slow_top_p(gates: list[float], p: float, of: str) -> list[int]:
    """The paper's own words: the smallest set of experts whose probability exceeds p."""
    order = sorted(range(len(gates)), key=lambda k: (-gates[k], k))
    taken, total = [], 0.0
    for k in order:
        taken.append(k)
        total += gates[k]
        if total > p * (sum(gates) if of == "selected" else 1.0):
            break
    return taken


def slow_skip(gates: list[float], threshold: float, beside: str) -> list[int]:
    best = max(gates)
    bar = threshold * (best if beside == "heaviest" else sum(gates))
    return [k for k, gate in enumerate(gates) if gate >= bar or gate == best]


@pytest.mark.parametrize("of", ["selected", "all"])
@pytest.mark.parametrize("renormalise", [False, True])
def test_top_p_takes_the_smallest_prefix_that_exceeds_p(of, renormalise):
    _, index, gates = routing(E, 60, TOP_K, 1)
    for p in (0.0, 0.3, 0.55, 0.9, 1.0, 1.5):
        run = [slow_top_p(row, p, of) for row in gates.tolist()]
        assert_routed(TopP(p, of, renormalise), index, gates, run)
        assert p != 0.55 or len({len(ks) for ks in run}) > 1  # tokens differ


@pytest.mark.parametrize("beside", ["heaviest", "selected"])
@pytest.mark.parametrize("renormalise", [False, True])
def test_skipping_leaves_those_that_weigh_little(beside, renormalise):
    _, index, gates = routing(E, 60, TOP_K, 2)
    for threshold in (0.0, 0.1, 0.2, 0.5, 0.9, 1.0):
        run = [slow_skip(row, threshold, beside) for row in gates.tolist()]
        assert_routed(Skip(threshold, beside, renormalise), index, gates, run)


def test_naee_with_two_experts_is_its_code():
    """w_2 < beta w_1 is skipped, and weights are divided by their sum again (Expert_Sparsity, model/wrapper.py)."""
    _, index, gates = routing(E, 100, 2, 3)
    gates = gates.sort(dim=1, descending=True).values
    gates = gates / gates.sum(dim=1, keepdim=True)
    expected = []
    for e, (one, two) in zip(index.tolist(), gates.tolist(), strict=True):
        expected.append({e[0]: 1.0} if two < 0.4 * one else {e[0]: one, e[1]: two})
    found = routed(Skip(0.4, renormalise=True), index, gates)
    assert [sorted(x) for x in found] == [sorted(x) for x in expected] and {len(x) for x in found} == {1, 2}
    for one, two in zip(found, expected, strict=True):
        assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("renormalise", [False, True])
def test_limits(dtype, renormalise):
    """p to 0 is one expert, p of 1 or more all, a threshold of 0 none skipped: to the bit, in any number format."""
    x, index, gates = routing(E, 50, TOP_K, 4, dtype)
    for policy in (
        TopP(1.0, renormalise=renormalise),
        TopP(7, renormalise=renormalise),
        Skip(0.0, renormalise=renormalise),
    ):
        made = policy.route(COUNTS, {}, x, index, gates)
        assert torch.equal(made.index_TM, index) and torch.equal(made.weight_TM, gates) and made.inputs[0] is x
    for policy in (TopP(0.0), TopP(1e-9), Skip(1.0), Skip(1.0, "selected")):
        made = policy.route(COUNTS, {}, x, index, gates)
        heaviest_TK = gates == gates.amax(dim=1, keepdim=True)
        assert bool((heaviest_TK | (made.index_TM < 0)).all()) and bool((made.index_TM >= 0).any(dim=1).all())


def test_equal_weights_and_weights_of_zero():
    index, even = torch.tensor([[3, 1, 2, 0]]), torch.full((1, 4), 0.25)
    assert routed(TopP(0.5), index, even) == [{3: 0.25, 1: 0.25, 2: 0.25}]  # two have a half, which does not exceed it
    assert routed(TopP(0.49), index, even) == [{3: 0.25, 1: 0.25}]
    assert routed(Skip(1.0), index, even) == [{3: 0.25, 1: 0.25, 2: 0.25, 0: 0.25}]
    for policy in (TopP(0.5, renormalise=True), Skip(0.5, renormalise=True), Skip(0.5, "selected")):
        (found,) = routed(policy, index, torch.zeros(1, 4))
        assert found and set(found.values()) == {0.0}


# --- groups -----------------------------------------------------------------------------------------------------


def slow_groups(policy: GroupLocal, logits: list[float], top_k: int) -> dict[int, float]:
    """SAM written out: scores, sums over groups, the best groups, the best experts inside."""
    if policy.scores == "softmax":
        total = sum(math.exp(v) for v in logits)
        scores = [math.exp(v) / total for v in logits]
    else:
        scores = [1 / (1 + math.exp(-v)) for v in logits]
    names = sorted(set(policy.groups))
    sums = {name: sum(s for s, g in zip(scores, policy.groups, strict=True) if g == name) for name in names}
    best = sorted(names, key=lambda name: -sums[name])[: policy.open]
    inside = [e for e, group in enumerate(policy.groups) if group in best]
    chosen = sorted(inside, key=lambda e: -scores[e])[:top_k]
    whole = sum(scores[e] for e in chosen) if policy.renormalised else 1.0
    return {e: scores[e] / whole for e in chosen}


def router(policy: GroupLocal, logits: torch.Tensor, top_k: int, constant: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What a plain router makes of logits."""
    scores = logits.softmax(dim=-1) if policy.scores == "softmax" else logits.sigmoid()
    weights, index = scores.topk(top_k, dim=-1)
    return index, constant * (weights / weights.sum(dim=-1, keepdim=True) if policy.renormalised else weights)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalised", [False, True])
@pytest.mark.parametrize("open_groups", [1, 2, 3])
def test_groups_choose_as_written_out(scores, renormalised, open_groups):
    policy = GroupLocal((0, 1, 2, 0, 1, 2, 0, 1, 2, 2), open_groups, scores, renormalised)
    logits = 2 * torch.randn(60, 10, generator=torch.Generator().manual_seed(5))
    index, weights = policy.choose(logits, *router(policy, logits, 3, constant=2.5))
    others = 0
    for t, row in enumerate(logits.tolist()):
        expected = {e: 2.5 * w for e, w in slow_groups(policy, row, 3).items()}
        found = dict(zip(index[t].tolist(), weights[t].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-4)
        assert len({policy.groups[e] for e in found}) <= open_groups
        others += set(found) != set(router(policy, logits[t : t + 1], 3, 1.0)[0][0].tolist())
    assert (others > 0) == (open_groups < 3)


@pytest.mark.parametrize("groups", [(0,) * 8, (5, 5, 1, 1, 5, 1, 5, 1)])
def test_one_group_or_all_of_them_is_plain_top_k(groups):
    policy = GroupLocal(groups, len(set(groups)))
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(6))
    plain = router(policy, logits, 3, constant=1.0)
    index, weights = policy.choose(logits, *plain)
    assert torch.equal(index, plain[0])
    assert_near(weights, plain[1], 1e-6)


def test_groups_go_by_the_experts_that_are_left():
    policy = GroupLocal((0, 0, 0, 0, 1, 1, 1, 1))
    assert policy.among((0, 1, 2, 6, 7)).groups == (0, 0, 0, 1, 1)
    plan = LayerPlan("experts", (KEPT,) * 5 + (DROPPED,) + (KEPT,) * 2, routing=policy)
    assert Layout.of(plan, SHAPE).routing.groups == (0, 0, 0, 0, 1, 1, 1)


# --- composition, costs, files ----------------------------------------------------------------------------------


def container_with(policy: Policy, seed: int = 0) -> StandInExperts:
    return filled(Layout.of(LayerPlan("experts", (KEPT,) * E, routing=policy), SHAPE), swiglu, seed=seed)


def test_experts_that_do_not_run_are_not_computed():
    """Weights that are no numbers in experts that no token runs would be seen in any product with them, even times zero."""
    for policy in (TopP(0.5), Skip(0.6), InTurn((MainWithVectors(3, "none"), Skip(0.5)))):
        container = container_with(policy)
        x, index, gates = routing(E, 3, TOP_K, 9)
        with torch.no_grad():
            expected = container(x, index, gates)
            made = container.routed(x, index, gates)
            idle = sorted(set(range(E)) - set(made.index_TM.flatten().tolist()))
            assert len(idle) > 0 and set(idle) & set(index.flatten().tolist())
            for parameter in container.parameters():
                parameter[idle] = math.nan
            for wide in (container, copy.deepcopy(container).double()):  # all at once, cluster by cluster
                found = wide(
                    *(v.to(next(wide.parameters()).dtype) if v.is_floating_point() else v for v in (x, index, gates))
                )
                assert_near(found.float(), expected, 1e-5)
        _, operations, ran = container_work(container, x, index, gates)
        pairs = int((made.index_TM >= 0).sum())
        assert (operations, ran) == (2 * pairs * 3 * D * F, E - len(idle)) and pairs < index.numel()


def test_policies_in_turn_are_one_after_the_other():
    """Vectors for those that are not main, top-p among the main ones, whichever was named first."""
    vectors, top_p = MainWithVectors(3, "projections"), TopP(0.6)
    policy = InTurn((top_p, vectors))
    assert policy.policies == (vectors, top_p) and policy == InTurn.of(vectors, top_p)
    container = container_with(policy)
    x, index, gates = routing(E, 30, TOP_K, 2)
    with torch.no_grad():
        made = container.routed(x, index, gates)
        first = vectors.route(container.layout, {"offsets_NV": container.offsets_NV}, x, index, gates)
        then = top_p.route(container.layout, {}, x, first.index_TM, first.weight_TM)
    assert torch.equal(made.index_TM, then.index_TM) and torch.equal(made.weight_TM, then.weight_TM)
    assert all(torch.equal(a, b) for a, b in zip(made.inputs, first.inputs, strict=True))
    assert torch.equal(made.down_TF, first.down_TF)
    assert policy.most(TOP_K) == 3 and policy.per_token(TOP_K) == 1
    assert policy.tensors(COUNTS) == vectors.tensors(COUNTS)


def test_a_policy_on_top_takes_the_place_of_one_of_its_kind():
    one, two, vectors = TopP(0.3), TopP(0.6), MainWithVectors(2)
    assert InTurn.of(None, one) == one and InTurn.of(one, None) == one and InTurn.of(one, two) == two
    assert InTurn.of(InTurn((vectors, one)), two) == InTurn((vectors, two))
    assert InTurn.of(None, None) is None


def test_policies_that_add_something_compile_into_one_graph():
    container = container_with(InTurn((Skip(0.4), SoftLora(3, 2), SoftLora(2, 1, "b-2"))))
    torch.compiler.reset()
    with torch.no_grad():
        given = routing(E, 12, TOP_K, 5)
        assert_near(torch.compile(container, fullgraph=True, backend="eager")(*given), container(*given), 1e-6)


def test_gradients_reach_the_gates_of_those_that_run():
    container = container_with(InTurn((TopP(0.6, renormalise=True), Skip(0.4, "heaviest", True)))).double()
    x, index, gates = routing(E, 2, TOP_K, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda g: container(x, index, g), gates.requires_grad_(True))


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (TopP(-0.1), "p -0.1; allowed: numbers from 0 to 1000"),
        (TopP(10**400), "p 1000"),
        (TopP(math.nan), "p nan"),
        (TopP("x"), "p 'x'"),
        (TopP(0.5, "none"), "unknown share 'none'"),
        (TopP(0.5, "all"), "divides the weights of those that it selects"),
        (TopP(0.5, mean=9.0), "mean 9.0; allowed: numbers from 0 to 4"),
        (Skip(1.1), "threshold 1.1; allowed: numbers from 0 to 1"),
        (Skip(0.5, "second"), "unknown weight to compare with 'second'"),
        (Skip(0.5, renormalise=1), "renormalise 1; it must be true or false"),
        (GroupLocal((0, 1)), "groups for 2 experts; the layer has 8"),
        (GroupLocal((0, 1) * 4, 3), "opens 3 groups for a token; allowed: 1 to 2"),
        (GroupLocal((0,) * 5 + (1,) * 3), "the 1 smallest groups hold 3 experts"),
        (GroupLocal((0, -1) * 4), "it must be a list of the group of every expert"),
        (GroupLocal((0, 1) * 4, scores="max"), "unknown scores 'max'"),
        (InTurn((TopP(0.5),)), "has 1 policies in turn; it takes two or more"),
        (InTurn((TopP(0.5), Skip(3))), "skip has threshold 3"),
        (InTurn((MainWithVectors(1), MainWithVectors(2))), "each of which must be the first"),
        (InTurn((TopP(0.5), Skip(0.5), Skip(0.6))), "has skip more than once in turn; keep one"),
        (InTurn((SoftLora(3, 2), SoftLora(2, 1, "a"), SoftLora(3, 2, "a"))), "has soft_lora a more than once in turn"),
        (
            InTurn((SoftLora(3, 2), SoftLora(2, 1, "a b"))),
            "soft_lora has a set called 'a b'; allowed: names of up to 64",
        ),
    ],
)
def test_what_cannot_be_is_refused(policy, words):
    with pytest.raises(PlanError, match=words):
        policy.check("the plan", SHAPE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"num_groups": 2}, "own 2 groups"), ({"router_kind": "other"}, r"a way of its own \(other\)")],
)
def test_groups_are_refused_on_routers_that_go_by_more(changes, words):
    with pytest.raises(PlanError, match=words):
        GroupLocal((0, 1) * 4).check("the plan", dataclasses.replace(SHAPE, **changes))


@pytest.mark.parametrize(
    "data",
    [
        {"policy": "in_turn", "policies": [{"policy": "in_turn", "policies": []}]},
        {"policy": "in_turn", "policies": [3]},
        {"policy": "in_turn", "policies": "all"},
        {"policy": "in_turn", "policies": [{"policy": "top_q"}]},
        {"policy": "in_turn", "policies": [{"policy": "top_p"}]},
        {"policy": "in_turn", "policies": [{}]},
    ],
)
def test_what_no_file_can_say_is_an_error(data):
    with pytest.raises((OptionError, TypeError, KeyError)):
        read_policy(data)
