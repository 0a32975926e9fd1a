"""Whole numbers in groups, and matrices as runs of bytes, against loops over single numbers and bits.

Letters: O outputs, I inputs.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from locum.errors import OptionError
from locum.formats.format import FORMATS
from locum.formats.int_groups import CLIPS, STEP, Grid, IntGroups
from locum.formats.rows import pack, row_format, stored_shape, unpack

NAMES = [f"int{bits}-g{group}{z}" for bits, group, z in itertools.product((2, 3, 4, 8), (32, 128), ("", "-z"))]
OTHERS = ("fp8-scaled", "fp8-block", "int8-scaled", "mxfp4", "nvfp4", "nvfp4-modelopt")
SHAPES = ((1, 1), (3, 5), (4, 64), (3, 70))


def matrix(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def there_and_back(name: str, weight: torch.Tensor) -> torch.Tensor:
    return unpack(name, pack(name, row_format(name).write(weight)), tuple(weight.shape), torch.float32)


def read_slowly(item: IntGroups, parts: dict[str, torch.Tensor], columns: int) -> list[list[float]]:
    """Row by row, each as one long number whose lowest bits are the first code."""
    rows = []
    for o, packed in enumerate(parts["_codes"].tolist()):
        bits, row = int.from_bytes(bytes(packed), "little"), []
        for i in range(columns):
            code, scale = bits >> i * item.bits & 2**item.bits - 1, float(parts["_scales"][o, i // item.group])
            low = float(parts["_minimums"][o, i // item.group]) if item.zero_points else -scale * 2 ** (item.bits - 1)
            row.append(code * scale + low)
        rows.append(row)
    return rows


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_numbers_lie_as_a_slow_reader_finds_them_and_are_as_many_bytes_as_promised(name, shape):
    item, weight = row_format(name), matrix(*shape)
    parts = item.write(weight)
    assert item.name == name
    found = there_and_back(name, weight)
    assert torch.allclose(found, torch.tensor(read_slowly(item, parts, shape[1])), rtol=1e-6, atol=1e-6)
    rows, (eights, groups) = shape[0], (math.ceil(shape[1] / 8), math.ceil(shape[1] / item.group))
    promised = rows * (eights * item.bits + groups * 2 * (2 if item.zero_points else 1))
    assert item.nbytes(shape) == promised == sum(part.nbytes for part in parts.values())
    assert stored_shape(name, shape) == (promised,) == tuple(pack(name, parts).shape)
    assert item.shape({"_codes": {"shape": parts["_codes"].shape}}) == (rows, eights * 8)
    assert torch.equal(pack(name, item.write(weight)), pack(name, parts))  # the same bytes every time


def levels_of(item: IntGroups, low: float, high: float) -> list[list[float]]:
    """All sets of levels that are tried for a group, in order."""

    def stored(x: float) -> float:
        return float(torch.tensor(x).bfloat16())

    tried, codes = [], range(2**item.bits)
    half, most = 2 ** (item.bits - 1), high if high > -low else low
    for step in range(CLIPS[item.bits]):
        share = 1 - step * STEP
        if item.zero_points:
            middle, reach = (low + high) / 2, (high - low) / 2 * share
            minimum = stored(middle - reach)
            scale = stored((middle + reach - minimum) / (2**item.bits - 1))
            tried.append([code * scale + minimum for code in codes])
            continue
        for scale in (stored(-most / half * share), stored(abs(most) / (half - 1) * share)):
            tried.append([(code - half) * scale for code in codes])
    return tried


@pytest.mark.parametrize("name", ["int2-g32", "int3-g32", "int4-g32", "int8-g32", "int2-g32-z", "int4-g64-z"])
def test_levels_are_the_best_of_those_that_are_tried_and_numbers_the_nearest(name):
    item, weight = row_format(name), matrix(4, 70)
    found = there_and_back(name, weight)
    for o in range(4):
        for begin in range(0, 70, item.group):
            group = weight[o, begin : begin + item.group].tolist()
            losses = [
                sum(min((x - level) ** 2 for level in levels) for x in group)
                for levels in levels_of(item, min(group), max(group))
            ]
            mine = sum((x - y) ** 2 for x, y in zip(group, found[o, begin : begin + item.group].tolist(), strict=True))
            assert mine == pytest.approx(min(losses), rel=1e-4)


def test_clipping_is_worth_its_search():
    """Few bits lose less with a narrower range, and never more than with the whole."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    for bits in (2, 3, 4):
        item = IntGroups(bits)
        groups = weight.unflatten(1, (-1, 32))
        most = groups.abs().amax(-1, keepdim=True)
        whole = Grid((most / (2 ** (bits - 1) - 1)).bfloat16().float(), None)
        plain = item.numbers(item.codes(groups, whole), whole).flatten(1)
        searched = there_and_back(item.name, weight)
        assert float((searched - weight).square().sum()) < 0.95 * float((plain - weight).square().sum())


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_zeros_stay_zeros_and_huge_and_tiny_weights_keep_their_shape(name):
    assert torch.equal(there_and_back(name, torch.zeros(4, 64)), torch.zeros(4, 64))
    weight = matrix(4, 64)
    off = (there_and_back(name, weight) - weight).norm() / weight.norm()
    sizes = (2.0**100, 2.0**-100) if name in NAMES else (2.0**12, 2.0**-8)  # scales of others have fewer exponents
    for size in sizes:
        again = there_and_back(name, weight * size) / size
        assert bool(again.isfinite().all())
        assert float((again - weight).norm() / weight.norm()) <= float(off) + 1e-6
    one = torch.zeros(4, 64)
    one[1, 3] = 1.5
    assert float((there_and_back(name, one) - one).abs().max()) <= 0.02


@pytest.mark.parametrize("name", [n for n in NAMES if "g32" in n])
def test_numbers_that_are_levels_come_back_to_the_bit(name):
    item = row_format(name)
    codes = torch.randint(0, 2**item.bits, (6, 64), generator=torch.Generator().manual_seed(5)).float()
    codes[:, ::32], codes[:, 1::32] = 0, 2**item.bits - 1  # the whole range is used
    scale = torch.full((6, 2, 1), 0.25)
    grid = Grid(scale, torch.full((6, 2, 1), -1.5) if item.zero_points else None)
    weight = item.numbers(codes.unflatten(1, (-1, 32)), grid).flatten(1)
    assert torch.equal(there_and_back(name, weight), weight)


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_the_same_numbers_as_their_parts(name):
    weight, item = matrix(32, 64), FORMATS[name]
    assert torch.equal(there_and_back(name, weight), item.read(item.write(weight)))
    assert stored_shape(name, (32, 64)) == (item.nbytes((32, 64)),)


def test_mxfp4_of_one_matrix_is_that_of_a_stack():
    weight, item = matrix(5, 64), FORMATS["mxfp4"]
    stacked = item.read(item.write(weight.T[None]))[0].T
    assert torch.equal(item.read(item.write(weight)), stacked)


def test_vectors_stay_as_they_are_and_so_does_what_has_no_format():
    assert stored_shape("int4-g32", (70,)) == (70,)
    assert stored_shape("", (3, 70)) == (3, 70)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("int5-g32", (4, 64), "unknown format 'int5-g32' of weights in few bits; allowed: intB-gG .* fp8-block"),
        ("int4-g48", (4, 64), "unknown format 'int4-g48'"),
        ("int4", (4, 64), "unknown format 'int4'"),
        ("bf16-g32", (4, 64), "unknown format"),
        ("nvfp4", (4, 20), r"nvfp4 needs rows in groups of 16, not a tensor of shape \[4, 20\]"),
        ("mxfp4", (4, 48), "mxfp4 holds matrices whose rows come in blocks of 32"),
        ("int8", (4, 64), "weights are not written in int8"),
    ],
)
def test_what_cannot_be_is_refused(name, shape, words):
    with pytest.raises(OptionError, match=words):
        stored_shape(name, shape)
