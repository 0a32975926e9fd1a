"""Masks: which weights become zero, and what SparseGPT makes of the others, against plain loops.

Letters: O outputs, I inputs.
"""

from __future__ import annotations

import pytest
import torch

from locum.errors import OptionError
from locum.experts.masks import BLOCK, Pattern, by_norms, sparsegpt
from locum.experts.quantisers import DAMPING, errors

PATTERNS = ("2:4", "1:4", "4:8", "0.5", "0.3")


def drawn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(inputs: int, seed: int = 1) -> torch.Tensor:
    x_TI = drawn(4 * inputs, inputs, seed=seed) @ (
        torch.eye(inputs, dtype=torch.float64) + 0.5 * drawn(inputs, inputs, seed=2)
    )
    return x_TI.T @ x_TI / len(x_TI)


def groups(pattern: str, inputs: int) -> list[tuple[range, int]]:
    """Inputs that are compared, and how many of them become zero."""
    if ":" not in pattern:
        return [(range(inputs), int(float(pattern) * inputs + 1e-9))]
    left, size = map(int, pattern.split(":"))
    found = [range(i, min(i + size, inputs)) for i in range(0, inputs, size)]
    return [(group, len(group) * (size - left) // size) for group in found]


@pytest.mark.parametrize("inputs", [16, 18])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_lowest_of_every_group_become_zero(pattern: str, inputs: int) -> None:
    weight, square = drawn(5, inputs), drawn(inputs, seed=3).square()
    expected = weight.tolist()
    for row in expected:
        scores = [abs(w) * float(s) ** 0.5 for w, s in zip(row, square, strict=True)]
        for group, count in groups(pattern, inputs):
            for i in sorted(group, key=lambda i: scores[i])[:count]:
                row[i] = 0.0
    assert by_norms(weight, square, Pattern.of(pattern)).tolist() == expected
    plain, none = (by_norms(weight, x, Pattern.of(pattern)) for x in (None, torch.zeros(inputs)))
    assert torch.equal(plain, none) and not torch.equal(plain, by_norms(weight, square, Pattern.of(pattern)))


@pytest.mark.parametrize("inputs", [8, 10])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "0.5"])
def test_sparsegpt_equals_a_loop_with_an_inverse_for_every_column(pattern: str, inputs: int) -> None:
    weight, gram = drawn(3, inputs), correlated(inputs)
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(inputs)
    left = [damped[c:, c:].inverse() for c in range(inputs)]  # of the columns that are there when c is reached
    expected, zero = weight.clone(), set()
    for group, count in groups(pattern, inputs):
        price = {(o, c): float(expected[o, c] ** 2 / left[c][0, 0]) for o in range(3) for c in group}
        if ":" in pattern:
            zero |= {
                key for o in range(3) for key in sorted((o, c) for c in group) if key in _cheapest(price, o, count)
            }
        else:
            zero |= set(sorted(price, key=price.get)[: int(float(pattern) * len(price))])
        for c in group:
            for o in range(3):
                if (o, c) in zero:
                    expected[o, c:] -= expected[o, c] / left[c][0, 0] * left[c][0]
                    expected[o, c] = 0
    found = sparsegpt(weight, gram, Pattern.of(pattern))
    torch.testing.assert_close(found, expected)
    assert {(o, c) for o, c in (found == 0).nonzero().tolist()} == zero


def _cheapest(price: dict, o: int, count: int) -> set:
    return set(sorted((key for key in price if key[0] == o), key=price.get)[:count])


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_sparsegpt_loses_less_on_its_inputs_than_zeros_alone_and_chooses_in_blocks(pattern: str) -> None:
    weight, gram = drawn(24, BLOCK + 32), correlated(BLOCK + 32)
    before = weight.clone()
    masked = sparsegpt(weight, gram, Pattern.of(pattern)), by_norms(weight, gram.diagonal(), Pattern.of(pattern))
    assert torch.equal(weight, before)
    one, two = (float(errors(weight, x, gram).sum()) for x in masked)
    assert 0 < one < 0.75 * two
    zeros = sparsegpt(weight, gram, Pattern.of("0.5")) == 0
    assert int(zeros[:, :BLOCK].sum()) == 12 * BLOCK and int(zeros[:, BLOCK:].sum()) == 12 * 32


def test_where_inputs_are_alike_and_apart_sparsegpt_is_magnitude() -> None:
    weight, alike = drawn(6, 16), torch.eye(16, dtype=torch.float64)
    assert torch.equal(sparsegpt(weight, 3 * alike, Pattern.of("2:4")), by_norms(weight, None, Pattern.of("2:4")))
    assert torch.equal(sparsegpt(weight, 0 * alike, Pattern.of("2:4")), by_norms(weight, None, Pattern.of("2:4")))


@pytest.mark.parametrize("text", ["4:2", "0:4", "2:2", "2", "1.5", "0", "0.0", "-0.5", "half", "2:4:8", ""])
def test_other_patterns_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="is not known; write how many of how many"):
        Pattern.of(text)
