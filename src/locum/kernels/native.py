"""The products of `native.cpp`: compiled once by the machine's own C++ compiler, where processor and compiler are there.

Why: a few rows times a large matrix should cost what reading the matrix costs. torch 2.13's kernels rearrange a bfloat16
matrix first and need two to three times that; these read it once, straight from where it lies (figures in grouped.py).
Nothing needs them: without a compiler, or on another processor, torch's own kernels serve.

The library is kept in the user's cache under a name made of source, flags and compiler, so it is compiled once per
machine. It is loaded only from a folder that nobody else can write to. Letters: P pairs (token, expert), X rows of x, N stacked items, O outputs, I inputs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cache import only_ours, own_folder
from ..errors import UnsupportedModel
from ..formats.int_groups import IntGroups
from .packed import Packed

SOURCE = Path(__file__).with_suffix(".cpp")
# No -march=native: a cache may be shared by machines, and the name of the library says all that it depends on.
FLAGS = (
    *("-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC"),
    *("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
)
LONG, POINTER = ctypes.c_long, ctypes.c_void_p
PRODUCT = (*(POINTER, LONG) * 2, *(POINTER,) * 5, *(LONG,) * 5, ctypes.c_int)
SPREAD = (POINTER, LONG, POINTER, POINTER, LONG, LONG, LONG, ctypes.c_int)
SWIGLU = (POINTER, LONG, POINTER, POINTER, LONG, LONG, ctypes.c_int)
FUNCTIONS = {"add": PRODUCT, "scatter": PRODUCT, "gated": PRODUCT, "spread": SPREAD, "swiglu": SWIGLU}
FORMATS = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
BITS = {"int4": 4, "int8": 8}  # by the code
logger = logging.getLogger(__name__)


class Matrices(ctypes.Structure):
    """A stack of matrices in few bits, or some rows of each, as the library takes it."""

    _fields_ = [("bytes", POINTER)] + [
        (name, LONG)
        for name in (
            *("item_bytes", "items", "outputs", "inputs", "bits", "group"),
            *("row", "first", "scales", "minimums", "scale_row"),
        )
    ]

    @classmethod
    def of(cls, packed: Packed) -> Matrices:
        of, bytes_NY = packed.coding, packed.bytes_NY
        check((bytes_NY, torch.uint8))
        return cls(
            *(bytes_NY.data_ptr(), bytes_NY.stride(0), *packed.shape, BITS[of.code], of.group, of.row, packed.first),
            *(of.scales_at, of.more_at if of.more else -1, of.scale_row),
        )


def place(weight_NOI: Tensor | Packed) -> tuple[Any, ...]:
    """Where a stack lies, as the libraries take it: its first number and how far items are apart, or its bytes."""
    if isinstance(weight_NOI, Packed):
        return None, 0, ctypes.byref(Matrices.of(weight_NOI))
    return weight_NOI.data_ptr(), weight_NOI.stride(0), None


def knows(format: str) -> bool:
    """Whether the products read matrices in this number format from their bytes."""
    found = IntGroups.named(format)
    return found is not None and found.bits in BITS.values()


def add_(y_PO: Tensor, x_XI: Tensor, weight_NOI: Tensor | Packed, item_P: Tensor, token_P: Tensor) -> None:
    """y[p] += weight[item[p]] x[token[p]], all of one of FORMATS, or W in few bits; pairs with item -1 are left as they are."""
    _call("add", y_PO, x_XI, weight_NOI, item_P, token_P)


def scatter_(y_TO: Tensor, x_PI: Tensor, weight_NOI: Tensor | Packed, item_P: Tensor, token_P: Tensor) -> None:
    """y[token[p]] += weight[item[p]] x[p], y in float32; the x of one item and token are added up before."""
    _call("scatter", y_TO, x_PI, weight_NOI, item_P, token_P)


def gated(x_XI: Tensor, weight_NGI: Tensor | Packed, scale_P1: Tensor, item_P: Tensor, token_P: Tensor) -> Tensor:
    """scale[p] silu(W_gate x[token[p]]) W_up x[token[p]], with W[item[p]] = W_gate above W_up; rounded once; [P, F]."""
    y_PF = x_XI.new_empty(len(item_P), weight_NGI.shape[1] // 2)
    _call("gated", y_PF, x_XI, weight_NGI, item_P, token_P, scale_P1.flatten().float().contiguous())
    return y_PF


def spread_(y_TO: Tensor, x_PO: Tensor, token_P: Tensor) -> None:
    """y[token[p]] += x[p], y in float32."""
    x_PO = x_PO if x_PO.stride(1) == 1 else x_PO.contiguous()
    check((y_TO, torch.float32), (x_PO, x_PO.dtype), (token_P, torch.int64))
    getattr(library(), f"locum_spread_{FORMATS[x_PO.dtype]}")(
        *(x_PO.data_ptr(), x_PO.stride(0), token_P.data_ptr(), y_TO.data_ptr(), y_TO.stride(0)),
        *(*x_PO.shape, torch.get_num_threads()),
    )


def swiglu(x_PG: Tensor, scale_P1: Tensor) -> Tensor:
    """scale[p] silu(x[p, :F]) x[p, F:], rounded once; [P, F]."""
    x_PG = x_PG if x_PG.stride(1) == 1 else x_PG.contiguous()
    y_PF, scale_P = x_PG.new_empty(len(x_PG), x_PG.shape[1] // 2), scale_P1.flatten().float().contiguous()
    check((x_PG, x_PG.dtype), (scale_P, torch.float32))
    getattr(library(), f"locum_swiglu_{FORMATS[x_PG.dtype]}")(
        *(x_PG.data_ptr(), x_PG.stride(0), scale_P.data_ptr(), y_PF.data_ptr(), *y_PF.shape, torch.get_num_threads())
    )
    return y_PF


def check(*tensors: tuple[Tensor, torch.dtype]) -> None:
    """Refuse what has no numbers in this process's memory, or others than these: C++ would read what it finds there."""
    for tensor, dtype in tensors:
        there = tensor.device.type == "cpu" and tensor.stride()[-1:] in ((), (1,))
        if not there or tensor.dtype != dtype or (tensor.numel() and not tensor.data_ptr()):
            raise UnsupportedModel(
                f"the experts' products got a tensor of {tensor.dtype} on {tensor.device}, expected {dtype} on cpu; put the "
                f"weights of a layer where its input is, in one number format"
            )


def _call(
    name: str,
    y: Tensor,
    x: Tensor,
    weight_NOI: Tensor | Packed,
    item_P: Tensor,
    token_P: Tensor,
    scale_P: Tensor | None = None,
) -> None:
    items, rows, inputs = weight_NOI.shape
    outputs = rows if scale_P is None else rows // 2
    x = x if x.stride(1) == 1 else x.contiguous()
    if isinstance(weight_NOI, Tensor):
        weight_NOI = weight_NOI if weight_NOI.stride()[1:] == (inputs, 1) else weight_NOI.contiguous()
        check((weight_NOI, x.dtype))
    of_y = torch.float32 if name == "scatter" else x.dtype
    check((y, of_y), (x, x.dtype), (item_P, torch.int64), (token_P, torch.int64))
    getattr(library(), f"locum_{name}_{FORMATS[x.dtype]}")(
        *(x.data_ptr(), x.stride(0), *place(weight_NOI)),
        *(item_P.data_ptr(), token_P.data_ptr(), None if scale_P is None else scale_P.data_ptr()),
        *(y.data_ptr(), y.stride(0), len(item_P), items, outputs, inputs, torch.get_num_threads()),
    )


# Under torch.compile the same functions, as operators that it does not look into.
@torch.library.custom_op("locum::add", mutates_args=("y_PO",))
def add_op(y_PO: Tensor, x_XI: Tensor, weight_NOI: Tensor, item_P: Tensor, token_P: Tensor) -> None:
    add_(y_PO, x_XI, weight_NOI, item_P, token_P)


@torch.library.custom_op("locum::scatter", mutates_args=("y_TO",))
def scatter_op(y_TO: Tensor, x_PI: Tensor, weight_NOI: Tensor, item_P: Tensor, token_P: Tensor) -> None:
    scatter_(y_TO, x_PI, weight_NOI, item_P, token_P)


def serves(x_XI: Tensor) -> bool:
    """Whether these products can be had for such rows: they have no gradient, and do not change number formats."""
    plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    return plain and x_XI.device.type == "cpu" and x_XI.dtype in FORMATS and available()


@torch.compiler.assume_constant_result
def available() -> bool:
    return library() is not None


def compiler() -> str | None:
    """The machine's C++ compiler."""
    found = shutil.which(os.environ.get("CXX") or "c++")
    return found if found is None or os.path.isabs(found) else None  # of the current folder, which may be anybody's


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled products, or None, with the reason in the log, where they cannot be had."""
    found = compiler()
    if not torch.cpu._is_avx512_bf16_supported() or found is None:
        logger.info("torch's own products are used: %s", "no C++ compiler" if found is None else "no avx512_bf16")
        return None
    try:
        return load(compile_source(found))
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        logger.warning("Locum's faster products did not compile, torch's own are used: %s", error)
        return None


def load(file: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(file))
    for (name, arguments), number in itertools.product(FUNCTIONS.items(), FORMATS.values()):
        function = getattr(found, f"locum_{name}_{number}")
        function.argtypes, function.restype = arguments, None
    return found


def compile_source(compiler: str, source: Path = SOURCE, flags: tuple[str, ...] | None = None) -> Path:
    """The library's file, compiled unless it is there. Raises OSError or CalledProcessError."""
    flags = FLAGS if flags is None else flags
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    sources = [source, *sorted(source.parent.glob("*.h"))]
    words = [*(file.read_bytes() for file in sources), " ".join(flags).encode(), version]
    key = hashlib.sha256(b"\0".join(words)).hexdigest()[:16]
    folder = own_folder("kernels")
    file = folder / f"products-{key}.so"
    if not only_ours(file):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # renamed when whole: others may compile it too
            made = Path(scratch) / file.name
            subprocess.run([compiler, *flags, str(source), "-o", str(made)], capture_output=True, check=True, text=True)
            made.chmod(0o700)
            made.replace(file)
    return file
