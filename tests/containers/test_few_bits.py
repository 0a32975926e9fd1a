"""Containers with parts in few bits: what they compute, how large they are, and what their layouts and plans say.

Letters: D model width, F expert width, E experts, T tokens.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from unittest import mock

import pytest
import torch

from locum.containers.build import build_layer, build_layers
from locum.containers.container import StandInExperts
from locum.containers.costs import container_work
from locum.containers.layout import Layout
from locum.containers.rows import rows_of_expert, whole_weights
from locum.errors import CheckpointError, PlanError
from locum.experts.parts.constant import Constant
from locum.experts.parts.low_rank import LowRank
from locum.experts.parts.own_weights import OwnWeights, rows_of
from locum.experts.parts.shared_base import SharedBase
from locum.experts.quantisers import errors
from locum.experts.weights import ExpertWeights, mean_expert
from locum.plans import plan_json
from locum.plans.bits import FewBits
from locum.plans.plan import DROPPED, KEPT, NOTHING, Base, LayerPlan, Plan, Slot, make_plan, stand_in
from locum.shapes import LayerShape, ModelShape
from locum.stats.sums import LayerStatistics
from making.containers import KINDS, assert_near, routing

D, F, E = 36, 20, 8  # groups of 32 do not divide them
INT4 = {"format": "int4-g32", "quantiser": "gptq"}
SLOTS = (
    Slot((SharedBase(0, **INT4), LowRank(4, "svd", **INT4))),
    Slot((OwnWeights(format="int3-g32"),)),
    KEPT,
    Slot((OwnWeights(**INT4),)),
    Slot((LowRank(4, "whitened", **INT4), Constant())),
    Slot((OwnWeights(format="int2-g32-z"), LowRank(3, "whitened", format="int8-g64"))),
    Slot((SharedBase(0, **INT4),)),
    NOTHING,
)
PLAN = LayerPlan("experts", SLOTS, (Base((0, 6), (0.5, 0.5)),))


def layer_shape(kind: str = "swiglu") -> LayerShape:
    _, has_gate, has_bias = KINDS[kind]
    return LayerShape("experts", E, 2, D, F, "router", "softmax", True, has_gate=has_gate, has_bias=has_bias)


def model_shape(layer: LayerShape) -> ModelShape:
    size = layer.num_experts * layer.parameters() + 1000
    return ModelShape("olmoe", (layer,), size, 4 * size, 4)


def experts_of(kind: str) -> list[ExpertWeights]:
    _, has_gate, has_bias = KINDS[kind]
    generator = torch.Generator().manual_seed(1)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator) * 0.3

    return [
        ExpertWeights(
            drawn(F, D) if has_gate else None,
            drawn(F, D),
            drawn(D, F),
            drawn(F) if has_gate and has_bias else None,
            drawn(F) if has_bias else None,
            drawn(D) if has_bias else None,
        )
        for _ in range(E)
    ]


def statistics(shape: LayerShape, tokens: int = 60) -> LayerStatistics:
    """Expert 4 saw no token."""
    generator = torch.Generator().manual_seed(2)
    x_ETD, h_ETF = (torch.randn(E, tokens, n, generator=generator, dtype=torch.float64) for n in (D, F))
    count_E = torch.full((E,), float(tokens), dtype=torch.float64)
    for sums in (x_ETD, h_ETF, count_E):
        sums[4] = 0
    sums = {"input_gram": x_ETD.mT @ x_ETD, "hidden_gram": h_ETF.mT @ h_ETF, "count": count_E}
    return LayerStatistics(shape, sums | {"output_sum": torch.ones(E, D, dtype=torch.float64)})


def container_of(plan: LayerPlan, kind: str = "swiglu") -> StandInExperts:
    shape = layer_shape(kind)
    layout, tensors = build_layer(plan, shape, experts_of(kind).__getitem__, statistics(shape), seed=3)
    container = StandInExperts(layout, KINDS[kind][0], torch.float32, "meta")
    container.load_state_dict(tensors, strict=True, assign=True)
    return container


def candidates_of(base: Base) -> list[LayerPlan]:
    """Plans in which all experts become one thing, some on a base."""
    slots = [Slot((OwnWeights(format=f"int{b}-g32", quantiser="gptq"),)) for b in (8, 4, 3)]
    slots += [Slot((LowRank(rank, "whitened", **INT4),)) for rank in (2, 4)]
    slots += [Slot((slots[1].parts[0], LowRank(rank, "whitened", **INT4))) for rank in (2, 3)]
    over = [Slot((SharedBase(0, **INT4),)), Slot((SharedBase(0, **INT4), LowRank(4, "whitened", **INT4)))]
    return [LayerPlan("experts", (slot,) * E, (base,) if slot in over else ()) for slot in slots + over]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_plans_that_are_built_together_are_built_as_each_alone(kind, workers):
    """Bases of other experts, aligned ones, drawn starts and mixed plans among them, to the bit; by threads too, but for what is drawn."""
    shape, read = layer_shape(kind), experts_of(kind).__getitem__
    drawn = LayerPlan("experts", (Slot((LowRank(3, "gaussian"),)), DROPPED, *PLAN.slots[2:]), PLAN.bases)
    bases = [Base((0, 6), (0.5, 0.5)), Base((5,), (1.0,)), Base((0, 6), (0.5, 0.5), align=True)]
    plans = [PLAN, *(plan for base in bases for plan in candidates_of(base)), *[drawn] * (workers == 1)]
    assert drawn.parts[0].is_drawn and not any(part.is_drawn for part in PLAN.parts)
    threads = torch.get_num_threads()
    together = list(build_layers(plans, shape, read, statistics(shape), 3, workers=workers))
    assert torch.get_num_threads() == threads
    for plan, (layout, tensors) in zip(plans, together, strict=True):
        alone, expected = build_layer(plan, shape, read, statistics(shape), 3)
        assert layout == alone and tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected), plan.slots


def test_what_is_drawn_is_drawn_in_the_order_of_experts_whoever_builds_it():
    shape, read = layer_shape(), experts_of("swiglu").__getitem__
    plan = LayerPlan("experts", (Slot((LowRank(3, "gaussian"),)),) * E)
    one, other = (next(build_layers([plan], shape, read, None, 3, workers=n))[1] for n in (1, 4))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_gram_matrix_is_factored_once_for_all_that_an_expert_may_become():
    shape, base, sizes = layer_shape(), Base((5,), (1.0,)), []
    factored = torch.linalg.cholesky

    def counted(matrix: torch.Tensor, **how: bool) -> torch.Tensor:
        sizes.append(len(matrix))
        return factored(matrix, **how)

    with mock.patch("torch.linalg.cholesky", counted):
        list(build_layers(candidates_of(base), shape, experts_of("swiglu").__getitem__, statistics(shape), 3))
    assert sizes.count(D) == sizes.count(F) == 2 * (E + 1)  # two for each expert, and for the base


def every(part_of: object) -> LayerPlan:
    return LayerPlan("experts", tuple(Slot((part_of(e),)) for e in range(E)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [False, True])
def test_the_container_computes_with_the_numbers_that_its_bytes_stand_for(kind, grad):
    container = container_of(PLAN, kind)
    x_TD, index, weights = (torch.randn(40, D, generator=torch.Generator().manual_seed(5)), *routing(E, 40, 3)[1:])
    x_TD.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        found = container(x_TD, index, weights)
    expected = torch.zeros(40, D)
    for e in range(E):
        if e != 7:  # which is nothing
            row = whole_weights(container, e) if e != 4 else without_constant(container, e)
            pre = x_TD @ row["gate_up_NGD"].T + row.get("gate_up_bias_NG", 0)
            out = container.activate(pre) @ row["down_NDF"].T + row.get("down_bias_ND", 0)
            constant = container.constant_ND[0] if e == 4 else 0
            expected = expected + (weights * (index == e)).sum(1, keepdim=True) * (out + constant)
    assert_near(found, expected, 1e-5)
    if grad:
        ours, theirs = (torch.autograd.grad(out.square().sum(), x_TD)[0] for out in (found, expected))
        assert_near(ours, theirs, 1e-4)


def without_constant(container: StandInExperts, e: int) -> dict[str, torch.Tensor]:
    rows = rows_of_expert(container, e)
    product = LowRank.whole(next(row for row in rows.values() if "down_A_RF" in row), container.layout)
    own = next((row for row in rows.values() if "down_bias_ND" in row), {})
    return {"gate_up_NGD": product["gate_up_GD"], "down_NDF": product["down_DF"], **own}


def test_a_base_is_written_for_what_its_experts_see():
    """By GPTQ it loses less than by nearest, on the inputs of those that use it."""
    shape, base, lost = layer_shape(), mean_expert(experts_of("swiglu")[:2], (0.5, 0.5)), {}
    for quantiser in ("nearest", "gptq"):
        slots = (Slot((SharedBase(0, format="int2-g32-z", quantiser=quantiser),)),) * E
        container = container_of(LayerPlan("experts", slots, (Base((0, 1), (0.5, 0.5)),)))
        (row,) = rows_of_expert(container, 3).values()
        for leaf, whole, name in (
            ("gate_up_NGD", base.gate_up_GD, "input_gram"),
            ("down_NDF", base.down_DF, "hidden_gram"),
        ):
            lost[leaf, quantiser] = float(errors(whole, row[leaf], statistics(shape)[name].sum(0)).sum())
    assert all(lost[leaf, "gptq"] < 0.99 * lost[leaf, "nearest"] for leaf in ("gate_up_NGD", "down_NDF"))


@pytest.mark.parametrize("kind", KINDS)
def test_eight_bits_are_nearly_what_they_stand_for_and_biases_are_what_they_were(kind):
    container = container_of(every(lambda e: OwnWeights(format="int8-g32", quantiser="gptq")), kind)
    for e, expert in enumerate(experts_of(kind)):
        (row,) = rows_of_expert(container, e).values()
        for leaf, tensor in rows_of(expert).items():
            assert (
                torch.equal(row[leaf], tensor) if "bias" in leaf else (row[leaf] - tensor).norm() < 0.01 * tensor.norm()
            )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_built_has_the_bytes_that_the_plan_promised_and_no_cast_changes_them(kind):
    container, shape = container_of(PLAN, kind), layer_shape(kind)
    model = model_shape(shape)
    size = sum(parameter.nbytes for parameter in container.parameters())
    assert size == PLAN.bytes(shape, model) == container.layout.nbytes(4)
    whole = make_plan(model, [PLAN]).size(model)
    assert whole.bytes == size + 4 * 1000 and container.layout.parameters() == PLAN.parameters(shape)
    assert {n: tuple(p.shape) for n, p in container.named_parameters()} == container.layout.tensor_shapes()
    packed = container.layout.packed_tensors
    assert {n for n, p in container.named_parameters() if p.dtype == torch.uint8} == packed and len(packed) > 8
    cast = copy.deepcopy(container).bfloat16().float()
    assert all(torch.equal(cast.get_parameter(name), container.get_parameter(name)) for name in packed)


def test_a_row_that_is_read_costs_its_bytes():
    container = container_of(every(lambda e: OwnWeights(format="int4-g32")))
    index, weights = torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 2)
    read, operations, ran = container_work(container, torch.zeros(2, D), index, weights, itemsize=4)
    stored = 2 * F * (20 + 4) + D * (12 + 2)  # codes of whole eights, and a scale for each group
    assert (read, operations, ran) == (3 * stored, 2 * 4 * 3 * D * F, 3)


def test_layouts_and_plans_say_formats_where_there_are_any():
    layout = Layout.of(PLAN, layer_shape())
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
    assert [prefix for prefix, stack in layout.prefixed() if stack.part == "own_weights"] == [
        "dense.",
        "dense_int2_g32_z.",
        "dense_int3_g32.",
        "dense_int4_g32.",
    ]
    # Rows of whole weights are counted through: kept, then each format by its name, experts before bases.
    assert layout.dense_of == (4, 2, 0, 3, -1, 1, 4, -1) and layout.num_dense == 5
    plan = make_plan(model_shape(layer_shape()), [PLAN])
    again = Plan.loads(plan.dumps())
    assert again.layers == plan.layers and again.id == plan.id
    assert '{"part": "own_weights", "format": "int3-g32", "quantiser": "nearest"}' in plan.dumps()
    assert str(SLOTS[3]) == "kept in int4-g32 (gptq)" and "rank 4 (svd) in int4-g32 (gptq)" in str(SLOTS[0])
    assert plan.formats == ("int4-g32", "int3-g32", "int2-g32-z", "int8-g64")


def test_plans_without_formats_are_what_they_were():
    bare = (stand_in(0, 2, "svd"), KEPT, stand_in(None, 3), stand_in(constant=True), stand_in(0), KEPT, NOTHING, KEPT)
    layer = LayerPlan("experts", bare, (Base((0, 4), (0.5, 0.5)),))
    data = plan_json.layer_to_json(layer)
    assert data["experts"][0]["parts"] == [
        {"part": "shared_base", "base": 0},
        {"part": "low_rank", "rank": 2, "start": "svd"},
    ]
    assert data["experts"][1]["parts"] == [{"part": "own_weights"}]
    assert all(
        stack.keys() == {"part", "variant", "rows"} for stack in Layout.of(layer, layer_shape()).to_json()["stacks"]
    )
    assert plan_json.fingerprint_layers([layer]) == "68e84c3650fb"


def test_a_kept_expert_in_few_bits_is_kept_and_not_what_a_stock_layer_holds():
    slot, plan = SLOTS[3], replace(PLAN, slots=(SLOTS[3],) * E, bases=())
    assert slot.is_kept and not slot.is_untouched and slot.fate == "kept" and plan.replaced == ()
    assert not plan.is_dense and not plan.is_identity and not Layout.of(plan, layer_shape()).only_dense
    assert set(plan.needs) == {"input_gram", "hidden_gram", "count"}


def test_a_base_in_few_bits_is_stored_once_and_adapters_begin_at_what_it_lost():
    plan = LayerPlan(
        "experts", (Slot((SharedBase(0, format="int2-g32-z"), LowRank(20, "svd"))),) * E, (Base((0, 1), (0.5, 0.5)),)
    )
    container = container_of(plan)
    assert container.layout.num_dense == 1
    for e, expert in enumerate(experts_of("swiglu")):  # of full rank: nothing is lost
        for leaf, tensor in rows_of(expert).items():
            assert torch.allclose(whole_weights(container, e)[leaf], tensor, atol=1e-4)


def test_an_adapter_corrects_a_row_in_few_bits():
    """The whitened SVD of what quantising lost: less is lost on the inputs with every rank, and nothing at full rank."""
    shape, experts, lost = layer_shape(), experts_of("swiglu"), []
    grams = statistics(shape)["input_gram"]
    for rank in (0, 2, 8, 20):
        more = (LowRank(rank, "whitened"),) if rank else ()
        container = container_of(LayerPlan("experts", (Slot((OwnWeights(format="int2-g32-z"), *more)),) * E))
        off = whole_weights(container, 1)["gate_up_NGD"] - experts[1].gate_up_GD
        lost.append(float((off.double() @ grams[1] * off.double()).sum()))
    assert lost[0] > 1.1 * lost[1] > 1.2 * lost[2] and lost[3] < 1e-6 * lost[0]


BASED = PLAN.bases


@pytest.mark.parametrize(
    ("slot", "words"),
    [
        (Slot((OwnWeights(format="int5-g32"),)), "expert 1: kept: unknown format 'int5-g32'"),
        (Slot((OwnWeights(format="nvfp4"),)), r"expert 1: kept: nvfp4 needs rows in groups of 16"),
        (Slot((OwnWeights(format="fp8-scaled", quantiser="gptq"),)), "'gptq' knows whole numbers in groups"),
        (Slot((OwnWeights(format="int4-g32", quantiser="gptk"),)), "unknown quantiser 'gptk'"),
        (Slot((OwnWeights(quantiser="gptq"),)), "has a quantiser, 'gptq', but no format"),
        (Slot((Constant(format="int4-g32"),)), "constant has no matrices that could be in int4-g32"),
        (Slot((OwnWeights(), LowRank(2))), "keeps its own weights and has rank 2"),
        (Slot((SharedBase(0, format="int8-g32"),)), "base 0 is in several number formats"),
    ],
)
def test_plans_that_cannot_be_are_refused(slot, words):
    slots = (SLOTS[0], slot, *SLOTS[2:])
    with pytest.raises(PlanError, match=words):
        make_plan(model_shape(layer_shape()), [LayerPlan("experts", slots, BASED)])


def test_a_checkpoint_that_is_quantised_is_refused():
    shape = model_shape(replace(layer_shape(), expert_bytes=1000))
    with pytest.raises(PlanError, match="quantised already; plan for the one that it was made from"):
        make_plan(shape, [every(lambda e: OwnWeights(format="int4-g32"))])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "int4-g33"}, "unknown format 'int4-g33'"),
        ({"format": 4}, r"formats are texts, not \[4\]"),
        ({"format": "nvfp4"}, "nvfp4 needs rows in groups of 16"),
        ({"part": "constant", "format": "int4-g32"}, "constant has a format, 'int4-g32', and no matrices"),
    ],
)
def test_damaged_layouts_are_refused(change, words):
    data = Layout.of(LayerPlan("experts", (Slot((OwnWeights(**INT4),)),) * E), layer_shape()).to_json()
    data["stacks"][0] |= change
    with pytest.raises(CheckpointError, match=words):
        Layout.from_json(json.loads(json.dumps(data)))


def test_bits_for_all_parts():
    few, shape = FewBits.of("2", 64, "gptq"), model_shape(layer_shape())
    assert few == FewBits("int2-g64-z", "gptq") and FewBits.of("fp8-scaled", 32, "gptq").quantiser == "nearest"
    (layer,) = few.applied([], shape)
    assert layer.slots == (Slot((OwnWeights(format="int2-g64-z", quantiser="gptq"),)),) * E
    (layer,) = few.applied([replace(PLAN, slots=(stand_in(0, 2, constant=True), *SLOTS[1:]))], shape)
    assert [part.format for part in layer.slots[0].parts] == ["int2-g64-z", "int2-g64-z", ""]
