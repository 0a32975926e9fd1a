"""The products of `few_bits.cpp`: matrices in few bits, read from their bytes by the processor.

Compiled and kept as native.py does, for any processor with AVX2. x becomes whole numbers of 16 bits with a scale for each group of its
columns, so a product is off by at most 2^-15 of the group's largest x for each weight, and x of bfloat16 above a 128th of that are
exact; sums of groups are exact, and added in float32.

Letters: P pairs (token, expert), X rows of x, T tokens, N stacked items, O outputs, I inputs, Y bytes of an item.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from ..formats.int_groups import IntGroups
from . import native
from .grouped import gathered_add, gathered_scatter
from .packed import Packed
from .products import Products

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=gnu++17", "-O3", "-fopenmp", "-shared", "-fPIC", "-mavx2", "-mfma")
LONG, POINTER = ctypes.c_long, ctypes.c_void_p
ARGUMENTS = (*(POINTER, LONG) * 2, *(POINTER,) * 3, *(LONG,) * 12, ctypes.c_int)
BITS = {"int4": 4, "int8": 8}  # by the code
FORMATS = (torch.bfloat16, torch.float16, torch.float32)  # of x
logger = logging.getLogger(__name__)


def add_(y_PO: Tensor, x_XI: Tensor, weight_NOI: Tensor | Packed, item_P: Tensor, token_P: Tensor) -> None:
    """y[p] += weight[item[p]] x[token[p]]; pairs with item -1 are left as they are."""
    if not isinstance(weight_NOI, Packed):
        made = native.add_ if native.serves(x_XI) else gathered_add
        made(y_PO, x_XI, weight_NOI, item_P, token_P)
        return
    y_PO += _times(x_XI, weight_NOI, item_P, token_P)


def scatter_(y_TO: Tensor, x_PI: Tensor, weight_NOI: Tensor | Packed, item_P: Tensor, token_P: Tensor) -> None:
    """y[token[p]] += weight[item[p]] x[p]."""
    if not isinstance(weight_NOI, Packed):
        made = native.scatter_ if native.serves(x_PI) else gathered_scatter
        made(y_TO, x_PI, weight_NOI, item_P, token_P)
        return
    each_P = torch.arange(len(item_P))
    y_TO.index_add_(0, token_P, _times(x_PI, weight_NOI, item_P, each_P).to(y_TO.dtype))


PRODUCTS = Products(add_, scatter_)


def _times(x_XI: Tensor, weight_NOI: Packed, item_P: Tensor, row_P: Tensor) -> Tensor:
    """weight[item[p]] x[row[p]] in float32, zero where there is no item [P, O]."""
    items, outputs, inputs = weight_NOI.shape
    x_XI, of, bytes_NY = x_XI.float().contiguous(), weight_NOI.coding, weight_NOI.bytes_NY
    y_PO = torch.zeros(len(item_P), outputs)
    native.check((x_XI, torch.float32), (bytes_NY, torch.uint8), (item_P, torch.int64), (row_P, torch.int64))
    library().locum_few_bits(
        *(x_XI.data_ptr(), x_XI.stride(0), bytes_NY.data_ptr(), bytes_NY.stride(0), item_P.data_ptr()),
        *(row_P.data_ptr(), y_PO.data_ptr(), outputs, len(item_P), items, outputs, inputs, BITS[of.code], of.group),
        *(of.row, weight_NOI.first, of.scales_at, of.more_at if of.more else -1, of.scale_row, torch.get_num_threads()),
    )
    return y_PO


def reads(format: str) -> bool:
    """Whether these products know matrices in this number format, and are there."""
    found = IntGroups.named(format)
    return found is not None and found.bits in BITS.values() and library() is not None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled products, or None, with the reason in the log, where they cannot be had."""
    compiler = native.compiler()
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512") or compiler is None:
        logger.info("rows in few bits are made numbers one by one: %s", "no AVX2" if compiler else "no C++ compiler")
        return None
    try:
        found = ctypes.CDLL(str(native.compile_source(compiler, SOURCE, FLAGS)))
        found.locum_few_bits.argtypes, found.locum_few_bits.restype = ARGUMENTS, None
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        logger.warning("Locum's products of few bits did not compile, rows are made numbers one by one: %s", error)
        return None
    return found
