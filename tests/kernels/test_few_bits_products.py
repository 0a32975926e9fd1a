"""The processor's products with matrices in few bits, against float64 with the numbers that their bytes stand for."""

from __future__ import annotations

import pytest
import torch

from locum.containers.container import StandInExperts
from locum.containers.layout import Layout
from locum.experts.parts.low_rank import LowRank
from locum.experts.parts.own_weights import OwnWeights
from locum.formats.rows import is_packed, pack, row_format, unpack
from locum.kernels import choice, few_bits, few_rows, native
from locum.kernels.packed import Matrices, Packed, coding
from locum.plans.plan import LayerPlan, Slot
from locum.shapes import LayerShape
from making.containers import KINDS, assert_near, routing

D, E, F = 36, 6, 20  # groups do not divide them
NEAR = 2e-4  # what whole numbers of 16 bits leave of x; the bound is in a test of its own
READ = ("int4-g32", "int4-g64-z", "int4-g128", "int8-g32", "int8-g64-z")
LIBRARY = few_bits.library
needs_library = pytest.mark.skipif(few_bits.library() is None, reason="no C++ compiler or no AVX2")


@pytest.fixture(params=[few_bits.is_wide(), False] if few_bits.is_wide() else [False], autouse=True, scope="module")
def width(request):
    """Registers of both widths, where the processor has both."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(few_bits, "is_wide", lambda: request.param)
        found = LIBRARY.__wrapped__()
        patched.setattr(few_bits, "library", lambda: found)
        yield


def stack(format, items, outputs, inputs, size=1.0):
    """The lower halves of random matrices; the last of them is zero."""
    item, generator = row_format(format), torch.Generator().manual_seed(1)
    drawn = [torch.randn(2 * outputs, inputs, generator=generator) * size * (n < items - 1) for n in range(items)]
    return Packed(torch.stack([pack(format, item.write(x)) for x in drawn]), format, (2 * outputs, inputs))[:, outputs:]


@needs_library
@pytest.mark.parametrize("format", READ)
@pytest.mark.parametrize(
    ("rows", "items", "outputs", "inputs", "pairs"),
    [(5, 4, 40, 96, 23), (4, 3, 13, 37, 9), (2, 2, 1, 2, 5), (1, 1, 70, 257, 1), (3, 2, 5, 8, 0)],
)
@pytest.mark.parametrize("dtype", few_bits.FORMATS)
def test_products_equal_float64(format, rows, items, outputs, inputs, pairs, dtype, monkeypatch):
    """Some pairs are left out, some are alike, some items have none; nothing beside the rows is touched."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    generator = torch.Generator().manual_seed(pairs)
    item = torch.randint(-1, items, (pairs,), generator=generator)
    token = torch.randint(rows, (pairs,), generator=generator).sort().values
    weight = stack(format, items, outputs, inputs)
    numbers = weight.numbers(torch.float64)[item] * (item >= 0)[:, None, None]
    x = torch.randn(rows, inputs + 3, generator=generator).to(dtype)[:, :inputs]
    wide = torch.randn(pairs, outputs + 2, generator=generator).to(dtype)
    before, relative = wide.clone(), {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: NEAR}[dtype]
    few_bits.add_(wide[:, 1:-1], x, weight, item, token)
    exact = before[:, 1:-1].double() + torch.einsum("poi,pi->po", numbers, x[token].double())
    assert_near(wide[:, 1:-1].double(), exact, relative)
    assert torch.equal(wide[:, [0, -1]], before[:, [0, -1]]) and torch.equal(wide[item < 0], before[item < 0])
    hidden, total = torch.randn(pairs, inputs, generator=generator).to(dtype), torch.ones(rows, outputs)
    few_bits.scatter_(total, hidden, weight, item, token)
    exact = torch.einsum("poi,pi->po", numbers, hidden.double())
    assert_near(total.double(), torch.ones(rows, outputs).double().index_add(0, token, exact), NEAR)


@needs_library
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("format", ["int4-g32", "int8-g32", "int4-g64-z"])
def test_zero_tiny_and_huge_weights(format, size):
    weight, y = stack(format, 2, 9, 64, size), torch.zeros(1, 9)
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    few_bits.add_(y, x, weight, torch.tensor([0]), torch.tensor([0]))
    assert_near(y.double(), x.double() @ weight.numbers(torch.float64)[0].T, NEAR)
    assert bool(y.any()) == (size > 0)


def product(format, x, items=1, outputs=24):
    """The products of one matrix with rows of x, and the numbers that its bytes stand for."""
    weight, y = stack(format, items + 1, outputs, x.shape[1]), torch.zeros(len(x), outputs)
    few_bits.add_(y, x, weight, torch.zeros(len(x), dtype=torch.int64), torch.arange(len(x)))
    return y.double(), weight.numbers(torch.float64)[0]


@needs_library
@pytest.mark.parametrize("format", READ)
@pytest.mark.parametrize("columns", [32, 200, 263])
def test_a_product_is_off_by_no_more_than_is_said(format, columns):
    """Of each weight by 2^-15 of the largest x of its group, whatever the sizes of x; beside that is what float32 rounds."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(6, columns, generator=generator) * torch.logspace(-30, 30, 6)[:, None]
    x[:, ::7] *= 1000  # one is far above the others
    x[5, :32] = 0
    y, numbers_OI = product(format, x)
    group = row_format(format).group
    most = torch.cat([g.abs().amax(1, keepdim=True).expand_as(g) for g in x.double().split(group, 1)], 1)
    bound = 2**-15 * most @ numbers_OI.abs().T + 1e-5 * x.double().abs() @ numbers_OI.abs().T
    assert bool(((y - x.double() @ numbers_OI.T).abs() <= bound).all())


@needs_library
@pytest.mark.parametrize("format", READ)
def test_bfloat16_above_a_128th_of_the_largest_is_exact(format):
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(5, 256, generator=generator) * 0.9 + 0.1) * torch.randint(0, 2, (5, 256), generator=generator).mul(
        2
    ).sub(1)
    x = x.bfloat16()
    y, numbers_OI = product(format, x.float())
    assert_near(y, x.double() @ numbers_OI.T, 1e-6)


@needs_library
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_lost(wrong):
    x = torch.ones(2, 64)
    x[1, 40] = wrong
    y, _ = product("int4-g32", x)
    assert y[0].isfinite().all() and not y[1].isfinite().any()


@needs_library
@pytest.mark.parametrize("formats", [("int4-g32", "int4-g32"), ("int8-g64-z", "int4-g128")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_in_one_call_equal_float64(formats, dtype):
    """Widths that no group divides; some pairs are left out; router weights of any sign; inputs from tiny to large."""
    gate_up, down = stack(formats[0], 4, 26, 40), stack(formats[1], 4, 40, 13)
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(5, 40, generator=generator) * torch.tensor([1e-6, 0.1, 1, 3, 30])[:, None]).to(dtype)
    row, weight = torch.randint(-1, 4, (5, 3), generator=generator), torch.randn(5, 3, generator=generator)
    made = few_bits.experts(x, gate_up, down, row, weight.to(dtype))
    expected = torch.zeros(5, 40, dtype=torch.float64)
    for t, k in ((t, k) for t in range(5) for k in range(3) if row[t, k] >= 0):
        gate, up = (gate_up.numbers(torch.float64)[row[t, k]] @ x[t].double()).chunk(2)
        hidden = torch.nn.functional.silu(gate) * up * weight.to(dtype)[t, k]
        expected[t] += down.numbers(torch.float64)[row[t, k]] @ hidden
    assert made.dtype == torch.float32
    for got, want in zip(made.double(), expected, strict=True):
        assert_near(got, want, 3 * NEAR)


@needs_library
@pytest.mark.parametrize("format", (*READ, "int3-g32"))
@pytest.mark.parametrize("columns", [32, 40, 263])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_numbers_are_those_of_the_format_to_the_bit(format, columns, dtype):
    drawn = (
        torch.randn(9, columns, generator=torch.Generator().manual_seed(columns)) * torch.logspace(-38, 38, 9)[:, None]
    )
    drawn[3], drawn[4, 5] = 0, torch.nan
    packed = pack(format, row_format(format).write(drawn))
    made, expected = (read(packed) for read in (
        lambda given: few_bits.numbers(given, format, (9, columns), dtype),
        lambda given: unpack(format, given, (9, columns), dtype),
    ))  # fmt: skip
    assert torch.equal(made.isnan(), expected.isnan())
    assert torch.equal(made.nan_to_num(), expected.nan_to_num())


@needs_library
def test_whole_experts_alone_are_one_call(monkeypatch):
    """In few bits and as numbers; the same as cluster by cluster, where rows are written out."""
    x, (_, index, gates) = torch.randn(7, D, generator=torch.Generator().manual_seed(2)), routing(E, 7, 3)
    index[0, 0] = -1
    for format, kernels in (("int4-g32", few_bits), ("", few_rows)):
        container = container_of("swiglu", (Slot((OwnWeights(format=format),)),) * (E - 1) + (Slot(()),))
        calls, made = [], kernels.experts
        monkeypatch.setattr(kernels, "experts", lambda *given, made=made, calls=calls: calls.append(1) or made(*given))
        with torch.no_grad():
            found = container(x, index, gates)
            container.way = choice.LOOP
            assert_near(found, container(x, index, gates), NEAR)
        assert len(calls) == (1 if kernels is few_bits or few_rows.library() else 0)


def container_of(kind, slots):
    activate, has_gate, has_bias = KINDS[kind]
    shape = LayerShape("experts", E, 2, D, F, "router", "softmax", True, has_gate=has_gate, has_bias=has_bias)
    container = StandInExperts(Layout.of(LayerPlan("experts", slots), shape), activate, torch.float32, "cpu")
    generator = torch.Generator().manual_seed(1)
    container.requires_grad_(False)
    for path, of in container.paths:
        for leaf, size in of.kind.tensors(of.variant, container.layout).items():
            for row in getattr(container.stack(path), leaf):
                drawn = torch.randn(size, generator=generator) * 0.4
                made = is_packed(of.format, size)
                row.copy_(pack(of.format, row_format(of.format).write(drawn)) if made else drawn)
    return container


SLOTS = (
    Slot((OwnWeights(format="int4-g32"),)),
    Slot((OwnWeights(format="int8-g64"), LowRank(4, format="int4-g32"))),
    Slot((LowRank(4, format="int4-g32"),)),
    Slot((OwnWeights(format="int4-g32"), LowRank(3))),
    Slot((OwnWeights(),)),
    Slot((OwnWeights(format="int4-g32"),)),
)


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_a_container_equals_rows_made_numbers(kind):
    """Cluster by cluster is held against weights written out in test_few_bits."""
    container, found = container_of(kind, SLOTS), {}
    x, (_, index, gates) = torch.randn(7, D, generator=torch.Generator().manual_seed(2)), routing(E, 7, 3)
    for container.way in (choice.LOOP, "few bits"):
        with torch.no_grad():
            found[container.way] = container(x, index, gates)
    assert_near(found["few bits"], found[choice.LOOP], NEAR)


def test_few_tokens_without_gradients_are_served(monkeypatch):
    container, calls = container_of("no_gate", SLOTS), []  # native code has a SwiGLU of its own, where there is some
    container.activate = lambda pre: calls.append(len(pre)) or KINDS["no_gate"][0](pre)
    x, (_, index, gates) = torch.randn(7, D), routing(E, 7, 3)
    container(x, index, gates)
    assert len(calls) > 1  # cluster by cluster: gradients may be asked for
    calls.clear()
    with torch.no_grad():
        container(x, index, gates)
        assert (calls == [21]) is (few_bits.library() is not None)
        monkeypatch.setattr(choice, "FEW_BITS_ROWS", 1)
        calls.clear()
        container(x, index, gates)
    assert len(calls) > 1


def kinds(*formats: str) -> tuple[Matrices, ...]:
    return tuple(Matrices(format, 64, 32) for format in formats)


@pytest.mark.parametrize("makes", [False, True])
def test_what_serves_is_chosen_by_format_and_size(makes, monkeypatch):
    """Bytes are read for few rows; for more, rows of matrices become numbers, where the processor has products of bfloat16."""
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    monkeypatch.setattr(few_bits, "library", lambda: object())
    monkeypatch.setattr(native, "available", lambda: makes)
    with torch.no_grad():
        few, many = 64 * (choice.READ_ROWS if makes else choice.FEW_BITS_ROWS), 64 * choice.NATIVE_ROWS
        assert choice.choose(cpu, bf16, few, 64, True, in_few_bits=kinds("int4-g32", "int8-g64-z")) == "few bits"
        more = "native" if makes else choice.LOOP
        assert choice.choose(cpu, bf16, few + 1, 64, True, in_few_bits=kinds("int4-g32")) == more
        assert choice.choose(cpu, bf16, many, 64, True, in_few_bits=kinds("int4-g32")) == more
        assert choice.choose(cpu, bf16, many, 64, True, in_few_bits=kinds("int4-g32", "nvfp4")) == choice.LOOP
        assert choice.choose(cpu, bf16, many + 1, 64, True, in_few_bits=kinds("int4-g32")) == choice.LOOP
        assert choice.choose(cpu, torch.float32, few, 64, True, in_few_bits=kinds("int4-g32")) == "few bits"
        assert choice.choose(cpu, bf16, 8, 64, True, in_few_bits=kinds("int4-g32", "int3-g32")) == choice.LOOP
        assert choice.choose(cpu, torch.float64, 8, 64, True, in_few_bits=kinds("int4-g32")) == choice.LOOP
        monkeypatch.setattr(few_bits, "library", lambda: None)
        assert choice.choose(cpu, bf16, 8, 64, True, in_few_bits=kinds("int4-g32")) == more
        assert choice.choose(cpu, torch.float16, 8, 64, True, in_few_bits=kinds("int4-g32")) == choice.LOOP


@pytest.mark.parametrize(
    ("format", "columns", "known"),
    [
        *(("int4-g32", 40, True), ("int3-g32", 48, True), ("int3-g32", 40, False)),
        *(("fp8-block", 40, True), ("fp8-block", 41, False), ("nvfp4", 48, False), ("int-packed", 48, False)),
    ],
)
def test_a_format_whose_scales_a_device_could_not_read_is_none_that_products_know(format, columns, known):
    """Of 13 rows: codes of an odd count of bytes before scales of two, or matrices that are no multiple of four."""
    assert (coding(format, 13, columns) is not None) is known


def test_without_a_compiler_nothing_serves(monkeypatch, caplog):
    monkeypatch.setattr(native, "compiler", lambda: None)
    with caplog.at_level("INFO"):
        assert LIBRARY.__wrapped__() is None
    assert "made numbers one by one: no C++ compiler" in caplog.text
