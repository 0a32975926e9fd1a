"""The processor's products of few rows, against float64 with the same numbers, beside what torch makes of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from locum.kernels import few_rows, native
from making.containers import assert_near, relative_error

pytestmark = pytest.mark.skipif(not few_rows.library(), reason="no C++ compiler or no avx512_bf16")
NEAR = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
DTYPES = pytest.mark.parametrize("dtype", NEAR)


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


def random(*size, seed=0, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@DTYPES
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 64, 96), (3, 37, 45), (16, 300, 333), (33, 5, 8), (1, 1, 1)]
)
@torch.no_grad()
def test_linear_is_as_near_to_float64_as_torch(dtype, has_bias, rows, outputs, inputs, threads):
    x = random(rows, inputs + 3, dtype=dtype)[:, 1:-2]  # of a wider tensor
    weight, bias = random(outputs, inputs, seed=1, dtype=dtype), random(outputs, seed=2, dtype=dtype) * 9
    bias = bias if has_bias else None
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    made = few_rows.linear(x, weight, bias)
    assert made.dtype == dtype and made.shape == exact.shape
    assert_near(made.double(), exact, NEAR[dtype])
    assert relative_error(made, exact) <= 1.05 * relative_error(functional.linear(x, weight, bias), exact) + 1e-7


@torch.no_grad()
def test_linear_keeps_the_shape_of_what_comes_before_the_last_axis():
    x, weight = random(2, 3, 8).transpose(0, 1), random(5, 8, seed=1)
    assert_near(few_rows.linear(x, weight), functional.linear(x, weight), 1e-6)


@DTYPES
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "width", "inner"), [(1, 3, 7, 96, 40), (5, 2, 4, 33, 150), (40, 8, 9, 16, 8)]
)
@torch.no_grad()
def test_experts_equal_float64(dtype, tokens, top_k, experts, width, inner, threads):
    """Some indices are no expert's, on both sides; some experts have no token."""
    x, weight = random(tokens, width, dtype=dtype), random(tokens, top_k, seed=1).sigmoid()
    gate_up = random(experts, 2 * inner, width, seed=2, dtype=dtype) / math.sqrt(width)
    down = random(experts, width, inner, seed=3, dtype=dtype) / math.sqrt(inner)
    generator = torch.Generator().manual_seed(4)
    index = torch.stack([torch.randperm(experts - 1, generator=generator)[:top_k] for _ in range(tokens)])
    index[tokens // 2, 0], index[-1, -1] = -1, experts
    exact = torch.zeros(tokens, width, dtype=torch.float64)
    for t in range(tokens):
        for k in range(top_k):
            if 0 <= (e := int(index[t, k])) < experts:
                gate, up = (gate_up[e].double() @ x[t].double()).chunk(2)
                exact[t] += weight[t, k].double() * (down[e].double() @ (functional.silu(gate) * up))
    assert_near(few_rows.experts(x, gate_up, down, index, weight).double(), exact, 2 * NEAR[dtype])
    assert_near(few_rows.experts(x, gate_up, down, index.int(), weight.bfloat16()).double(), exact, 2**-7)


@DTYPES
@pytest.mark.parametrize(
    ("prompts", "heads", "groups", "positions", "width", "wide"),
    [
        (1, 4, 4, 130, 128, 128),
        (3, 6, 2, 33, 40, 24),
        (2, 2, 1, 1, 8, 130),
        (1, 5, 5, 16, 1, 1),
        (2, 8, 2, 300, 96, 65),
    ],
)
@torch.no_grad()
def test_attention_of_one_query_is_as_near_to_float64_as_torch(
    dtype, prompts, heads, groups, positions, width, wide, threads
):
    """Heads may share keys and values; scores of any size, among them some that only a softmax less its largest can hold."""
    query = random(prompts, 1, heads, width, dtype=dtype).transpose(1, 2) * 3
    key = random(prompts, groups, positions, width, seed=1, dtype=dtype)
    value = random(prompts, groups, positions, wide, seed=2, dtype=dtype)
    for scale in (width**-0.5, 20.0):
        made = few_rows.attend(query, key, value, scale)
        given = [x.repeat_interleave(heads // groups, 1) for x in (key, value)]
        exact = functional.scaled_dot_product_attention(query.double(), *(x.double() for x in given), scale=scale)
        exact = exact.transpose(1, 2)
        theirs = functional.scaled_dot_product_attention(query, *given, scale=scale).transpose(1, 2)
        assert made.dtype == dtype and made.shape == (prompts, 1, heads, wide)
        assert relative_error(made, exact) <= 1.05 * relative_error(theirs, exact) + (1e-5 if scale == 20.0 else 1e-6)


@DTYPES
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@torch.no_grad()
def test_attention_does_not_lose_what_is_no_number(dtype, wrong):
    query, key, value = (random(2, 1, n, 16, seed=n, dtype=dtype) for n in (1, 20, 20))
    key[1, 0, 5, 3] = wrong
    made = few_rows.attend(query, key, value, 1.0)
    assert made[0].isfinite().all() and not made[1].isfinite().any()


@DTYPES
@pytest.mark.parametrize("plus", [0.0, 1.0])
@torch.no_grad()
def test_norm_equals_float64(dtype, plus):
    x = random(4, 3, 37, dtype=dtype).transpose(0, 1) * torch.tensor([1e-4, 1.0, 100.0]).view(3, 1, 1).to(dtype)
    weight = random(37, seed=1, dtype=dtype)
    wide = x.double()
    exact = (plus + weight.double()) * wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    made = few_rows.norm(x, weight, plus, 1e-6)
    assert made.is_contiguous() and made.dtype == dtype
    torch.testing.assert_close(made.double(), exact, rtol=NEAR[dtype], atol=1e-6)


def turned(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


@DTYPES
@pytest.mark.parametrize(
    ("prompts", "width", "heads", "groups", "head", "of_qk", "has_bias"),
    [(1, 64, 4, 2, 16, None, False), (3, 96, 3, 1, 32, "head", True), (2, 80, 5, 5, 24, "all", True)],
)
@torch.no_grad()
def test_a_layer_up_to_its_experts_is_its_parts_in_turn(
    dtype, prompts, width, heads, groups, head, of_qk, has_bias, threads
):
    """To the bit: everything is rounded where the parts round, and a rotation where torch does."""
    seeds = iter(range(99))

    def drawn(*size):
        return random(*size, seed=next(seeds), dtype=dtype)

    x, cos, sin = drawn(prompts, 1, width), drawn(prompts, 1, head), drawn(prompts, 1, head)
    before, after = few_rows.Norm(drawn(width), 0.0, 1e-5), few_rows.Norm(drawn(width), 1.0, 1e-6)
    weights = [drawn(n * head, width) / 8 for n in (heads, groups, groups)]
    biases = [drawn(len(w)) if has_bias else None for w in weights]
    sizes = [head if of_qk == "head" else n * head for n in (heads, groups)]
    norms = [few_rows.Norm(drawn(size), 1.0, 1e-6) if of_qk else None for size in sizes]
    made = few_rows.project(x, before, weights, biases, *norms, cos, sin)
    expected = []
    for w, bias, norm in zip(weights, biases, (*norms, None), strict=True):
        y = few_rows.linear(few_rows.norm(x, *before), w, bias)
        y = y if norm is None or of_qk == "head" else few_rows.norm(y, *norm)
        y = y.view(prompts, 1, -1, head)
        expected.append((y if norm is None or of_qk == "all" else few_rows.norm(y, *norm)).transpose(1, 2))
    expected[:2] = [turned(y, cos[:, None], sin[:, None]) for y in expected[:2]]
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))

    keys, values = drawn(prompts, groups, 7, head), drawn(prompts, groups, 7, head)
    last, bias = drawn(width, heads * head) / 8, drawn(width) if has_bias else None
    hidden, given = few_rows.attended(x, made[0], keys, values, 0.3, last, bias, after)
    expected = x + few_rows.linear(few_rows.attend(made[0], keys, values, 0.3).flatten(2), last, bias)
    assert torch.equal(hidden, expected) and torch.equal(given, few_rows.norm(expected, *after))


@DTYPES
@pytest.mark.parametrize("has_bias", [False, True])
@torch.no_grad()
def test_route_takes_the_largest_of_the_softmax(dtype, has_bias):
    x, weight, bias = random(6, 48, dtype=dtype), random(19, 48, seed=1, dtype=dtype), random(19, seed=2, dtype=dtype)
    bias = bias if has_bias else None
    for sums_to_one in (False, True):
        logits, gates, index = few_rows.route(x, weight, bias, 5, sums_to_one)
        assert torch.equal(logits, few_rows.linear(x, weight, bias))
        top = logits.double().softmax(-1).topk(5)
        expected = top.values / (top.values.sum(-1, keepdim=True) if sums_to_one else 1)
        torch.testing.assert_close(gates.double(), expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(logits.gather(1, index), logits.gather(1, top.indices))


@torch.no_grad()
def test_what_is_equal_goes_by_its_index_and_what_is_no_number_ends_nothing():
    weight = torch.zeros(6, 8)
    assert few_rows.route(torch.ones(1, 8), weight, None, 3, True)[2].tolist() == [[0, 1, 2]]
    _, gates, index = few_rows.route(torch.full((1, 8), torch.nan), weight, None, 3, True)
    assert gates.isnan().all() and index.tolist() == [[0, 1, 2]]


@torch.no_grad()
def test_they_serve_plain_numbers_of_one_format_without_gradients():
    x, weight = torch.ones(1, 4), nn.Parameter(torch.ones(3, 4))
    assert few_rows.serves(x, weight, None)
    for other in (weight.double(), weight.bfloat16(), weight.to("meta"), torch.ones(4, 3).T):
        assert not few_rows.serves(x, other)
    assert not few_rows.serves(x[:0], weight) and not few_rows.serves(x.half(), weight.half())
    with torch.enable_grad():
        assert not few_rows.serves(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not few_rows.serves(x, weight)


def test_without_a_compiler_or_the_processor_there_are_none(monkeypatch, caplog):
    monkeypatch.setattr(native, "compiler", lambda: None)
    with caplog.at_level("INFO"):
        assert few_rows.library.__wrapped__() == {}
    assert "torch's own products are used: no C++ compiler" in caplog.text
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert few_rows.library.__wrapped__() == {}


def test_a_failure_to_compile_is_said(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", ("--no-such-flag",))
    assert few_rows.library.__wrapped__() == {}
    assert "torch's own are used" in caplog.text
