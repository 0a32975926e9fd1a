"""What every kind of part and every routing policy must do, other packages' included: data, sizes, both ways through the
container, gradients, conversion. tests/conformance/test_foreign.py
runs it over those.

Letters: E experts, D model width, F expert width.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch

from locum.containers.build import build_layer
from locum.containers.container import StandInExperts
from locum.containers.layout import Layout
from locum.containers.rows import rows_of_expert, whole_weights
from locum.experts.parts.part import PARTS
from locum.experts.policies.policy import POLICIES
from locum.plans import plan_json
from locum.plans.plan import KEPT, Base, LayerPlan, Slot
from locum.stats.sums import LayerStatistics
from making.containers import KINDS, D, E, F, assert_near, drawn_experts, layer_of, routing

# Fields without a default, and what else a kind needs to be used: the others are made from their defaults.
FIELDS = {
    "shared_base": {"base": 0},
    "low_rank": {"rank": 3, "start": "svd"},
    "narrowed": {"width": 4},
    "basis_mixture": {"bases": 2, "rank": 3},
    "left_factors": {"rank": 3, "right": 6, "of": (4, 5)},
}
POLICY_FIELDS = {
    "main_with_vectors": {"main": 1},
    "top_p": {"p": 0.5},
    "skip": {"threshold": 0.5},
    "soft_lora": {"experts": 3, "rank": 2},
    "group_local": {"groups": (0, 1) * (E // 2)},
    "in_turn": {
        "policies": (
            {"policy": "main_with_vectors", "main": 2},
            {"policy": "skip", "threshold": 0.5},
            {"policy": "soft_lora", "experts": 2, "rank": 1, "set": "b-2"},
        )
    },
}
PLANNED = sorted(name for name, kind in PARTS.items() if not kind.follows)
CHOSEN = sorted(POLICIES)


def part_of(name):
    return PARTS[name](**FIELDS.get(name, {}))


def slot_of(name):
    """A slot with this part: over a base, if it can lie over one and is no adapter that stands alone."""
    part = part_of(name)
    if part.is_whole or part.stands_alone or not part.changes_weights:
        return Slot((part,))
    return Slot((part_of("shared_base"), part))


def layer_plan(name, policy=None):
    slot = slot_of(name)
    based = any(part.name == "shared_base" for part in slot.parts)
    bases = (Base((4, 5, 6), (0.5, 0.25, 0.25)),) if based else ()
    return LayerPlan("experts", (KEPT,) * 4 + (slot,) * 3 + (KEPT,), bases, policy)


def statistics(shape):
    generator = torch.Generator().manual_seed(2)
    sums = {
        "output_sum": torch.randn(E, D, generator=generator, dtype=torch.float64),
        "count": torch.full((E,), 9.0, dtype=torch.float64),
        "input_gram": torch.eye(D, dtype=torch.float64).expand(E, D, D),
        "hidden_gram": torch.eye(F, dtype=torch.float64).expand(E, F, F),
        "input_square": torch.rand(E, D, generator=generator, dtype=torch.float64),
        "hidden_square": torch.rand(E, F, generator=generator, dtype=torch.float64),
        "gated_hidden_square": torch.rand(E, F, generator=generator, dtype=torch.float64),
        "gated_hidden_peak": torch.rand(E, F, generator=generator, dtype=torch.float64),
        "down_column_square": torch.rand(E, F, generator=generator, dtype=torch.float64),
    }
    return LayerStatistics(shape, sums)


def container_of(name, kind="swiglu", policy=None, dtype=torch.float32):
    shape, own = layer_of(kind), drawn_experts(kind, dtype)
    layout, tensors = build_layer(layer_plan(name, policy), shape, own.__getitem__, statistics(shape), seed=3)
    container = StandInExperts(layout, KINDS[kind][0], dtype, "meta")
    container.load_state_dict(tensors, strict=True, assign=True)
    return container, tensors


def written_out(container, e, x_TD):
    """An expert's output, from the sums of what its rows say in `first`, `second` and `output`: no grouping, no sharing."""
    layout, rows = container.layout, rows_of_expert(container, e)
    kinds = {prefix: stack.kind for prefix, stack in layout.prefixed()}
    one_S1 = torch.ones(len(x_TD), 1, dtype=x_TD.dtype)
    pre = [kinds[p].first(row, (x_TD,)) for p, row in rows.items()]
    pre = [x for x in pre if x is not None]
    width = F * (2 if layout.has_gate else 1)
    hidden = container.activate(sum(pre) if pre else x_TD.new_zeros(len(x_TD), width))
    after = [kinds[p].second(row, hidden, one_S1) for p, row in rows.items()] if pre else []
    constants = [kinds[p].output(row) for p, row in rows.items()]
    return sum([x for x in (*after, *constants) if x is not None], start=torch.zeros_like(x_TD))


@pytest.mark.parametrize("name", PLANNED)
def test_its_data_go_through_json(name):
    plan = layer_plan(name)
    data = json.loads(json.dumps(plan_json.layer_to_json(plan)))
    assert plan_json.layer_from_json(data, "the plan") == plan
    layout = Layout.of(plan, layer_of())
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
    assert name in json.dumps(data)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PLANNED)
def test_what_is_built_is_as_large_as_what_is_planned(name, kind):
    container, tensors = container_of(name, kind)
    layout, shape = container.layout, layer_of(kind)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == layout.tensor_shapes()
    assert sum(t.numel() for t in tensors.values()) == layer_plan(name).parameters(shape)
    again = container_of(name, kind)[1]
    assert all(torch.equal(tensors[n], again[n]) for n in tensors)  # the same seed, the same bytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("grad", [False, True])
def test_the_container_computes_what_its_rows_say_written_out(name, kind, grad):
    container, _ = container_of(name, kind)
    x, index, weights = routing(E, 40, 3)
    with torch.set_grad_enabled(grad):
        got = container(x, index, weights)
    expected = torch.zeros_like(x)
    for e in range(E):
        out = written_out(container, e, x)
        expected += (weights * (index == e)).sum(dim=1, keepdim=True) * out
    assert_near(got, expected, 1e-5)


@pytest.mark.parametrize("name", PLANNED)
def test_gradients_reach_all_that_is_used(name):
    container, _ = container_of(name)
    x, index, weights = routing(E, 40, 3)
    container(x, index, weights).square().sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in container.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PLANNED)
def test_whole_weights_compute_the_same_where_weights_can_say_it(name, kind):
    if not PARTS[name].as_weights:
        pytest.skip("no weights can say it")
    container, _ = container_of(name, kind)
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(4))
    for e in (0, 4):
        row = whole_weights(container, e)
        pre = x @ row["gate_up_NGD"].T + row.get("gate_up_bias_NG", 0)
        out = container.activate(pre) @ row["down_NDF"].T + row.get("down_bias_ND", 0)
        assert_near(out, written_out(container, e, x), 1e-5)


@pytest.mark.parametrize("name", PLANNED)
def test_it_has_words(name):
    part = part_of(name)
    assert str(part) and part.legend and part.plural and part.colour()
    assert len(part.mark()) <= 2 and isinstance(part.order(), tuple)


# --- policies ---------------------------------------------------------------------------------------------------------


def policy_of(name):
    return POLICIES[name](**POLICY_FIELDS.get(name, {}))


@pytest.mark.parametrize("name", CHOSEN)
def test_a_policy_goes_through_json_and_says_what_it_stores(name):
    plan = layer_plan("own_weights", policy_of(name))
    data = json.loads(json.dumps(plan_json.layer_to_json(plan)))
    assert plan_json.layer_from_json(data, "the plan") == plan and str(plan.routing)
    container, tensors = container_of("own_weights", policy=policy_of(name))
    assert sum(t.numel() for t in tensors.values()) == plan.parameters(layer_of())
    assert Layout.from_json(json.loads(json.dumps(container.layout.to_json()))) == container.layout


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("part", PLANNED)
def test_a_policy_never_names_an_expert_that_there_is_not_and_both_ways_agree(name, part):
    container, _ = container_of(part, policy=policy_of(name))
    x, index, weights = routing(E, 40, 3)
    routed = container.routed(x, index, weights)
    assert int(routed.index_TM.min()) >= -1 and int(routed.index_TM.max()) < E
    assert bool((routed.weight_TM[routed.index_TM < 0] == 0).all())
    assert routed.index_TM.shape[1] <= container.layout.routing.most(3)
    if container.layout.routing.only_adds is not False:
        assert torch.equal(routed.index_TM, index) and torch.equal(routed.weight_TM, weights) and routed.inputs == (x,)
    wide = copy.deepcopy(container).double()
    assert 0 < container.layout.routing.average(3) <= container.layout.routing.most(3)
    with torch.no_grad():  # float32 goes all at once where it can, float64 cluster by cluster
        assert_near(container(x, index, weights).double(), wide(x.double(), index, weights.double()), 1e-5)
