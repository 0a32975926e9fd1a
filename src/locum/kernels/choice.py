"""Which way makes the grouped products of a layer: by device, number format and shape. The figures behind it are here."""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from collections.abc import Callable

import torch

from . import few_bits, native
from .grouped import gathered_add, gathered_scatter, grouped
from .packed import Matrices
from .products import Products

logger = logging.getLogger(__name__)

# Measured on one core of an EPYC with avx512_bf16, shared with other work: 16 matrices of 2048 x 2048 (134 MB) in bfloat16,
# each times M rows; milliseconds of the core's time, the fastest of six. Reading them takes 6, their operations 0.7 M.
#   M                    1     4     8    16    32    64   128
#   torch grouped_mm    16    15    17    22    34    53    93
#   native               6     7    10    15    28    52   100
# With small matrices (32 experts of 256 x 96) native is ahead at 128 rows too, 9.5 against 10.8 to 14, in float32 as well.
# From 96 rows of an item on, native turns matrices round (native.cpp): 16 matrices of 2048 x 2048, 460 rows each, took
# 164 ms of two cores (376 GFLOP/s, gathering and adding included) where rows read straight took 189. With so many rows the
# container goes cluster by cluster, and what lies between the products stays in the cache: identity plan, 1,024 tokens,
# 315 ms against 342; 512 tokens 176 against 179; 256 tokens 129 against 116.
NATIVE_ROWS = 64  # the most rows per expert, on average
# Low-rank experts make twice as many products, of half the size or less: with mean rank 512, 256 rows per expert took 600
# ms against 881 in the loop, 768 rows 2294 against 1740.
LOW_RANK_ROWS = 384
# Matrices in few bits, read as they are (few_bits.cpp): milliseconds of the core's time for one layer of OLMoE's shape, 64 experts of
# 2048 x 1024, top-8 (benchmarks/speed/cpu_bits.py), on one core of an EPYC with AVX2 alone, shared with other work, fastest of 21.
#   tokens              1     4    16
#   int4-g32, read    6.2    17    43
#   int8-g32, read    9.1    26    55
#   bfloat16, loop     21    73   242
# Made numbers one by one (loop), 16 such experts, top-4: int4-g32 took 130, 593 and 905, where bfloat16 took 9, 32 and 114.
FEW_BITS_ROWS = 16  # more were not measured
# With avx512_bf16 rows of W can become numbers in the cache instead (codes.h), which costs the same for any number of tokens. One core
# of an EPYC with VNNI, shared with other work, milliseconds of the core's time, fastest of seven:
#   tokens                 8    16    32    64   128   512
#   int4-g32, read      12.5  21.4  42.1  78.6   169
#   int4-g32, made      26.1  36.5  47.8  63.2    97   290
#   int8-g32, read      16.9  28.1  50.2  95.3   192
#   int8-g32, made      29.6  40.3  51.8  66.9   102   291
#   bfloat16            27.4  36.2  45.6  59.1    93   289
READ_ROWS = 4  # the most rows per expert for which bytes are read where numbers could be made
# A matrix gathered for every pair is written and read once more, so this is for small graphs that nothing else can hold.
GATHERED_PAIRS = 64
LOOP = "loop"
# The first way that serves and has room for the pairs is taken. On an H200 (benchmarks/results/gpu.jsonl) Triton is ahead of
# the others for every plan and size that was tried. Milliseconds of one layer of OLMoE-1B-7B's shape in bfloat16, LightMoE at
# 50%, as called, and replayed from a CUDA graph:
#   tokens             1      16      64     512    2048    8192
#   triton          0.95    1.08    1.21    1.19    2.03    3.56
#   grouped         2.70    2.84    2.86    2.28    4.98   11.98
#   gathered        1.61    1.67
#   loop             3.3    11.5    14.3    12.3    26.9    20.0
#   graph, triton   0.13    0.23    0.34
#   graph, grouped  0.58    0.73    0.85
CUDA_WAYS = (("triton", math.inf), ("grouped", math.inf), ("gathered", GATHERED_PAIRS))
TRITON_FORMATS = (torch.bfloat16, torch.float16, torch.float32)


def choose(
    device: torch.device,
    dtype: torch.dtype,
    pairs: int,
    experts: int,
    aligned: bool,
    low_rank: bool = False,
    in_few_bits: tuple[Matrices, ...] = (),
) -> str:
    """The way to make a layer's products: one of PRODUCTS, or LOOP.

    `aligned`: every row of every matrix has a multiple of 16 bytes, which torch's grouped product asks for. `low_rank`:
    most experts have no dense row. `in_few_bits`: the kinds of matrices that are.
    """
    if in_few_bits:
        return _for_few_bits(device, dtype, pairs, experts, in_few_bits)
    if device.type == "cpu" and dtype in native.FORMATS and not torch.is_grad_enabled():
        if pairs <= (LOW_RANK_ROWS if low_rank else NATIVE_ROWS) * experts and native.available():
            return "native op" if torch.compiler.is_compiling() else "native"
    elif device.type == "cuda":
        way = next((way for way, most in CUDA_WAYS if pairs <= most and _serves(way, dtype, aligned)), LOOP)
        return "triton op" if way == "triton" and torch.compiler.is_compiling() else way
    if pairs <= GATHERED_PAIRS and torch.compiler.is_compiling():
        return "gathered"
    return LOOP


def _for_few_bits(
    device: torch.device, dtype: torch.dtype, pairs: int, experts: int, kinds: tuple[Matrices, ...]
) -> str:
    """The way where some matrices are bytes, which torch's own products cannot read."""
    if device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if not all(native.knows(kind.format) for kind in kinds):
            return LOOP
        makes = dtype == torch.bfloat16 and native.available()
        rows = READ_ROWS if makes else FEW_BITS_ROWS
        if pairs <= rows * experts and dtype in few_bits.FORMATS and few_bits.library() is not None:
            return "few bits"
        return "native" if makes and pairs <= NATIVE_ROWS * experts else LOOP
    if device.type == "cuda" and _serves("triton", dtype, False) and all(triton_reads(kind, dtype) for kind in kinds):
        return "triton op" if torch.compiler.is_compiling() else "triton"
    return LOOP


def _serves(way: str, dtype: torch.dtype, aligned: bool) -> bool:
    if way == "triton":  # no gradients
        return dtype in TRITON_FORMATS and not torch.is_grad_enabled() and triton_is_there()
    return way != "grouped" or (dtype == torch.bfloat16 and aligned)


@torch.compiler.assume_constant_result
def triton_is_there() -> bool:
    """Whether Triton is installed, which comes with CUDA builds of torch, and starts, for which it needs a C compiler."""
    return importlib.util.find_spec("triton") is not None and _triton_starts()


@functools.cache
def _triton_starts() -> bool:
    try:
        from triton.runtime import driver

        return driver.active.get_current_target() is not None
    except Exception as error:  # of any kind: without a compiler it fails differently in every version
        logger.warning("Triton does not start here (%s): torch's own kernels serve, which are slower", error)
        return False


@torch.compiler.assume_constant_result
@functools.cache
def triton_reads(kind: Matrices, dtype: torch.dtype) -> bool:
    """Whether Triton's products with matrices in few bits are those with their numbers: tried once, for few pairs and many.

    Each shape for itself. On an H200, Triton 3.6 gave right products for all plans with int8 groups, and in int4 for all but one
    plan's: with LightMoE's adapters of rank 16, few tokens were off by 0.08 (benchmarks/results/gpu.jsonl).
    """
    try:
        from . import triton_ways

        wrong = triton_ways.fault(kind, dtype)
    except Exception as error:  # of any kind, as above
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        said = f"{kind.format} of {kind.outputs} x {kind.inputs}"
        logger.warning("Triton's products do not serve %s here (%s): rows are made numbers one by one", said, wrong)
    return not wrong


def by_triton(way: str) -> Products:
    from . import triton_ways

    return triton_ways.PRODUCTS[way]()


# Of each way, what makes its products for one forward call.
NATIVE = Products(native.add_, native.scatter_)
PRODUCTS: dict[str, Callable[[], Products]] = {
    "native": lambda: NATIVE,
    "native op": lambda: Products(native.add_op, native.scatter_op),
    "few bits": lambda: few_bits.PRODUCTS,
    "grouped": grouped,
    "gathered": lambda: Products(gathered_add, gathered_scatter),
    "triton": lambda: by_triton("triton"),
    "triton op": lambda: by_triton("triton op"),
}
