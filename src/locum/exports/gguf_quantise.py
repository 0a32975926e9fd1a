"""A GGUF file quantised by llama.cpp's own quantiser, in the environment of llama.cpp:

    python -P gguf_quantise.py FILE OUT TYPE [--experts TYPE] [--imatrix FILE]

TYPE is a recipe of llama.cpp's, such as Q4_K_M, which chooses a type for each tensor; `--experts` is the type of experts' stacked
matrices instead. Rows that are no whole blocks of a type get the one that llama.cpp falls back to. The importance matrix is a GGUF
file: `X.in_sum2` / `X.counts` weighs the columns of tensor X, for every expert of it.

A line says how many of the experts' matrices, and how many others, have which type. Nothing of Locum is imported.

Letters: E experts, I inputs.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections import Counter
from typing import Any

EXPERTS = "_exps.weight"
NUMBERS = ("F32", "F16", "BF16")


def quantise(source: str, out: str, most: str, experts: str | None, imatrix: str | None) -> None:
    """Write the file `out`. Raises RuntimeError where llama.cpp refuses."""
    import gguf
    import llama_cpp

    asked = llama_cpp.llama_model_quantize_default_params()
    asked.nthread = len(os.sched_getaffinity(0))
    asked.ftype = 0 if most == "F32" else getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{most}")
    held: list[Any] = []  # what the parameters point to, until it is done
    chosen = {} if experts is None else {EXPERTS.replace(".", r"\."): experts}
    if most in NUMBERS:  # of a recipe of numbers llama.cpp asks for no other types
        asked.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
        asked.output_tensor_type = asked.token_embedding_type = gguf.GGMLQuantizationType[most].value
        chosen[".*"] = most
    overrides = (
        llama_cpp.llama_model_tensor_override * (len(chosen) + 1)
    )()  # the last one, without a pattern, ends the list
    for place, (pattern, kind) in enumerate(chosen.items()):
        overrides[place].pattern, overrides[place].type = pattern.encode(), gguf.GGMLQuantizationType[kind].value
    asked.tt_overrides = overrides
    held.append(overrides)
    if imatrix is not None:
        asked.imatrix = _weights_of_columns(imatrix, held)
    failed = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(asked))
    if failed:
        raise RuntimeError(f"llama.cpp's quantiser ended with code {failed}")


def _weights_of_columns(file: str, held: list[Any]) -> Any:
    """The importance matrix as llama.cpp takes it: mean squares of a tensor's columns, one expert behind the other."""
    import gguf
    import llama_cpp
    import numpy as np

    found = {tensor.name: np.asarray(tensor.data, dtype=np.float32) for tensor in gguf.GGUFReader(file).tensors}
    names = [name.removesuffix(".in_sum2") for name in found if name.endswith(".in_sum2")]
    data = (llama_cpp.llama_model_imatrix_data * (len(names) + 1))()  # the last one, without a name, ends the list
    for place, name in enumerate(names):
        sums_EI = found[f"{name}.in_sum2"].reshape(-1, found[f"{name}.in_sum2"].shape[-1])
        means = np.ascontiguousarray(sums_EI / found[f"{name}.counts"].reshape(-1, 1), dtype=np.float32)
        data[place].name, data[place].size = name.encode(), means.size
        data[place].data = means.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        held.append(means)
    held.append(data)
    return data


def types_in(file: str) -> dict[str, str]:
    """How many matrices have which type: of experts, and others."""
    import gguf

    counts: dict[str, Counter[str]] = {"experts": Counter(), "others": Counter()}
    for tensor in gguf.GGUFReader(file).tensors:
        if len(tensor.shape) > 1:
            counts["experts" if tensor.name.endswith(EXPERTS) else "others"][tensor.tensor_type.name.lower()] += 1
    return {
        what: ", ".join(f"{n} in {kind}" for kind, n in sorted(found.items())) or "none"
        for what, found in counts.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for argument in ("source", "out", "type", "--experts", "--imatrix"):
        parser.add_argument(argument)
    given = parser.parse_args()
    try:
        quantise(given.source, given.out, given.type, given.experts, given.imatrix)
    except RuntimeError as error:
        sys.exit(str(error))
    for what, said in types_in(given.out).items():
        print(f"{what}: {said}")
