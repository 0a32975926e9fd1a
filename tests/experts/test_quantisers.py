"""Quantisers against slow versions, and planted truths about what they may lose.

Letters: OUT outputs, IN inputs, R rank, T tokens.
"""

from __future__ import annotations

import pytest
import torch

from locum.experts.factors import refitted
from locum.experts.parts.low_rank import LowRank
from locum.experts.quantisers import BORROWED, DAMPING, QUANTISERS, Gram, errors, gptq, seen_by, shrunk, writer
from locum.formats.int_groups import IntGroups
from locum.formats.rows import row_format, stored_shape, unpack

FORMATS = ("int4-g32", "int3-g32", "int2-g32-z", "int8-g64")
OUT, IN, T = 12, 70, 200  # groups do not divide the inputs


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int = T, seed: int = 1) -> torch.Tensor:
    """Inputs that are much alike, as hidden states are: a few directions, and little of everything else."""
    return drawn(tokens, 6, seed=seed) @ drawn(6, IN, seed=9) + 0.2 * drawn(tokens, IN, seed=seed + 1)


def gram_of(x_TI: torch.Tensor) -> torch.Tensor:
    return x_TI.double().T @ x_TI.double() / len(x_TI)


def textbook(weight_OI: torch.Tensor, gram_II: torch.Tensor, item: IntGroups) -> torch.Tensor:
    """Optimal brain quantisation in the order of the columns, a row at a time: the inverse of what is left, anew for each column."""
    damped_II = gram_II + DAMPING * float(gram_II.diagonal().mean()) * torch.eye(IN, dtype=torch.float64)
    prices = [1 / float(torch.linalg.inv(damped_II[c:, c:])[0, 0]) for c in range(IN)]
    found = torch.zeros(weight_OI.shape)
    for o, row in enumerate(weight_OI.double()):
        rest_I = row.clone()
        for c in range(IN):
            if c % item.group == 0:
                here = slice(c, min(c + item.group, IN))
                price = torch.tensor([price / max(prices) for price in prices[here]])
                grid = item.grid(rest_I[here].float()[None], price)
            number = item.numbers(item.codes(rest_I[c : c + 1].float()[None], grid), grid)[0, 0]
            inverse = torch.linalg.inv(damped_II[c:, c:])
            found[o, c] = number
            rest_I[c:] -= (rest_I[c] - number.double()) / inverse[0, 0] * inverse[0]
    return found


@pytest.mark.parametrize("name", ["int4-g32", "int2-g32-z"])
def test_gptq_is_the_textbook_s(name):
    weight, gram, item = drawn(3, IN), gram_of(inputs()), row_format(name)
    found = item.read(gptq(weight, Gram(gram), item).parts)[:, :IN]
    assert torch.equal(found, textbook(weight, gram, item))
    wide = weight.double()
    gptq(wide, Gram(gram), item)
    assert torch.equal(wide, weight.double())  # what it is given stays


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [0, 1, 20, T])
def test_gptq_loses_no_row_more_than_nearest_on_what_it_was_given(name, tokens):
    weight, item = drawn(OUT, IN), row_format(name)
    gram = gram_of(inputs(tokens)) if tokens else torch.zeros(IN, IN, dtype=torch.float64)
    losses = {}
    for quantiser in QUANTISERS:
        written = writer(name, quantiser)(weight, Gram(gram))
        assert torch.equal(written.numbers, unpack(name, written.stored, (OUT, IN), torch.float32))
        losses[quantiser] = errors(weight, written.numbers, gram)
    assert bool((losses["gptq"] <= losses["nearest"]).all())
    if tokens == T and item.bits < 8:
        assert float(losses["gptq"].sum()) < 0.7 * float(losses["nearest"].sum())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 20, T])
def test_the_errors_that_gptq_says_are_those_of_its_numbers(name, tokens):
    """And of two ways to round a row, the better one is that in float64, also where float32 does not tell."""
    weight, item, gram = drawn(OUT, IN), row_format(name), Gram(gram_of(inputs(tokens)))
    found, near = gptq(weight, gram, item), item.write(weight)
    error_O, least_O = (errors(weight, item.read(parts)[:, :IN], gram.matrix_II) for parts in (found.parts, near))
    assert torch.allclose(found.error_O, error_O, rtol=1e-6, atol=1e-9 * float(found.damped_O.max()))
    rounded = writer(name, "gptq")(weight, gram).numbers
    assert torch.equal(errors(weight, rounded, gram.matrix_II), torch.minimum(error_O, least_O))


def test_errors_are_those_of_the_outputs():
    weight, off, x_TI = drawn(OUT, IN), drawn(OUT, IN, seed=4), inputs()
    expected = ((x_TI @ (weight - off).T) ** 2).mean(0)
    assert torch.allclose(errors(weight, off, gram_of(x_TI)).float(), expected, rtol=1e-3)


@pytest.mark.parametrize("quantiser", QUANTISERS)
@pytest.mark.parametrize("name", FORMATS)
def test_zeros_huge_weights_and_weights_that_are_alike(name, quantiser):
    write, gram = writer(name, quantiser), Gram(gram_of(inputs()))
    assert torch.equal(write(torch.zeros(OUT, IN), gram).numbers, torch.zeros(OUT, IN))
    weight = drawn(OUT, IN)
    numbers, huge = (write(weight * size, gram).numbers for size in (1.0, 2.0**80))
    assert torch.allclose(huge / 2.0**80, numbers, rtol=1e-5, atol=1e-6)
    alike = torch.full((OUT, IN), 0.75)
    assert torch.allclose(write(alike, gram).numbers, alike, rtol=0.02)
    one, two = write(weight, gram), write(weight.clone(), Gram(gram.matrix_II.clone()))
    assert torch.equal(one.stored, two.stored) and one.stored.shape == stored_shape(name, (OUT, IN))


def test_without_a_gram_matrix_and_for_floats_gptq_is_nearest():
    weight, gram = drawn(OUT, 64), Gram(gram_of(inputs())[:64, :64])
    assert torch.equal(
        writer("int4-g32", "gptq")(weight, None).stored, writer("int4-g32", "nearest")(weight, None).stored
    )
    assert torch.equal(writer("nvfp4", "gptq")(weight, gram).stored, writer("nvfp4", "nearest")(weight, gram).stored)


# --- what experts borrow


def test_an_expert_without_a_token_has_the_layer_s_mean_and_one_with_many_its_own():
    x_TI, mean = inputs(), gram_of(inputs(500, seed=20))
    sums = x_TI.double().T @ x_TI.double()
    assert torch.allclose(shrunk(torch.zeros_like(sums), 0, mean), mean, rtol=1e-12)
    borrowed = BORROWED * IN
    assert torch.allclose(shrunk(sums, T, mean), (sums + borrowed * mean) / (T + borrowed))
    many = 1e6
    assert torch.allclose(shrunk(sums / T * many, many, mean), sums / T, rtol=1e-3, atol=1e-4)


def test_of_hidden_units_an_expert_borrows_their_size_and_no_products():
    zeros = {"up_FD": torch.zeros(4, 4).double(), "down_DF": torch.zeros(3, 3).double()}
    found = seen_by(zeros, 0.0, 2 * torch.ones(4, 4).double(), 0.5)
    assert torch.equal(found["gate_FD"], 2 * torch.ones(4, 4).double())
    assert torch.equal(found["up_FD"], found["gate_FD"])
    assert torch.equal(found["down_DF"], 0.5 * torch.eye(3).double())


# --- two factors, one after the other


def test_the_second_factor_makes_up_for_the_first():
    """Against least squares on the inputs themselves."""
    b_OR, a_RI, x_TI = drawn(OUT, 5), drawn(5, IN, seed=1), inputs()
    new_RI = a_RI + 0.1 * drawn(5, IN, seed=2)
    expected = torch.linalg.lstsq((x_TI @ new_RI.T).double(), (x_TI @ a_RI.T @ b_OR.T).double()).solution.T
    assert torch.allclose(refitted(b_OR, a_RI, new_RI, new_RI.double() @ gram_of(x_TI)), expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(refitted(b_OR, a_RI, a_RI, None).float(), b_OR, rtol=1e-4, atol=1e-5)
    assert torch.equal(refitted(b_OR, a_RI, torch.zeros(5, IN), None).float(), b_OR)


@pytest.mark.parametrize("has_gate", [True, False])
def test_an_adapter_in_few_bits_loses_less_than_its_factors_apart(has_gate):
    d, f, r, name = IN, 40, 6, "int3-g32"
    row = {
        "gate_up_A": drawn(r * (2 if has_gate else 1), d),
        "up_B_FR": drawn(f, r, seed=1),
        "down_A_RF": drawn(r, f, seed=2),
    }
    row |= {"down_B_DR": drawn(d, r, seed=3)} | ({"gate_B_FR": drawn(f, r, seed=4)} if has_gate else {})
    x_TD, h_TF = inputs(), drawn(T, 3, seed=5) @ drawn(3, f, seed=6) + 0.1 * drawn(T, f, seed=7)
    write = writer(name, "gptq")
    stored = LowRank.store(row, write, {"up_FD": Gram(gram_of(x_TD)), "down_DF": Gram(gram_of(h_TF))})
    assert stored.keys() == row.keys()
    numbers = {leaf: unpack(name, stored[leaf], tuple(t.shape), torch.float32) for leaf, t in row.items()}
    apart = {leaf: write(t, None).numbers for leaf, t in row.items()}

    def off(made):
        inner = LowRank.first(made, (x_TD,)) - LowRank.first(row, (x_TD,))
        outer = LowRank.second(made, h_TF, torch.ones(T, 1)) - LowRank.second(row, h_TF, torch.ones(T, 1))
        return float(inner.square().sum()), float(outer.square().sum())

    assert all(mine < 0.9 * theirs for mine, theirs in zip(off(numbers), off(apart), strict=True))
    blind = LowRank.store(row, writer(name, "nearest"), {})  # without Gram matrices, all inputs are alike
    first = unpack(name, blind["gate_up_A"], tuple(row["gate_up_A"].shape), torch.float32)
    fitted = refitted(row["up_B_FR"], row["gate_up_A"][-r:], first[-r:], None).float()
    assert torch.equal(blind["up_B_FR"], writer(name, "nearest")(fitted, None).stored)
