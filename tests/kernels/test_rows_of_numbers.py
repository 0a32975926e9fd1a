"""Products that make numbers of rows in few bits on the way give what they give with those numbers, to the bit."""

from __future__ import annotations

import pytest
import torch

from locum.containers.container import StandInExperts
from locum.containers.layout import Layout
from locum.experts.parts.own_weights import OwnWeights
from locum.formats.rows import pack, row_format, unpack
from locum.kernels import choice, few_rows, native
from locum.kernels.packed import Packed
from locum.plans.plan import LayerPlan, Slot
from locum.shapes import LayerShape
from making.containers import KINDS, routing

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler or no avx512_bf16")
FORMATS = pytest.mark.parametrize(
    "format", ["int4-g32", "int4-g64-z", "int4-g128", "int8-g32", "int8-g64-z", "int8-g128"]
)
DTYPES = pytest.mark.parametrize("dtype", native.FORMATS)


def stack(format, items, outputs, inputs, size=1.0):
    """The lower halves of random matrices; the last of them is zero."""
    item, generator = row_format(format), torch.Generator().manual_seed(1)
    drawn = [torch.randn(2 * outputs, inputs, generator=generator) * size * (n < items - 1) for n in range(items)]
    return Packed(torch.stack([pack(format, item.write(x)) for x in drawn]), format, (2 * outputs, inputs))[:, outputs:]


def drawn(rows, items, inputs, pairs, dtype):
    generator = torch.Generator().manual_seed(pairs)
    item = torch.randint(-1, items, (pairs,), generator=generator)
    token = torch.randint(rows, (pairs,), generator=generator).sort().values
    return torch.randn(rows, inputs, generator=generator).to(dtype), item, token, generator


# Few rows of an item, and so many that its matrix is turned round; groups that divide nothing; matrices of one number.
SIZES = [
    (5, 4, 40, 96, 23),
    (4, 3, 13, 37, 9),
    (2, 2, 1, 1, 5),
    (300, 2, 130, 100, 700),
    (120, 1, 70, 4200, 260),
    (70, 3, 300, 7, 130),
]


@FORMATS
@DTYPES
@pytest.mark.parametrize(("rows", "items", "outputs", "inputs", "pairs"), SIZES)
@torch.no_grad()
def test_products_are_those_of_the_numbers(format, dtype, rows, items, outputs, inputs, pairs, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x, item, token, _ = drawn(rows, items, inputs, pairs, dtype)
    packed = stack(format, items + 1, outputs, inputs)
    made = []
    for weight in (packed, packed.numbers(dtype)):
        y, total = torch.ones(pairs, outputs, dtype=dtype), torch.ones(rows, outputs)
        native.add_(y, x, weight, item, token)
        native.scatter_(total, x[token] + 1, weight, item, token)
        made.append((y, total))
    for got, expected in zip(*made, strict=True):
        assert got.isfinite().all() and not (got == 1).all()
        assert torch.equal(got, expected)


@FORMATS
@DTYPES
@pytest.mark.parametrize(("width", "inner", "pairs"), [(40, 13, 30), (96, 70, 700), (7, 33, 260), (4200, 40, 5)])
@torch.no_grad()
def test_gates_and_ups_are_those_of_the_numbers(format, dtype, width, inner, pairs):
    x, item, token, generator = drawn(pairs, 2, width, pairs, dtype)
    packed, scale = stack(format, 3, 2 * inner, width, 0.1), torch.rand(pairs, 1, generator=generator)
    item = item.clamp(min=0)  # pairs without an item are left as they were, which is anything
    got, expected = (native.gated(x, weight, scale, item, token) for weight in (packed, packed.numbers(dtype)))
    assert got.any() and torch.equal(got, expected)


@FORMATS
@DTYPES
@pytest.mark.parametrize(("tokens", "width", "inner"), [(1, 40, 13), (5, 96, 70), (400, 33, 260)])
@torch.no_grad()
def test_whole_experts_are_those_of_the_numbers(format, dtype, tokens, width, inner):
    """The second matrices are in another format, or numbers."""
    gate_up, down = stack(format, 4, 2 * inner, width, 0.1), stack("int8-g32", 4, width, inner, 0.1)
    generator = torch.Generator().manual_seed(tokens)
    x, weight = torch.randn(tokens, width, generator=generator).to(dtype), torch.rand(tokens, 3, generator=generator)
    index = torch.randint(-1, 5, (tokens, 3), generator=generator)  # on both sides some are none
    numbers = (gate_up.numbers(dtype), down.numbers(dtype))
    expected = few_rows.experts(x, *numbers, index, weight)
    assert expected.any()
    for weights in ((gate_up, down), (gate_up, numbers[1]), (numbers[0], down)):
        assert few_rows.serves(x, *weights)
        assert torch.equal(few_rows.experts(x, *weights, index, weight), expected)


@torch.no_grad()
def test_what_the_products_do_not_read_is_not_served():
    x = torch.randn(2, 48).bfloat16()
    other = Packed(
        torch.stack([pack("int3-g32", row_format("int3-g32").write(torch.randn(8, 48)))]), "int3-g32", (8, 48)
    )
    assert few_rows.serves(x, stack("int4-g32", 1, 4, 48)) and not few_rows.serves(x, other)


@torch.no_grad()
@pytest.mark.parametrize("size", [1e-30, 1e30, 2e36])
@pytest.mark.parametrize("format", ["int4-g32", "int8-g32", "int4-g64-z", "int8-g64-z"])
def test_tiny_and_huge_weights(format, size):
    packed, x = stack(format, 2, 9, 64, size), torch.eye(64).bfloat16()
    y = torch.zeros(64, 9, dtype=torch.bfloat16)
    native.add_(y, x, packed, torch.zeros(64, dtype=torch.int64), torch.arange(64))
    assert torch.equal(y, packed.numbers(torch.bfloat16)[0].T)  # each product is one number of the matrix


@torch.no_grad()
@pytest.mark.parametrize("way", ["native", choice.LOOP])
@pytest.mark.parametrize("format", ["int4-g32", "int8-g64-z", "int3-g32"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_container_is_that_of_its_numbers(kind, way, format):
    """A format that the compiled products do not read is numbers before, cluster by cluster."""
    if way == "native" and format == "int3-g32":
        return
    activate, has_gate, has_bias = KINDS[kind]
    e, d, f = 4, 36, 20
    shape = LayerShape("experts", e, 2, d, f, "router", "softmax", True, has_gate=has_gate, has_bias=has_bias)
    made = {}
    for stored in (format, ""):
        plan = LayerPlan("experts", (Slot((OwnWeights(format=stored),)),) * e)
        made[stored] = StandInExperts(Layout.of(plan, shape), activate, torch.bfloat16, "cpu").requires_grad_(False)
    (path, of), (plain_path, _) = made[format].paths[0], made[""].paths[0]
    generator = torch.Generator().manual_seed(1)
    for leaf, size in of.kind.tensors(of.variant, made[format].layout).items():
        row = getattr(made[format].stack(path), leaf)
        plain = getattr(made[""].stack(plain_path), leaf)
        for n in range(e):
            numbers = torch.randn(size, generator=generator) * 0.3
            if row.dtype == torch.uint8:
                packed = pack(format, row_format(format).write(numbers))
                row[n], plain[n] = packed, unpack(format, packed, tuple(size), torch.bfloat16)
            else:
                row[n] = plain[n] = numbers.bfloat16()
    x = torch.randn(50, d, generator=generator).bfloat16()
    _, index, gates = routing(e, 50, 2, dtype=torch.bfloat16)
    for container in made.values():
        container.way = way
    got, expected = (container(x, index, gates) for container in made.values())
    assert got.any() and torch.equal(got, expected)
