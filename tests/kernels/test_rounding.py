"""Levels and codes that the processor's own instructions find, against torch and a loop over single numbers.

Letters: O rows, I columns, J columns of a group.
"""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch

from locum.experts import quantisers
from locum.experts.quantisers import Gram, gptq
from locum.formats.int_groups import Grid, least_range
from locum.formats.rows import row_format
from locum.kernels import rounding

FORMATS = ("int8-g32", "int4-g32", "int3-g64", "int2-g32-z", "int4-g128-z", "int2-g128")
O, I = 37, 150  # noqa: E741  groups and sixteen rows do not divide them
LIBRARY = rounding.library
needs_library = pytest.mark.skipif(rounding.library() is None, reason="no C++ compiler or no AVX2")


@pytest.fixture(params=["AVX512", "AVX2"], autouse=True)
def width(request, monkeypatch):
    """Registers of both widths, where the processor has both."""
    has = torch.backends.cpu.get_cpu_capability()
    if request.param > has:
        pytest.skip(f"this processor has {has}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    found = LIBRARY.__wrapped__()
    monkeypatch.setattr(rounding, "library", lambda: found)


def weights() -> torch.Tensor:
    """Rows of all sizes; some are zero, or alike."""
    drawn_OI = torch.randn(O, I, generator=torch.Generator().manual_seed(3))
    drawn_OI *= torch.logspace(-30, 30, O)[:, None]
    drawn_OI[4], drawn_OI[5], drawn_OI[6, :70] = 0, 0.75, 0
    return drawn_OI


@needs_library
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_the_range_that_loses_least_is_the_one_that_torch_finds(name, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    item, weight_OI = row_format(name), weights()
    found, expected = item.write(weight_OI, rounding.least), item.write(weight_OI)
    assert found.keys() == expected.keys() and all(torch.equal(found[part], expected[part]) for part in found)


@needs_library
def test_costs_of_every_group_and_errors_that_are_no_numbers():
    """By a loop over single numbers, in float64; of what is not finite, nothing is said of the choice but that there is one."""
    generator = torch.Generator().manual_seed(1)
    x, cost = torch.randn(5, 3, 20, generator=generator), torch.rand(3, 20, generator=generator)
    tried = Grid(torch.rand(6, 5, 3, 1, generator=generator).bfloat16().float(), None)
    found = rounding.least(x, cost, tried, 8)
    assert torch.equal(found, least_range(x, cost, tried, 8))
    for o in range(5):
        for h in range(3):
            losses = []
            for scale in tried.scale[:, o, h, 0].tolist():
                rounded = [(min(max(round(v / scale + 8), 0), 15) - 8) * scale for v in x[o, h].tolist()]
                squares = (
                    (v - w) ** 2 * c for v, w, c in zip(x[o, h].tolist(), rounded, cost[h].tolist(), strict=True)
                )
                losses.append(math.fsum(squares))
            assert losses[int(found[o, h])] == pytest.approx(min(losses), rel=1e-5)
    x[0, 0, 0] = torch.nan
    assert torch.equal(rounding.least(x, cost, tried, 8), least_range(x, cost, tried, 8))


@needs_library
@pytest.mark.parametrize("name", FORMATS)
def test_gptq_is_what_torch_makes_of_it(name):
    """To the bit, and for groups that the processor does not know too."""
    generator, item = torch.Generator().manual_seed(2), row_format(name)
    x_TI = torch.randn(300, I, generator=generator, dtype=torch.float64) * torch.logspace(0, 3, I)
    gram = Gram(x_TI.T @ x_TI / 300)
    weight_OI = torch.randn(2 * I, I, generator=generator)[::2] if item.bits == 4 else weights()
    found = gptq(weight_OI, gram, item)
    with mock.patch.object(rounding, "library", lambda: None):
        expected = gptq(weight_OI, gram, item)
    assert all(torch.equal(found.parts[part], expected.parts[part]) for part in expected.parts)
    assert torch.allclose(found.error_O, expected.error_O, rtol=1e-9)
    assert quantisers.in_order is rounding.in_order
