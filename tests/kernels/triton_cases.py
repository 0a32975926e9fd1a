"""The Triton kernels against float64 and weights written out, for few pairs and for many.

On a CUDA device where there is one (`python -m pytest tests/kernels/triton_cases.py`), else in Triton's interpreter, which
test_triton.py starts this file in.
"""

from __future__ import annotations

import copy

import pytest
import torch

from locum.containers.container import StandInExperts
from locum.containers.layout import Layout
from locum.experts.parts.constant import Constant
from locum.experts.parts.low_rank import LowRank
from locum.experts.parts.own_weights import OwnWeights
from locum.experts.parts.shared_base import SharedBase
from locum.experts.policies.main_with_vectors import MainWithVectors
from locum.formats.rows import is_packed, pack, row_format
from locum.kernels import choice, triton_grouped, triton_ways
from locum.kernels.packed import Matrices, Packed, coding
from locum.plans.plan import KEPT, Base, LayerPlan, Slot, stand_in
from making.containers import KINDS, assert_near, filled, relative_error, slow, swiglu
from test_products import ROUNDING, D, container_of, routed_to, shape
from triton_launches import launches_of, olmoe_layer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
ON_BFLOAT16 = ROUNDING * (1 if DEVICE == "cuda" else 2)  # the interpreter cuts off where devices round
REGIMES = {"few": triton_grouped.FEW_PAIRS, "many": 0}


@pytest.fixture(params=REGIMES)
def regime(request, monkeypatch):
    monkeypatch.setattr(triton_grouped, "FEW_PAIRS", REGIMES[request.param])
    return request.param


def random_pairs(rows, items, pairs):
    generator = torch.Generator().manual_seed(pairs)
    item = torch.randint(-1, items, (pairs,), generator=generator)
    return item, torch.randint(rows, (pairs,), generator=generator).sort().values


def packed(format, items, outputs, inputs, size=1.0):
    """The lower half of random matrices in a number format; the last matrix is zero."""
    generator, item = torch.Generator().manual_seed(3), row_format(format)
    drawn = [torch.randn(2 * outputs, inputs, generator=generator) * size * (n < items - 1) for n in range(items)]
    rows = torch.stack([pack(format, item.write(matrix)) for matrix in drawn])
    return Packed(rows.to(DEVICE), format, (2 * outputs, inputs))[:, outputs:]


def check(item, token, rows, items, outputs, inputs, dtype, way="triton", few=None):
    """Views of wider tensors; nothing beside the rows is touched; the same call gives the same bits. `few`: in few bits."""
    generator, pairs = torch.Generator().manual_seed(0), len(item)

    def random(*sizes):
        return torch.randn(sizes, generator=generator).to(DEVICE, dtype)

    item, token, chosen = item.to(DEVICE), token.to(DEVICE), (item >= 0).to(DEVICE)[:, None]
    x, weight = random(rows, inputs + 8)[:, :inputs], random(items, 2 * outputs, inputs + 3)[:, outputs:, 3:]
    numbers = weight.double()
    if few is not None:
        weight, numbers = few, few.numbers(dtype).double()
    wide = random(pairs, outputs + 9)
    before, here = wide.clone(), slice(3, 3 + outputs)
    choice.PRODUCTS[way]().add(wide[:, here], x, weight, item, token)
    exact = torch.einsum("poi,pi->po", numbers[item], x.double()[token]) * chosen
    assert_near(wide[:, here].double(), before[:, here].double() + exact, FORMATS[dtype])
    rest = torch.ones(outputs + 9, dtype=torch.bool)
    rest[here] = False
    assert torch.equal(wide[:, rest], before[:, rest])
    assert torch.equal(wide[~chosen[:, 0]], before[~chosen[:, 0]])
    hidden = random(pairs, 2 * inputs)[:, ::2]
    start = torch.randn(rows, outputs + 5, generator=generator).to(DEVICE)
    totals = [start.clone(), start.clone()]
    for total in totals:
        choice.PRODUCTS[way]().scatter(total[:, 5:], hidden, weight, item, token)
    exact = torch.einsum("poi,pi->po", numbers[item], hidden.double()) * chosen
    assert_near(totals[0][:, 5:].double(), start[:, 5:].double().index_add(0, token, exact), FORMATS[dtype])
    assert torch.equal(totals[0][:, :5], start[:, :5])
    assert torch.equal(*totals)


@pytest.mark.parametrize("dtype", FORMATS)
def test_products_equal_float64(dtype, regime):
    check(*random_pairs(9, 3, 24), 9, 3, 40, 24, dtype)


@pytest.mark.parametrize(
    ("rows", "items", "outputs", "inputs", "pairs"),
    [(3, 2, 136, 64, 6), (1, 8, 8, 8, 8), (12, 3, 61, 5, 22), (2, 2, 1, 1, 4)],
)
def test_products_of_any_size(rows, items, outputs, inputs, pairs, regime):
    check(*random_pairs(rows, items, pairs), rows, items, outputs, inputs, torch.float32)


def test_many_inputs(regime):
    check(*random_pairs(4, 3, 9), 4, 3, 17, 1100, torch.bfloat16)


PAIRS = {
    "all of one item": ([1] * 40, [0, 0, 0, *range(1, 38)]),
    "all of one item and token": ([2] * 20, [1] * 20),
    "several of one item and token": ([0, 1, 0, 0, 1, 1, 0, 2], [0, 0, 0, 1, 1, 1, 1, 3]),
    "one": ([2], [3]),
    "one, left out": ([-1], [0]),
    "all left out": ([-1] * 5, [0, 1, 2, 2, 3]),
    "none": ([], []),
}


@pytest.mark.parametrize("pairs", PAIRS)
def test_unusual_pairs(pairs, regime):
    item, token = (torch.tensor(numbers, dtype=torch.int64) for numbers in PAIRS[pairs])
    check(item, token, 38, 3, 9, 7, torch.float32)


def test_more_pairs_than_a_program_takes_at_a_time(monkeypatch):
    monkeypatch.setattr(triton_grouped, "FEW_PAIRS", 0)
    monkeypatch.setattr(triton_grouped, "STRETCH", 16)
    check(*random_pairs(9, 3, 60), 9, 3, 40, 40, torch.float32)


@pytest.mark.parametrize("case", range(4))
def test_groups_are_pairs_by_item_and_units_by_token(case):
    item, token = random_pairs(7, 4, 1 + 20 * case)
    made = triton_grouped.Groups.of(item.to(DEVICE), token.to(DEVICE), 4, 7)
    order, end, units, first, unit = (part.tolist() for part in made)
    by_item = [[p for p in range(len(item)) if item[p] == n] for n in range(4)]
    assert order[: end[-1]] == [p for pairs in by_item for p in pairs]
    start = 0
    for n, pairs in enumerate(by_item):
        fresh = [i for i, p in enumerate(pairs) if i == 0 or token[p] != token[pairs[i - 1]]]
        assert (end[n], units[n]) == (start + len(pairs), len(fresh))
        assert first[start : start + len(fresh)] == [start + i for i in fresh]
        assert first[start + len(fresh)] == end[n]
        assert [unit[p] for p in pairs] == [start + fresh.index(i) if i in fresh else -1 for i in range(len(pairs))]
        start = end[n]


WHOLE = ("int8-g32", "int4-g32", "int4-g128-z", "int3-g32", "int2-g64-z")
CODED = (*WHOLE, "int8-scaled", "fp8-scaled", "fp8-block", "mxfp4", "nvfp4", "nvfp4-modelopt")


@pytest.mark.parametrize("format", CODED)
def test_products_in_few_bits_equal_those_of_their_numbers(format, regime):
    check(*random_pairs(5, 4, 11), 5, 4, 24, 160, torch.float32, few=packed(format, 4, 24, 160))


@pytest.mark.parametrize("format", [*WHOLE, "fp8-block"])
@pytest.mark.parametrize(("outputs", "inputs"), [(13, 37), (1, 2), (150, 130)])
def test_products_in_few_bits_of_any_size(format, outputs, inputs, regime):
    """Groups that do not divide. An odd size may put scales where a device does not read them: then nothing serves."""
    few = packed(format, 3, outputs, inputs)
    if coding(format, *few.whole) is None:
        assert format in ("int3-g32", "fp8-block")
        return
    check(*random_pairs(4, 3, 7), 4, 3, outputs, inputs, torch.float32, few=few)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", ["int8-g128", "int4-g32", "nvfp4"])
def test_products_in_few_bits_with_narrow_rows(format, dtype, regime):
    check(*random_pairs(4, 3, 9), 4, 3, 17, 352, dtype, few=packed(format, 3, 17, 352))


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("format", ["int8-g32", "int4-g32", "int2-g32-z", "mxfp4"])
def test_zero_tiny_and_huge_weights_in_few_bits(format, size, regime):
    check(*random_pairs(4, 3, 7), 4, 3, 9, 64, torch.float32, few=packed(format, 3, 9, 64, size))


@pytest.mark.parametrize("shape", [(128, 16), (16, 128), (64, 8)])
@pytest.mark.parametrize("format", ["int8-g32", "int4-g32", "int2-g32-z"])
def test_few_columns_and_few_rows_in_few_bits(format, shape):
    """Adapters of rank 16: on an H200 with Triton 3.6, products with 16 columns in int4 were wrong (`LEAST_PACKED`)."""
    assert triton_ways.fault(Matrices(format, *shape), torch.bfloat16, DEVICE) == ""


@pytest.mark.parametrize("format", ["int4-g32", "int2-g64-z", "nvfp4"])
def test_a_formats_trial_finds_what_is_wrong_and_nothing_else(format, monkeypatch):
    monkeypatch.setattr(triton_grouped, "FEW_PAIRS", 20)
    assert triton_ways.fault(Matrices(format, 64, 256), torch.float32, DEVICE) == ""
    right = Packed.coding.fget
    monkeypatch.setattr(Packed, "coding", property(lambda self: right(self)._replace(scale_row=0)))
    assert "12 pairs are off by" in triton_ways.fault(Matrices(format, 64, 256), torch.float32, DEVICE)


SLOTS = tuple(
    Slot((part,) if other is None else (part, other))
    for part, other in (
        (OwnWeights(format="int4-g32"), None),
        (OwnWeights(format="int8-g64"), LowRank(8, format="int4-g32")),
        (LowRank(8, format="int4-g32"), Constant()),
        (SharedBase(0, format="int4-g32"), LowRank(3)),
        (SharedBase(0, format="int4-g32"), LowRank(8, format="int8-g32")),
        (OwnWeights(), None),
        (OwnWeights(format="fp8-scaled"), None),
        (Constant(), None),
    )
)


def few_bits_container(kind, dtype):
    activate, has_gate, has_bias = KINDS[kind]
    plan, sizes = LayerPlan("experts", SLOTS, (Base((3, 4), (0.5, 0.5)),)), shape(has_gate, has_bias)
    generator = torch.Generator().manual_seed(1)
    container = StandInExperts(Layout.of(plan, sizes), activate, dtype, "cpu")
    container.requires_grad_(False)
    for path, stack in container.paths:
        for leaf, size in stack.kind.tensors(stack.variant, container.layout).items():
            for row in getattr(container.stack(path), leaf):
                drawn = torch.randn(size, generator=generator) * 0.4
                packed = is_packed(stack.format, size)
                row.copy_(pack(stack.format, row_format(stack.format).write(drawn)) if packed else drawn)
    return container


@pytest.mark.parametrize("kind", KINDS)
def test_a_container_in_few_bits_equals_rows_made_numbers(kind, regime):
    """Cluster by cluster is held against weights written out in test_few_bits."""
    container = few_bits_container(kind, torch.float32)
    x, index, gates = routed_to(container, 5, 0, torch.float32, distinct=False)
    container.way = choice.LOOP
    with torch.no_grad():
        expected = container(x, index, gates)
    assert_near(on_device(container, x, index, gates), expected, 1e-5)


def test_a_container_in_few_bits_compiles_without_a_graph_break():
    container = few_bits_container("gpt_oss", torch.float32).to(DEVICE)
    container.way = "triton op"
    given = [tensor.to(DEVICE) for tensor in routed_to(container, 3, 1, torch.float32)]
    compiled = torch.compile(container, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_near(compiled(*given), container(*given), 1e-6)


def on_device(container, *given):
    container.way = "triton"
    with torch.no_grad():
        return copy.deepcopy(container).to(DEVICE)(*(tensor.to(DEVICE) for tensor in given)).cpu()


@pytest.mark.parametrize("kind", KINDS)
def test_a_container_equals_written_out_weights(kind, regime):
    container = container_of(kind, 0, torch.float32, ranks=(3, 5))
    x, index, gates = routed_to(container, 4, 0, torch.float32, distinct=False)
    assert_near(on_device(container, x, index, gates), slow(container, x, index, gates), 1e-5)


def test_a_container_in_bfloat16(regime):
    container = container_of("gpt_oss", 2, torch.bfloat16)
    x, index, gates = routed_to(container, 4, 2, torch.bfloat16)
    expected = slow(copy.deepcopy(container).double(), x.double(), index, gates.double())
    assert relative_error(on_device(container, x, index, gates), expected) < ON_BFLOAT16


def test_a_base_shared_within_a_token(regime):
    slots = (KEPT, *(stand_in(0, 3) for _ in range(7)))
    container = filled(Layout.of(LayerPlan("experts", slots, (Base((1, 2), (0.5, 0.5)),)), shape()), swiglu)
    x, index, gates = routed_to(container, 4, 0, torch.float32)
    assert_near(on_device(container, x, index, gates), slow(container, x, index, gates), 1e-5)


@pytest.mark.parametrize("what", ["projections", "hidden", "norm"])
def test_routing_policies_and_norms_of_single_experts(what, regime):
    """Cluster by cluster is held against the oracle in test_routing."""
    container = container_of("swiglu", 3, torch.float32, policy=None if what == "norm" else MainWithVectors(2, what))
    if what == "norm":
        container.post_expert_norm = torch.nn.RMSNorm(D)
    x, index, gates = routed_to(container, 4, 1, torch.float32)
    container.way = choice.LOOP
    with torch.no_grad():
        expected = container(x, index, gates)
    assert_near(on_device(container, x, index, gates), expected, 1e-5)


def test_no_tokens_and_one_token(regime):
    container = container_of("gpt_oss", 1, torch.float32)
    for tokens in (0, 1):
        x, index, gates = routed_to(container, tokens, 1, torch.float32)
        assert_near(on_device(container, x, index, gates), slow(container, x, index, gates), 1e-5)


def test_it_compiles_without_a_graph_break():
    container = container_of("swiglu", 1, torch.float32).to(DEVICE)
    container.way = "triton op"
    given = [tensor.to(DEVICE) for tensor in routed_to(container, 3, 1, torch.float32)]
    compiled = torch.compile(container, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_near(compiled(*given), container(*given), 1e-6)


@pytest.mark.parametrize(("replaced", "tokens", "launches"), [(0, 1, 3), (38, 16, 9), (38, 2048, 17)])
def test_a_layer_knows_its_launches_beforehand(replaced, tokens, launches):
    """Nothing has values on the meta device, so nothing can have waited for them."""
    found = launches_of(olmoe_layer(replaced, 16), tokens)
    assert len(found) == launches
    assert all(isinstance(size, int) and size > 0 for launch in found for size in launch.grid)


def test_blocks_suffice_for_any_routing():
    """Every item's last block may be nearly empty."""
    for tokens, top_k in ((65, 8), (512, 8), (999, 3)):
        for launch in launches_of(olmoe_layer(38, 16), tokens, top_k):
            if launch.kernel == "_many":
                given = dict(zip(triton_grouped._many.arg_names, launch.arguments, strict=True))
                items, outputs, rows, width = (given[name] for name in ("items", "outputs", "ROWS", "OUTPUTS"))
                worst = torch.tensor([1] * (items - 1) + [tokens * top_k - items + 1])
                assert launch.grid[0] >= int((worst / rows).ceil().sum()) * -(-outputs // width)
