"""The two operations of grouped.py as Triton kernels, for CUDA. Nothing here waits for the device or asks what was routed.

Few pairs (decoding): a program takes one block of outputs of one pair's matrix and finds the other pairs of its item by
looking at all items, so nothing is sorted and the matrix is read once for up to 16 of them: one launch.

Many pairs: two launches write down, for the products that share items and tokens, pairs by item and where the units
begin. A program takes a block of an item's units; which block and item is its own, it works out from the units' numbers.
Rows of x are gathered as they are loaded, a unit's product is added to all of its pairs as it is stored.

`scatter` writes products down and adds them up token by token, always in the same order: no atomic additions, so the same
call gives the same bits. For that, tokens must ascend, as they do in the container.

Matrices may be in few bits (packed.py): a program then reads their bytes, and makes numbers of a tile of them at a time.

Letters: P pairs (token, expert), X rows of x, T tokens, N stacked items, O outputs and I inputs of an item, M rows of a block,
Y places in a stretch. In a kernel a letter is a stretch of its axis; `x_row`, `x_column` and the like are strides in numbers.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packed import Packed
from .products import Products, Remembered
from .triton_packed import decoded

FEW_PAIRS = 512  # all items are held in registers
Weights = Tensor | Packed  # [N, O, I]
STRETCH = 1024  # numbers that a program which multiplies nothing takes at a time


class Tiles(NamedTuple):
    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


FEW_TILES = Tiles(16, 32, 128, 4, 4)
FEW_PACKED = Tiles(16, 32, 256, 4, 4)  # a thread has two scales of a tile: fewer bytes could not be fetched ahead
LEAST_PACKED = 64  # inputs of a tile in few bits: with 16 in int4 Triton 3.6 makes wrong products on an H200
MANY_TILES = (  # by the most rows per item, on average
    (16, Tiles(16, 64, 128, 4, 4)),
    (64, Tiles(64, 128, 64, 4, 4)),
    (None, Tiles(128, 128, 64, 8, 3)),
)
EXPERTS = 64  # a stack may be one of several, so where its items are few, that says little about the rows of each


class Groups(NamedTuple):
    order_P: Tensor  # pairs by item, then as they came; those left out are nowhere
    end_N: Tensor  # where each item's pairs end in that order; its units begin where its pairs do
    units_N: Tensor  # how many units each item has
    first_P: Tensor  # of each unit, its first place in the order; where the next item's units begin, it is there too
    unit_P: Tensor  # of each pair, its unit if it is the first of one, else -1; not written for those left out

    @classmethod
    def of(cls, item_P: Tensor, token_P: Tensor, num_items: int, _num_tokens: int) -> Groups:
        pairs = len(item_P)
        made = cls(*(item_P.new_empty(n, dtype=torch.int32) for n in (pairs, num_items, num_items, pairs + 1, pairs)))
        _sort[(num_items,)](item_P, made.order_P, made.end_N, pairs, STRETCH)
        _find_units[(num_items,)](token_P, *made, STRETCH)
        return made


def products() -> Products:
    """For one forward call: its products share how pairs are grouped."""
    groups = Remembered(Groups.of)
    return Products(functools.partial(add, groups), functools.partial(scatter, groups))


def add(groups: Remembered, y_PO: Tensor, x_XI: Tensor, weight_NOI: Weights, item_P: Tensor, token_P: Tensor) -> None:
    if not len(item_P):
        return
    with torch.cuda.device_of(x_XI):
        if len(item_P) <= FEW_PAIRS:
            _launch_few(y_PO, x_XI, weight_NOI, item_P, token_P, True)
        else:
            found = groups(item_P, token_P, len(weight_NOI), len(x_XI))
            _launch_many(y_PO, x_XI, weight_NOI, token_P, found, True)


def scatter(
    groups: Remembered, y_TO: Tensor, x_PI: Tensor, weight_NOI: Weights, item_P: Tensor, token_P: Tensor
) -> None:
    pairs, (_, outputs, inputs) = len(item_P), weight_NOI.shape
    if not pairs:
        return
    product_PO, few = x_PI.new_empty(pairs, outputs), pairs <= FEW_PAIRS
    with torch.cuda.device_of(x_PI):
        if few:
            unit_P = item_P  # not read
            _launch_few(product_PO, x_PI, weight_NOI, item_P, token_P, False)
        else:
            found = groups(item_P, token_P, len(weight_NOI), len(y_TO))
            unit_P, sum_PI = found.unit_P, x_PI.new_empty(pairs, inputs)
            grid = pairs, triton.cdiv(inputs, STRETCH)
            _sum_units[grid](
                sum_PI, x_PI, item_P, found.order_P, found.first_P, unit_P, inputs, *x_PI.stride(), STRETCH
            )
            _launch_many(product_PO, sum_PI, weight_NOI, token_P, found, False)
        grid = len(y_TO), triton.cdiv(outputs, STRETCH)
        _sum_tokens[grid](
            y_TO, product_PO, item_P, token_P, unit_P, pairs, pairs.bit_length(), outputs, *y_TO.stride(), few, STRETCH
        )


def _launch_few(y_PO: Tensor, x: Tensor, weight_NOI: Weights, item_P: Tensor, token_P: Tensor, adds: bool) -> None:
    pairs, (_, outputs, inputs) = len(item_P), weight_NOI.shape
    packed = isinstance(weight_NOI, Packed)
    tiles = FEW_PACKED if packed else FEW_TILES
    if pairs * outputs < 256 * tiles.outputs:  # fewer programs than keep a large GPU busy
        tiles = tiles._replace(outputs=16, warps=tiles.warps // 2 if packed else tiles.warps)
    _few[(pairs, triton.cdiv(outputs, tiles.outputs))](
        *(y_PO, x, stored(weight_NOI), item_P, token_P, pairs, outputs, inputs),
        *(*y_PO.stride(), *x.stride(), *places(weight_NOI)),
        *(adds, triton.next_power_of_2(pairs), *_sizes(tiles, x, weight_NOI)),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def _launch_many(y_PO: Tensor, x: Tensor, weight_NOI: Weights, token_P: Tensor, found: Groups, adds: bool) -> None:
    pairs, (items, outputs, inputs) = len(token_P), weight_NOI.shape
    rows = pairs / max(items, EXPERTS)
    tiles = next(tiles for most, tiles in MANY_TILES if most is None or rows <= most)
    blocks = pairs // tiles.rows + min(items, pairs)  # as many as any routing needs
    _many[(blocks * triton.cdiv(outputs, tiles.outputs),)](
        *(y_PO, x, stored(weight_NOI), token_P, found.order_P, found.end_N, found.units_N, found.first_P),
        *(items, outputs, inputs, *y_PO.stride(), *x.stride(), *places(weight_NOI)),
        *(adds, triton.next_power_of_2(items), *_sizes(tiles, x, weight_NOI)),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def stored(weight_NOI: Weights) -> Tensor:
    return weight_NOI.bytes_NY if isinstance(weight_NOI, Packed) else weight_NOI


def places(weight_NOI: Weights) -> tuple[int, ...]:
    """Strides of the items, outputs and inputs of a stack; then, in few bits, what lies where in the bytes of an item."""
    if not isinstance(weight_NOI, Packed):
        return (*weight_NOI.stride(), 0, 0, 0, 0, 0)
    of = weight_NOI.coding
    at = (weight_NOI.first, of.numbers_at, of.scales_at, of.more_at, of.scale_row)
    return (weight_NOI.bytes_NY.stride(0), of.row, 1, *at)


def _sizes(tiles: Tiles, x: Tensor, weight_NOI: Weights) -> tuple[int | bool | str, ...]:
    """The sizes of tiles, whether numbers are made wide, and how they are coded, if they are."""
    packed, columns = isinstance(weight_NOI, Packed), weight_NOI.shape[2]
    least = LEAST_PACKED if packed else 16
    inputs = min(tiles.inputs * 2 // x.element_size(), max(triton.next_power_of_2(columns), least))
    # Triton's interpreter keeps bfloat16 as integers and would multiply those.
    interpreted = x.device.type == "cpu" and x.dtype == torch.bfloat16
    of = weight_NOI.coding if packed else None
    coded = (of.code, of.scale, of.more, of.group, of.block, columns % inputs == 0) if of else ("", "", "", 1, 1, True)
    return tiles.rows, tiles.outputs, inputs, interpreted, *coded


@triton.jit
def _multiply(
    x_M,
    x_column,
    is_M,
    weight,
    output_O,
    w_output,
    w_input,
    first,
    numbers_at,
    scales_at,
    more_at,
    scale_row,
    outputs,
    inputs,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    WIDEN: tl.constexpr,
    CODE: tl.constexpr,
    SCALE: tl.constexpr,
    MORE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Rows of x, each from its own address, times some outputs of one matrix; sums in float32."""
    input_I = tl.arange(0, INPUTS)
    x_MI = x_M[:, None] + input_I[None, :] * x_column
    weight_OI = weight + output_O[:, None] * w_output + input_I[None, :] * w_input
    is_O = output_O < outputs
    sum_MO = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for i in range(0, inputs, INPUTS):
        is_I = i + input_I < inputs
        a_MI = tl.load(x_MI + i * x_column, mask=is_M[:, None] & is_I[None, :], other=0.0)
        if CODE == "":
            b_OI = tl.load(weight_OI + i * w_input, mask=is_O[:, None] & is_I[None, :], other=0.0)
        else:
            b_OI = decoded(
                weight,
                output_O,
                is_O,
                i,
                inputs,
                first,
                w_output,
                numbers_at,
                scales_at,
                more_at,
                scale_row,
                CODE,
                SCALE,
                MORE,
                GROUP,
                BLOCK,
                OUTPUTS,
                INPUTS,
                EVEN,
            )
            if not WIDEN:
                b_OI = b_OI.to(a_MI.dtype)
        if WIDEN:
            a_MI = a_MI.to(tl.float32)
            b_OI = b_OI.to(tl.float32)
        sum_MO = tl.dot(a_MI, tl.trans(b_OI), sum_MO, input_precision="ieee")
    return sum_MO


@triton.jit
def _put(y_MO, sum_MO, is_MO, ADDS: tl.constexpr):
    if ADDS:
        sum_MO += tl.load(y_MO, mask=is_MO, other=0.0).to(tl.float32)
    tl.store(y_MO, sum_MO.to(y_MO.dtype.element_ty), mask=is_MO)


@triton.jit(do_not_specialize=["pairs"])
def _few(
    y,
    x,
    weight,
    item,
    token,
    pairs,
    outputs,
    inputs,
    y_row,
    y_column,
    x_row,
    x_column,
    w_item,
    w_output,
    w_input,
    first_row,
    numbers_at,
    scales_at,
    more_at,
    scale_row,
    ADDS: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    WIDEN: tl.constexpr,
    CODE: tl.constexpr,
    SCALE: tl.constexpr,
    MORE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """y[p] += weight[item[p]] x[token[p]] with ADDS, else y[p] = weight[item[p]] x[p]."""
    pair_P, lead = tl.arange(0, PAIRS), tl.program_id(0)
    own = tl.load(item + lead)
    is_P = (tl.load(item + pair_P, mask=pair_P < pairs, other=-1) == own).to(tl.int32)
    before = tl.sum(tl.where(pair_P < lead, is_P, 0), 0)
    if (own < 0) | (before % ROWS != 0):  # left out, or among the rows of an earlier pair
        return
    place_P = tl.where(is_P == 1, tl.cumsum(is_P, 0) - 1 - before, -1)
    is_MP = place_P[None, :] == tl.arange(0, ROWS)[:, None]
    is_M = tl.max(is_MP.to(tl.int32), 1) == 1
    pair_M = tl.sum(tl.where(is_MP, pair_P[None, :], 0), 1).to(tl.int64)
    row_M = tl.load(token + pair_M, mask=is_M, other=0) if ADDS else pair_M
    output_O = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    sum_MO = _multiply(
        x + row_M * x_row,
        x_column,
        is_M,
        weight + own * w_item,
        output_O,
        w_output,
        w_input,
        first_row,
        numbers_at,
        scales_at,
        more_at,
        scale_row,
        outputs,
        inputs,
        ROWS,
        OUTPUTS,
        INPUTS,
        WIDEN,
        CODE,
        SCALE,
        MORE,
        GROUP,
        BLOCK,
        EVEN,
    )
    y_MO = y + pair_M[:, None] * y_row + output_O[None, :] * y_column
    _put(y_MO, sum_MO, is_M[:, None] & (output_O < outputs)[None, :], ADDS)


@triton.jit(do_not_specialize=["pairs"])
def _sort(item, order, end, pairs, STRETCH: tl.constexpr):
    """One item's pairs into their places: Groups.order_P and end_N."""
    own = tl.program_id(0)
    at = 0
    for p in range(0, pairs, STRETCH):
        pair_Y = p + tl.arange(0, STRETCH)
        item_Y = tl.load(item + pair_Y, mask=pair_Y < pairs, other=-1)
        at += tl.sum(((item_Y >= 0) & (item_Y < own)).to(tl.int32), 0)
    for p in range(0, pairs, STRETCH):
        pair_Y = p + tl.arange(0, STRETCH)
        is_I = tl.load(item + pair_Y, mask=pair_Y < pairs, other=-1) == own
        place_Y = at - 1 + tl.cumsum(is_I.to(tl.int32), 0)
        tl.store(order + place_Y, pair_Y, mask=is_I)
        at += tl.sum(is_I.to(tl.int32), 0)
    tl.store(end + own, at)


@triton.jit
def _find_units(token, order, end, units, first, unit, STRETCH: tl.constexpr):
    """One item's units: Groups.units_N, first_P and unit_P."""
    own = tl.program_id(0)
    start = tl.load(end + own - 1, mask=own > 0, other=0)
    stop = tl.load(end + own)
    at = start
    for p in range(start, stop, STRETCH):
        place_Y = p + tl.arange(0, STRETCH)
        is_I = place_Y < stop
        pair_Y = tl.load(order + place_Y, mask=is_I, other=0)
        last_Y = tl.load(order + place_Y - 1, mask=is_I & (place_Y > start), other=0)
        changes_Y = tl.load(token + pair_Y, mask=is_I, other=0) != tl.load(token + last_Y, mask=is_I, other=0)
        fresh_Y = is_I & ((place_Y == start) | changes_Y)
        unit_Y = at - 1 + tl.cumsum(fresh_Y.to(tl.int32), 0)
        tl.store(first + unit_Y, place_Y, mask=fresh_Y)
        tl.store(unit + pair_Y, tl.where(fresh_Y, unit_Y, -1), mask=is_I)
        at += tl.sum(fresh_Y.to(tl.int32), 0)
    tl.store(first + at, stop)  # the next item may store the same number there
    tl.store(units + own, at - start)


@triton.jit
def _many(
    y,
    x,
    weight,
    token,
    order,
    end,
    units,
    first,
    items,
    outputs,
    inputs,
    y_row,
    y_column,
    x_row,
    x_column,
    w_item,
    w_output,
    w_input,
    first_row,
    numbers_at,
    scales_at,
    more_at,
    scale_row,
    ADDS: tl.constexpr,
    ITEMS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    WIDEN: tl.constexpr,
    CODE: tl.constexpr,
    SCALE: tl.constexpr,
    MORE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """y[p] += weight[item[p]] x[token[p]] with ADDS, else y[u] = weight[item of u] x[u], u a unit."""
    columns = tl.cdiv(outputs, OUTPUTS)
    block, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    item_N = tl.arange(0, ITEMS)
    blocks_N = tl.cdiv(tl.load(units + item_N, mask=item_N < items, other=0), ROWS)
    own = tl.sum((tl.cumsum(blocks_N, 0) <= block).to(tl.int32), 0)
    if own >= items:
        return
    start = tl.load(end + own - 1, mask=own > 0, other=0)
    unit_M = start + (block - tl.sum(tl.where(item_N < own, blocks_N, 0), 0)) * ROWS + tl.arange(0, ROWS)
    is_M = unit_M < start + tl.load(units + own)
    place_M = tl.load(first + unit_M, mask=is_M, other=0)
    row_M = unit_M.to(tl.int64)
    if ADDS:
        row_M = tl.load(token + tl.load(order + place_M, mask=is_M, other=0), mask=is_M, other=0)
    output_O = column * OUTPUTS + tl.arange(0, OUTPUTS)
    sum_MO = _multiply(
        x + row_M * x_row,
        x_column,
        is_M,
        weight + own.to(tl.int64) * w_item,
        output_O,
        w_output,
        w_input,
        first_row,
        numbers_at,
        scales_at,
        more_at,
        scale_row,
        outputs,
        inputs,
        ROWS,
        OUTPUTS,
        INPUTS,
        WIDEN,
        CODE,
        SCALE,
        MORE,
        GROUP,
        BLOCK,
        EVEN,
    )
    y_Y, is_I = y + output_O * y_column, output_O < outputs
    if ADDS:
        times_M = tl.load(first + unit_M + 1, mask=is_M, other=0) - place_M
        for again in range(0, tl.max(times_M, 0)):
            is_M = again < times_M
            pair_M = tl.load(order + place_M + again, mask=is_M, other=0).to(tl.int64)
            _put(y_Y[None, :] + pair_M[:, None] * y_row, sum_MO, is_M[:, None] & is_I[None, :], True)
    else:
        _put(y_Y[None, :] + row_M[:, None] * y_row, sum_MO, is_M[:, None] & is_I[None, :], False)


@triton.jit
def _sum_units(total, x, item, order, first, unit, inputs, x_row, x_column, STRETCH: tl.constexpr):
    """total[u] = the x of all pairs of unit u, total's rows being as long as `inputs`."""
    pair = tl.program_id(0)
    own = tl.load(unit + pair, mask=tl.load(item + pair) >= 0, other=-1)
    if own < 0:
        return
    input_I = tl.program_id(1) * STRETCH + tl.arange(0, STRETCH)
    is_I = input_I < inputs
    sum_Y = tl.zeros([STRETCH], tl.float32)
    for place in range(tl.load(first + own), tl.load(first + own + 1)):
        row = tl.load(order + place).to(tl.int64) * x_row
        sum_Y += tl.load(x + row + input_I * x_column, mask=is_I, other=0.0).to(tl.float32)
    to_Y = total + own.to(tl.int64) * inputs + input_I
    tl.store(to_Y, sum_Y.to(total.dtype.element_ty), mask=is_I)


@triton.jit
def _first_pair(token, own, pairs, steps):
    """The first pair of this token or of a later one."""
    low, high = 0, pairs
    for _ in range(steps):
        middle = (low + high) // 2
        less = tl.load(token + middle, mask=low < high, other=own) < own
        low, high = tl.where(less, middle + 1, low), tl.where(less, high, middle)
    return low


@triton.jit(do_not_specialize=["pairs", "steps"])
def _sum_tokens(
    y, product, item, token, unit, pairs, steps, outputs, y_row, y_column, FEW: tl.constexpr, STRETCH: tl.constexpr
):
    """y[t] += the products of token t: those of its pairs (FEW), or of the units that begin with them."""
    own = tl.program_id(0)
    output_O = tl.program_id(1) * STRETCH + tl.arange(0, STRETCH)
    is_I = output_O < outputs
    sum_Y = tl.zeros([STRETCH], tl.float32)
    for pair in range(_first_pair(token, own, pairs, steps), _first_pair(token, own + 1, pairs, steps)):
        is_row = tl.load(item + pair) >= 0
        row = pair
        if not FEW:
            row = tl.load(unit + pair, mask=is_row, other=-1)
            is_row = row >= 0
        from_Y = product + tl.cast(row, tl.int64) * outputs + output_O
        sum_Y += tl.load(from_Y, mask=is_I & is_row, other=0.0).to(tl.float32)
    y_Y = y + own.to(tl.int64) * y_row + output_O * y_column
    tl.store(y_Y, tl.load(y_Y, mask=is_I, other=0.0) + sum_Y, mask=is_I)
