"""The products of `products.cpp`: compiled once by the machine's own C++ compiler, where processor and compiler are there.

Why: a few rows times a large matrix should cost what reading the matrix costs. torch 2.13's kernels rearrange a bfloat16
matrix first and need two to three times that; these read it once, straight from where it lies (figures in products.py).
Nothing needs them: without a compiler, or on another processor, torch's own kernels serve.

The library is kept in the user's cache under a name made of source, flags and compiler, so it is compiled once per
machine. Letters: P pairs, X rows of x, N items, O outputs, I inputs.
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

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp").with_stem("products")
# No -march=native: a cache may be shared by machines, and the name of the library says all that it depends on.
FLAGS = (
    *("-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC"),
    *("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
)
LONG, POINTER = ctypes.c_long, ctypes.c_void_p
ARGUMENTS = (POINTER, LONG, POINTER, LONG, POINTER, POINTER, POINTER, LONG, LONG, LONG, LONG, LONG, ctypes.c_int)
FORMATS = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
logger = logging.getLogger(__name__)


def add_(y_PO: Tensor, x_XI: Tensor, weight_NOI: Tensor, item_P: Tensor, token_P: Tensor) -> None:
    """y[p] += weight[item[p]] x[token[p]], all of one of FORMATS; pairs with item -1 are left as they are."""
    _call("add", y_PO, x_XI, weight_NOI, item_P, token_P)


def scatter_(y_TO: Tensor, x_PI: Tensor, weight_NOI: Tensor, item_P: Tensor, token_P: Tensor) -> None:
    """y[token[p]] += weight[item[p]] x[p], y in float32; the x of one item and token are added up before."""
    _call("scatter", y_TO, x_PI, weight_NOI, item_P, token_P)


def _call(name: str, y: Tensor, x: Tensor, weight_NOI: Tensor, item_P: Tensor, token_P: Tensor) -> None:
    _, outputs, inputs = weight_NOI.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    weight_NOI = weight_NOI if weight_NOI.stride()[1:] == (inputs, 1) else weight_NOI.contiguous()
    getattr(library(), f"locum_{name}_{FORMATS[x.dtype]}")(
        *(
            x.data_ptr(),
            x.stride(0),
            weight_NOI.data_ptr(),
            weight_NOI.stride(0),
            item_P.data_ptr(),
            token_P.data_ptr(),
        ),
        *(y.data_ptr(), y.stride(0), len(item_P), len(weight_NOI), outputs, inputs, torch.get_num_threads()),
    )


# Under torch.compile the same functions, as operators that it does not look into.
add_op = torch.library.custom_op("locum::add", add_, mutates_args=("y_PO",))
scatter_op = torch.library.custom_op("locum::scatter", scatter_, mutates_args=("y_TO",))


@torch.compiler.assume_constant_result
def available() -> bool:
    return library() is not None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled products, or None, with the reason in the log, where they cannot be had."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if not torch.cpu._is_avx512_bf16_supported() or compiler is None:
        logger.info("torch's own products are used: %s", "no C++ compiler" if compiler is None else "no avx512_bf16")
        return None
    try:
        return load(compile_source(compiler))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("Locum's faster products did not compile, torch's own are used: %s", error)
        return None


def load(file: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(file))
    for name, number in itertools.product(("add", "scatter"), FORMATS.values()):
        function = getattr(found, f"locum_{name}_{number}")
        function.argtypes, function.restype = ARGUMENTS, None
    return found


def compile_source(compiler: str) -> Path:
    """The library's file, compiled unless it is there. Raises OSError or CalledProcessError."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), " ".join(FLAGS).encode(), version])).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "locum"
    file = folder / f"products-{key}.so"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # renamed when whole: others may compile it too
            made = Path(scratch) / file.name
            subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(made)], capture_output=True, check=True, text=True)
            made.replace(file)
    return file
