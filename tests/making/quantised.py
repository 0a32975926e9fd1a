"""Tiny checkpoints in the number formats of released models, made by slow loops that share nothing with Locum's own.

`quantise` changes a folder in place and returns the numbers that its packed weights stand for; `unquantised` writes the folder
that has those numbers as they are: whatever is true of the one is true of the other.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from making.checkpoints import write_checkpoint

Parts = dict[str, torch.Tensor]  # by what follows the weight's name, or stands in place of its last piece
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
BLOCK = 16  # of FP8: tiny models have tiny blocks


def fp8(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    rows, columns = weight.shape
    scales = torch.empty(math.ceil(rows / BLOCK), math.ceil(columns / BLOCK))
    stored, numbers = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            where = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            scales[i, j] = weight[where].abs().max() / 448
            stored[where] = (weight[where] / scales[i, j]).to(torch.float8_e4m3fn)
            numbers[where] = stored[where].float() * scales[i, j]
    return {"": stored, "_scale_inv": scales}, numbers


def fp8_rows(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    scales = torch.stack([row.abs().max() / 448 for row in weight])[:, None].bfloat16()
    stored = torch.stack(
        [(row / scale.float()).to(torch.float8_e4m3fn) for row, scale in zip(weight, scales, strict=True)]
    )
    return {"": stored, "_scale": scales}, stored.float() * scales.float()


def int4(weight: torch.Tensor, group: int = 8) -> tuple[Parts, torch.Tensor]:
    rows, columns = weight.shape
    scales = torch.empty(rows, columns // group, dtype=torch.bfloat16)
    words, numbers = torch.empty(rows, columns // 8, dtype=torch.int32), torch.empty(rows, columns)
    for i, row in enumerate(weight.tolist()):
        whole: list[int] = []
        for j in range(0, columns, group):
            scales[i, j // group] = max(map(abs, row[j : j + group])) / 7
            scale = float(scales[i, j // group])
            some = [max(-8, min(7, round(value / scale))) for value in row[j : j + group]]
            numbers[i, j : j + group] = torch.tensor([scale * n for n in some])
            whole += some
        for w in range(columns // 8):
            word = sum((whole[8 * w + n] + 8) << (4 * n) for n in range(8))
            words[i, w] = struct.unpack("<i", struct.pack("<I", word))[0]
    return {"_packed": words, "_scale": scales, "_shape": torch.tensor([rows, columns])}, numbers


def nearest(value: float) -> int:
    """The code of the nearest four-bit number, the even one of two that are as near."""
    _, _, code = min((abs(abs(value) - E2M1[n]), n % 2, n) for n in range(8))
    return code | (8 if value < 0 else 0)


def number(code: int) -> float:
    return -E2M1[code - 8] if code >= 8 else E2M1[code]


def nvfp4(weight: torch.Tensor, divides: bool) -> tuple[Parts, torch.Tensor]:
    rows, columns = weight.shape
    whole = torch.tensor(float(weight.abs().max()) / 6 / 448)
    if divides:
        whole = 1 / (1 / whole)
    scales = torch.empty(rows, columns // 16, dtype=torch.float8_e4m3fn)
    bytes_, numbers = torch.empty(rows, columns // 2, dtype=torch.uint8), torch.empty(rows, columns)
    for i in range(rows):
        for g in range(columns // 16):
            values = weight[i, 16 * g : 16 * g + 16]
            scales[i, g] = (values.abs().max() / 6 / whole).to(torch.float8_e4m3fn)
            scale = float(scales[i, g]) / float(1 / whole) if divides else float(scales[i, g]) * float(whole)
            codes = [nearest(value / scale) for value in values.tolist()]
            numbers[i, 16 * g : 16 * g + 16] = torch.tensor([number(code) * scale for code in codes])
            bytes_[i, 8 * g : 8 * g + 8] = torch.tensor([codes[2 * n] + 16 * codes[2 * n + 1] for n in range(8)])
    if divides:
        input_scale = {".input_global_scale": torch.tensor([3.0])}
        return {"_packed": bytes_, "_scale": scales, "_global_scale": (1 / whole)[None], **input_scale}, numbers
    return {"": bytes_, "_scale": scales, "_scale_2": whole, ".input_scale": torch.tensor(0.25)}, numbers


def mxfp4(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    experts, inputs, outputs = weight.shape
    blocks = torch.empty(experts, outputs, inputs // 32, 16, dtype=torch.uint8)
    scales, numbers = torch.empty(blocks.shape[:-1], dtype=torch.uint8), torch.empty(weight.shape)
    for e in range(experts):
        for o in range(outputs):
            for b in range(inputs // 32):
                values = weight[e, 32 * b : 32 * b + 32, o]
                power = math.floor(math.log2(float(values.abs().max()))) - 2
                codes = [nearest(value / 2**power) for value in values.tolist()]
                scales[e, o, b] = power + 127
                numbers[e, 32 * b : 32 * b + 32, o] = torch.tensor([number(code) * 2**power for code in codes])
                blocks[e, o, b] = torch.tensor([codes[2 * n] + 16 * codes[2 * n + 1] for n in range(16)])
    return {"_blocks": blocks, "_scales": scales}, numbers


def group_of(format_: str, **weights: object) -> dict[str, object]:
    said = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8, "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "quantization_status": "compressed",
        "ignore": ["lm_head", "model.layers.0.mlp.gate"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": said | weights, "format": format_}},
    }


Quantise = Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]
LINEAR = (
    ".q_proj.weight",
    ".k_proj.weight",
    ".o_proj.weight",
    ".gate_proj.weight",
    ".up_proj.weight",
    ".down_proj.weight",
)
NVFP4 = {"type": "float", "strategy": "tensor_group", "group_size": 16}
KINDS: dict[
    str, tuple[str, Quantise, dict[str, object], tuple[str, ...]]
] = {  # family, how, what config.json says, which
    "fp8-block": (
        "deepseek_v3",
        fp8,
        {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"},
        (*LINEAR, ".kv_a_proj_with_mqa.weight", ".kv_b_proj.weight"),
    ),
    "mxfp4": (
        "gpt_oss",
        mxfp4,
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
        (".experts.gate_up_proj", ".experts.down_proj"),
    ),
    "int-packed": ("qwen3_moe", int4, group_of("pack-quantized"), (*LINEAR, ".v_proj.weight")),
    "nvfp4": (
        "qwen3_moe",
        lambda weight: nvfp4(weight, divides=True),
        group_of("nvfp4-pack-quantized", **NVFP4),
        (*LINEAR, ".v_proj.weight"),
    ),
    "nvfp4-modelopt": (
        "qwen3_moe",
        lambda weight: nvfp4(weight, divides=False),
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
        (*LINEAR, ".v_proj.weight"),
    ),
    "fp8-scaled": (
        "qwen3_moe",
        fp8_rows,
        group_of("float-quantized", num_bits=8, type="float", strategy="channel", group_size=None),
        (*LINEAR, ".v_proj.weight"),
    ),
}
WIDTHS = {"intermediate_size": 32, "moe_intermediate_size": 32}


def part_name(weight: str, part: str) -> str:
    return weight.rpartition(".")[0] + part if part.startswith(".") else weight + part


def quantise(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Quantise a folder in place. Returns the numbers of what was packed, by the names of its weights."""
    return quantise_by(folder, *KINDS[kind][1:])


def quantise_by(folder: Path, how: Quantise, said: dict[str, object], ends: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The same in any way: which weights, by the ends of their names, and what config.json says of it."""
    tensors, numbers = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(ends):
            tensors[name] = tensor.bfloat16() if tensor.is_floating_point() else tensor
            continue
        parts, numbers[name] = how(tensor.float())
        tensors |= {part_name(name, part): one.contiguous() for part, one in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": said, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return numbers


def unquantised(folder: Path, numbers: dict[str, torch.Tensor], out: Path) -> Path:
    """The same checkpoint with those numbers in bfloat16."""
    shutil.copytree(folder, out)
    packed = {part_name(name, part) for name in numbers for part in ALL_PARTS}
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if n not in packed}
    tensors |= {name: tensor.bfloat16().contiguous() for name, tensor in numbers.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out


ALL_PARTS = (
    *("", "_scale_inv", "_blocks", "_scales", "_packed", "_scale", "_shape", "_global_scale", "_scale_2"),
    *(".input_scale", ".input_global_scale"),
)


def write_quantised(folder: Path, kind: str, **changes: object) -> tuple[Path, Path]:
    """A tiny checkpoint in a number format, and one of the same numbers in bfloat16 beside it."""
    family = KINDS[kind][0]
    model = write_checkpoint(folder / "quantised", family, **(WIDTHS | {"num_hidden_layers": 2} | changes))
    return model, unquantised(model, quantise(model, kind), folder / "plain")
