"""What `rounding.cpp` finds: levels and codes of whole numbers in groups, as formats/int_groups.py and experts/quantisers.py define them, to
the same bits. Compiled and kept as native.py does, for any processor with AVX2; elsewhere torch finds them.

Letters: M groups, Y ranges, J columns of a group, O rows, H groups of a row.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from ..formats.int_groups import Grid, least_range
from . import native

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = (
    *("-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC", "-mavx2", "-mfma"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),  # the last two: rounding in registers
)
WIDE = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
LONG, POINTER = ctypes.c_long, ctypes.c_void_p
ARGUMENTS = {
    "locum_least_range": (POINTER, POINTER, LONG, *(POINTER,) * 3, *(LONG,) * 3, ctypes.c_float, POINTER, ctypes.c_int),
    "locum_in_order": (
        *(POINTER, LONG) * 2,
        *(LONG,) * 2,
        *(POINTER,) * 2,
        ctypes.c_float,
        *(POINTER,) * 2,
        ctypes.c_int,
    ),
}
SIZES = (32, 64, 128)  # of groups that are searched
logger = logging.getLogger(__name__)


def least(x: Tensor, cost: Tensor, tried: Grid, half: int) -> Tensor:
    """`least_range` of groups [..., J]."""
    columns, found = x.shape[-1], library() if x.device.type == "cpu" and x.dtype == torch.float32 else None
    size = next((size for size in SIZES if size >= columns), 0)
    costs = math.prod(cost.shape[:-1])
    repeats = cost.shape[:-1] == x.shape[x.dim() - cost.dim() : -1]
    if found is None or not size or not repeats:
        return least_range(x, cost, tried, half)
    x, cost = (torch.nn.functional.pad(part, (0, size - columns)).contiguous() for part in (x, cost))
    most = x.abs().amax(-1)
    unit, scale = torch.where(most > 0, most, 1.0).contiguous(), tried.scale.contiguous()
    low = None if tried.minimum is None else tried.minimum.contiguous()
    best = torch.empty(x.shape[:-1], dtype=torch.int64)
    native.check(*((part, torch.float32) for part in (x, cost, unit, scale)), (best, torch.int64))
    found.locum_least_range(
        *(x.data_ptr(), cost.data_ptr(), costs, unit.data_ptr(), scale.data_ptr()),
        *(None if low is None else low.data_ptr(), best.numel(), len(scale), size, float(half), best.data_ptr()),
        torch.get_num_threads(),
    )
    return best[..., None]


def in_order(rest_OJ: Tensor, upper_JJ: Tensor, grid: Grid, half: int) -> tuple[Tensor, Tensor] | None:
    """The codes of a group's columns and what each lost, [O, J] each; None where this processor cannot."""
    if rest_OJ.device.type != "cpu" or rest_OJ.shape[1] > SIZES[-1] or (found := library()) is None:
        return None
    rest_OJ, upper_JJ = (part if part.stride(1) == 1 else part.contiguous() for part in (rest_OJ, upper_JJ))
    scale, low = (None if part is None else part.contiguous() for part in grid)
    code_OJ, lost_OJ = torch.empty(rest_OJ.shape, dtype=torch.float32), torch.empty(rest_OJ.shape, dtype=torch.float64)
    native.check((rest_OJ, torch.float64), (upper_JJ, torch.float64), (scale, torch.float32))
    found.locum_in_order(
        *(rest_OJ.data_ptr(), rest_OJ.stride(0), upper_JJ.data_ptr(), upper_JJ.stride(0), *rest_OJ.shape),
        *(scale.data_ptr(), None if low is None else low.data_ptr(), float(half), code_OJ.data_ptr()),
        *(lost_OJ.data_ptr(), torch.get_num_threads()),
    )
    return code_OJ, lost_OJ


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None, with the reason in the log, where they cannot be had."""
    compiler, capability = native.compiler(), torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX2", "AVX512") or compiler is None:
        logger.info("torch finds levels and codes: %s", "no AVX2" if compiler else "no C++ compiler")
        return None
    try:
        flags = FLAGS + (WIDE if capability == "AVX512" else ())
        found = ctypes.CDLL(str(native.compile_source(compiler, SOURCE, flags)))
        for name, arguments in ARGUMENTS.items():
            function = getattr(found, name)
            function.argtypes, function.restype = arguments, None
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        logger.warning("Locum's rounding did not compile, torch finds levels and codes: %s", error)
        return None
    return found
