"""The products of `few_bits.cpp`: matrices in few bits, read from their bytes by the processor.

Compiled and kept as native.py does, for any processor with AVX2, in registers twice as wide where there is AVX512-VNNI. x becomes whole numbers of 16 bits with a scale for each group of its
columns, so a product is off by at most 2^-15 of the group's largest x for each weight, and x of bfloat16 above a 128th of that are
exact; sums of groups are exact, and added in float32.

Letters: P pairs (token, expert), X rows of x, T tokens, K top-k, N stacked items, O outputs, I inputs, D model width, F
expert width, G 2F with a gate, Y bytes of an item.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from ..formats.rows import unpack
from . import native
from .grouped import gathered_add, gathered_scatter
from .native import Matrices
from .packed import Packed, coding
from .products import Products

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=gnu++17", "-O3", "-fopenmp", "-shared", "-fPIC", "-mavx2", "-mfma", "-ffp-contract=off")
WIDE = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")  # for processors that have all of them
LONG, POINTER = ctypes.c_long, ctypes.c_void_p
FORMATS = (torch.bfloat16, torch.float16, torch.float32)  # of x
logger = logging.getLogger(__name__)


ARGUMENTS = {
    "locum_few_bits": (POINTER, LONG, ctypes.POINTER(Matrices), *(POINTER,) * 3, LONG, LONG, ctypes.c_int),
    "locum_few_bits_experts": (
        POINTER,
        LONG,
        *(ctypes.POINTER(Matrices),) * 2,
        *(POINTER,) * 3,
        LONG,
        LONG,
        ctypes.c_int,
    ),
    **{f"locum_numbers_{name}": (ctypes.POINTER(Matrices), POINTER, ctypes.c_int) for name in native.FORMATS.values()},
}


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
    x_XI, outputs = x_XI.float().contiguous(), weight_NOI.shape[1]
    y_PO = torch.zeros(len(item_P), outputs)
    native.check((x_XI, torch.float32), (item_P, torch.int64), (row_P, torch.int64))
    library().locum_few_bits(
        *(x_XI.data_ptr(), x_XI.stride(0), Matrices.of(weight_NOI), item_P.data_ptr(), row_P.data_ptr()),
        *(y_PO.data_ptr(), outputs, len(item_P), torch.get_num_threads()),
    )
    return y_PO


def experts(x_TD: Tensor, gate_up_NGD: Packed, down_NDF: Packed, row_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Sum over k of weight W_down silu(W_gate x) W_up x, W in the row named, gate's above up's, in float32; [T, D]. A row of -1
    does not run."""
    x_TD, row_TK, weight_TK = x_TD.float().contiguous(), row_TK.contiguous(), weight_TK.float().contiguous()
    y_TD = torch.empty_like(x_TD)
    native.check((x_TD, torch.float32), (row_TK, torch.int64), (weight_TK, torch.float32))
    library().locum_few_bits_experts(
        *(x_TD.data_ptr(), x_TD.stride(0), Matrices.of(gate_up_NGD), Matrices.of(down_NDF), row_TK.data_ptr()),
        *(weight_TK.data_ptr(), y_TD.data_ptr(), *row_TK.shape, torch.get_num_threads()),
    )
    return y_TD


def numbers(bytes_Y: Tensor, format: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What the bytes of one matrix stand for, as `unpack` has it to the bit, by the compiled products where they know the format."""
    known = dtype in native.FORMATS and bytes_Y.is_cpu and not torch.compiler.is_compiling() and reads(format)
    if not known or coding(format, *shape) is None:
        return unpack(format, bytes_Y, shape, dtype)
    made = torch.empty(shape, dtype=dtype)
    given = Matrices.of(Packed(bytes_Y.detach()[None], format, (shape[0], shape[1])))
    getattr(library(), f"locum_numbers_{native.FORMATS[dtype]}")(given, made.data_ptr(), torch.get_num_threads())
    return made


def reads(format: str) -> bool:
    """Whether these products know matrices in this number format, and are there."""
    return native.knows(format) and library() is not None


def is_wide() -> bool:
    """Whether the processor has products of 16-bit numbers in registers of 512 bits."""
    return torch.cpu._is_avx512_supported() and torch.cpu._is_vnni_supported()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled products, or None, with the reason in the log, where they cannot be had."""
    compiler = native.compiler()
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512") or compiler is None:
        logger.info("rows in few bits are made numbers one by one: %s", "no AVX2" if compiler else "no C++ compiler")
        return None
    try:
        found = ctypes.CDLL(str(native.compile_source(compiler, SOURCE, FLAGS + (WIDE if is_wide() else ()))))
        for name, arguments in ARGUMENTS.items():
            function = getattr(found, name)
            function.argtypes, function.restype = arguments, None
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        logger.warning("Locum's products of few bits did not compile, rows are made numbers one by one: %s", error)
        return None
    return found
