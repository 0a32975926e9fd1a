"""A GGUF file with other types for its matrices, tensor by tensor, in the environment of llama.cpp:

    python -P gguf_types.py FILE OUT TYPE EXPERTS_TYPE

What the converter has left in 16 bits gets a type: experts' stacked matrices one, all other matrices the other. Norms, routers and
whatever else it has in 32 bits stay, and so do matrices whose rows are no whole blocks. Numbers are those of the public gguf
package. A line says of each of these that it was left. Nothing of Locum is imported.
"""

from __future__ import annotations

import sys
from typing import Any

EXPERTS = "_exps.weight"
ROWS = 4096  # of a matrix that are numbers at a time


def retype(source: str, out: str, most: str, experts: str) -> list[str]:
    """Write the file `out`. Returns the names of matrices that stay in 16 bits because their rows are no whole blocks."""
    import gguf

    reader = gguf.GGUFReader(source)
    wide = (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16)
    architecture = reader.get_field(gguf.Keys.General.ARCHITECTURE)
    writer = gguf.GGUFWriter(out, architecture.contents() if architecture else "", endianess=reader.endianess)
    _copy_fields(reader, writer, most)
    plan, left = [], []
    for tensor in reader.tensors:
        kind = gguf.GGMLQuantizationType[(experts if tensor.name.endswith(EXPERTS) else most).upper()]
        is_matrix = tensor.tensor_type in wide and len(tensor.shape) > 1
        block = gguf.GGML_QUANT_SIZES[kind][0]
        if is_matrix and int(tensor.shape[0]) % block:  # shapes are turned round there
            left.append(tensor.name)
        if not is_matrix or int(tensor.shape[0]) % block or kind == tensor.tensor_type:
            plan.append((tensor, None, tensor.data.shape))
            writer.add_tensor_info(
                tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type
            )
            continue
        numbers = tuple(int(n) for n in reversed(tensor.shape))
        shape = gguf.quants.quant_shape_to_byte_shape(numbers, kind)
        size = 1
        for n in shape:
            size *= n
        plan.append((tensor, kind, shape))
        writer.add_tensor_info(tensor.name, shape, _bytes_dtype(), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, kind, shape in plan:
        writer.write_tensor_data(tensor.data if kind is None else _quantised(tensor, kind, shape))
    writer.close()
    return left


def _copy_fields(reader: Any, writer: Any, most: str) -> None:
    import gguf

    keys = gguf.Keys.General
    for field in reader.fields.values():
        if field.name == keys.ALIGNMENT:
            writer.add_custom_alignment(field.contents())
        elif (
            field.name not in (keys.ARCHITECTURE, keys.FILE_TYPE, keys.QUANTIZATION_VERSION)
            and "GGUF." not in field.name
        ):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{most.upper()}"])


def _quantised(tensor: Any, kind: Any, shape: tuple[int, ...]) -> Any:
    """The bytes of a tensor, some rows after the others: experts' numbers take several times the room of their bytes."""
    import gguf
    import numpy as np

    out = np.empty(shape, dtype=_bytes_dtype())
    data, made = tensor.data.reshape(-1, tensor.data.shape[-1]), out.reshape(-1, shape[-1])
    for begin in range(0, len(data), ROWS):
        numbers = gguf.quants.dequantize(data[begin : begin + ROWS], tensor.tensor_type)
        made[begin : begin + ROWS] = gguf.quants.quantize(numbers, kind)
    return out


def _bytes_dtype() -> Any:
    import numpy as np

    return np.dtype(np.uint8)


if __name__ == "__main__":
    for name in retype(*sys.argv[1:]):
        print(f"left: {name}")
