"""The products of `few_rows.cpp`: whole layers times few rows, at the speed at which their matrices are read.

What they are for is the step of `generate` that makes one token of each prompt. torch 2.13's product of one row with a matrix
in bfloat16 reads it at less than half of the memory's speed, and every small tensor in between costs a call.

Compiled and kept as native.py does. Nothing here has a gradient. Letters: X rows of x, O outputs and I inputs, T tokens, K top-k,
E experts, D model width, F expert width, G 2F with a gate.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import native
from .packed import Packed

SOURCE = Path(__file__).with_suffix(".cpp")
LONG, POINTER, FLOAT, INT = ctypes.c_long, ctypes.c_void_p, ctypes.c_float, ctypes.c_int
ARGUMENTS = {
    "linear": (POINTER, LONG, POINTER, POINTER, POINTER, LONG, LONG, LONG, INT),
    "experts": (POINTER, LONG, *(POINTER, LONG, POINTER) * 2, *(POINTER,) * 3, *(LONG,) * 5, INT),
    "norm": (POINTER, LONG, POINTER, FLOAT, FLOAT, POINTER, LONG, LONG),
    "attend": (*(POINTER,) * 5, FLOAT, *(LONG,) * 6, INT),
    "route": (POINTER, LONG, POINTER, POINTER, INT, *(POINTER,) * 3, *(LONG,) * 4, INT),
    "project": (*(POINTER,) * 4, INT),
    "attended": (*(POINTER,) * 5, INT),
}
logger = logging.getLogger(__name__)


class Functions(NamedTuple):
    """Those of one number format."""

    linear: Callable[..., None]
    experts: Callable[..., None]
    norm: Callable[..., None]
    attend: Callable[..., None]
    route: Callable[..., None]
    project: Callable[..., None]
    attended: Callable[..., None]


@functools.cache
def library() -> dict[torch.dtype, Functions]:
    """The compiled functions by number format; none, with the reason in the log, where they cannot be had."""
    found = native.compiler()
    if not torch.cpu._is_avx512_bf16_supported() or found is None:
        logger.info("torch's own products are used: %s", "no C++ compiler" if found is None else "no avx512_bf16")
        return {}
    try:
        loaded = ctypes.CDLL(str(native.compile_source(found, SOURCE, native.FLAGS)))
        made = {}
        for dtype, name in native.FORMATS.items():
            functions = [getattr(loaded, f"locum_{function}_{name}") for function in ARGUMENTS]
            for function, arguments in zip(functions, ARGUMENTS.values(), strict=True):
                function.argtypes, function.restype = arguments, None
            made[dtype] = Functions(*functions)
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        logger.warning("Locum's products of few rows did not compile, torch's own are used: %s", error)
        return {}
    return made


def serves(x: Tensor, *weights: Tensor | Packed | None) -> bool:
    """Whether these products can be had for x and such weights: plain numbers of one format in this process's memory. Whole experts
    may be in few bits."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if type(x) is not Tensor or not x.is_cpu or not x.numel() or x.dtype not in library():
        return False
    return all(weight is None or _reads(weight, x.dtype) for weight in weights)


def has_rows(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the last axis of a plain tensor lies in this process's memory, number by number; the others lie anyhow."""
    return type(x) is Tensor and x.dtype is dtype and x.is_cpu and x.stride(-1) == 1


def _reads(weight: Tensor | Packed, dtype: torch.dtype) -> bool:
    if isinstance(weight, Packed):
        return native.knows(weight.format) and weight.bytes_NY.is_cpu
    return type(weight) in (nn.Parameter, Tensor) and weight.dtype is dtype and weight.is_cpu and weight.is_contiguous()


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """W x + bias of x [..., I], which `serves`, rounded once: [..., O]."""
    outputs, inputs = weight_OI.shape
    x_XI = x.reshape(-1, inputs)
    x_XI = x_XI if x_XI.stride(1) == 1 else x_XI.contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)
    library()[x.dtype].linear(
        *(x_XI.data_ptr(), x_XI.stride(0), weight_OI.data_ptr(), None if bias_O is None else bias_O.data_ptr()),
        *(y.data_ptr(), len(x_XI), outputs, inputs, torch.get_num_threads()),
    )
    return y


def experts(
    x_TD: Tensor, gate_up_EGD: Tensor | Packed, down_EDF: Tensor | Packed, index_TK: Tensor, weight_TK: Tensor
) -> Tensor:
    """Sum over k of weight W_down silu(W_gate x) W_up x, W those of expert index, gate's rows above up's; [T, D].

    Sums are in float32. An index that is no expert's does not run.
    """
    num_experts, _, inputs = gate_up_EGD.shape
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    index_TK, weight_TK = index_TK.to(torch.int64).contiguous(), weight_TK.float().contiguous()
    y_TD = x_TD.new_empty(len(x_TD), inputs)
    library()[x_TD.dtype].experts(
        *(x_TD.data_ptr(), x_TD.stride(0), *native.place(gate_up_EGD), *native.place(down_EDF)),
        *(index_TK.data_ptr(), weight_TK.data_ptr(), y_TD.data_ptr()),
        *(*index_TK.shape, num_experts, inputs, down_EDF.shape[2], torch.get_num_threads()),
    )
    return y_TD


def norm(x: Tensor, weight_D: Tensor, plus: float, eps: float) -> Tensor:
    """(plus + weight) x / sqrt(mean of x^2 + eps), rounded once, of x [..., D]."""
    width = len(weight_D)
    x_XD = x.reshape(-1, width)
    x_XD = x_XD if x_XD.stride(1) == 1 else x_XD.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    library()[x.dtype].norm(
        x_XD.data_ptr(), x_XD.stride(0), weight_D.data_ptr(), plus, eps, y.data_ptr(), len(x_XD), width
    )
    return y


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The attention of one query in each head [prompts, heads, 1, width] over all keys and values of its group of heads [prompts,
    groups, positions, width], which have such rows, with sums in float32: [prompts, 1, heads, width of values]."""
    prompts, heads, _, width = query.shape
    _, groups, positions, wide = value.shape
    query = query if query.stride(3) == 1 else query.contiguous()
    y = query.new_empty(prompts, 1, heads, wide)
    strides = (*query.stride()[:2], *key.stride()[:3], *value.stride()[:3], y.stride(0), y.stride(2))
    library()[query.dtype].attend(
        *(query.data_ptr(), key.data_ptr(), value.data_ptr(), y.data_ptr(), (LONG * len(strides))(*strides), scale),
        *(prompts, heads, groups, positions, width, wide, torch.get_num_threads()),
    )
    return y


class Norm(NamedTuple):
    """A root-mean-square norm: (plus + weight) x / sqrt(mean of x^2 + eps)."""

    weight: Tensor
    plus: float
    eps: float


def project(
    x: Tensor,
    before: Norm,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    of_queries: Norm | None,
    of_keys: Norm | None,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [prompts, heads, 1, width] of x [prompts, 1, D]: W norm(x) + bias, for W of each, whose outputs are heads of the
    width of `cos` and `sin` [prompts or 1, 1, width]; queries and keys through norms of their own, if they have some, of a head or of all
    heads, and turned: y cos + (minus the second half of y, its first half) sin. Rounded wherever torch rounds."""
    prompts, width, head = len(x), x.shape[2], cos.shape[2]
    made = [x.new_empty(prompts, len(w) // head, 1, head) for w in weights]
    norms = [norm or Norm(x.new_empty(0), 0.0, 0.0) for norm in (of_queries, of_keys)]
    given = [x, before.weight, *weights, *biases, *(norm.weight for norm in norms), cos, sin]
    by_head = of_queries is not None and len(of_queries.weight) == head
    of_prompt = cos.stride(0) if len(cos) > 1 else 0
    sizes = (x.stride(0), by_head, of_prompt, *map(len, weights), prompts, width, head)
    numbers = [number for norm in (before, *norms) for number in norm[1:]]
    library()[x.dtype].project(_places(given), _places(made), _longs(sizes), _floats(numbers), torch.get_num_threads())
    queries, keys, values = made
    return queries, keys, values


def attended(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    weight_DI: Tensor,
    bias_D: Tensor | None,
    after: Norm,
) -> tuple[Tensor, Tensor]:
    """h = x + W y + bias and norm(h), [prompts, 1, D], y what `attend` gives."""
    prompts, heads, _, head = query.shape
    _, groups, positions, wide = value.shape
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2)]
    apart = (*query.stride()[:2], *key.stride()[:3], *value.stride()[:3], x.stride(0))
    sizes = (prompts, heads, groups, positions, head, wide, x.shape[2])
    given = [query, key, value, weight_DI, bias_D, x, after.weight]
    numbers = (scale, *after[1:])
    library()[x.dtype].attended(
        *(_places(given), _places(made), _longs(apart), _longs(sizes), _floats(numbers), torch.get_num_threads())
    )
    hidden, normed = made
    return hidden, normed


def _places(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (POINTER * len(tensors))(*[None if x is None else x.data_ptr() or None for x in tensors])


def _longs(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_long]:
    return (LONG * len(numbers))(*numbers)


def _floats(numbers: Sequence[float]) -> ctypes.Array[ctypes.c_float]:
    return (FLOAT * len(numbers))(*numbers)


def route(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, top_k: int, sums_to_one: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """A router's logits [T, E] and the K largest of their softmax: weights [T, K] in float32, and whose they are [T, K].

    `sums_to_one`: weights are divided by their sum. What is equal goes by its index.
    """
    num_experts, width = weight_ED.shape
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    tokens = len(x_TD)
    logits_TE, index_TK = x_TD.new_empty(tokens, num_experts), torch.empty(tokens, top_k, dtype=torch.int64)
    weight_TK = torch.empty(tokens, top_k, dtype=torch.float32)
    library()[x_TD.dtype].route(
        *(x_TD.data_ptr(), x_TD.stride(0), weight_ED.data_ptr(), None if bias_E is None else bias_E.data_ptr()),
        *(sums_to_one, logits_TE.data_ptr(), index_TK.data_ptr(), weight_TK.data_ptr()),
        *(tokens, top_k, num_experts, width, torch.get_num_threads()),
    )
    return logits_TE, weight_TK, index_TK
