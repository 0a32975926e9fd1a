"""Checkpoints that are broken on purpose. Each function damages a folder and returns words that its refusal must have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def change_layouts(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def a_tensor(folder: Path, ending: str) -> str:
    return min(name for name in load_file(folder / WEIGHTS) if name.endswith(ending))


def without_a_tensor(folder: Path) -> list[str]:
    """Of the model, not of a container."""
    change_weights(folder, lambda tensors: tensors.pop("model.norm.weight"))
    return []


def without_a_containers_tensor(folder: Path) -> list[str]:
    name = a_tensor(folder, "adapters.0.up_B_FR")
    change_weights(folder, lambda tensors: tensors.pop(name))
    return [f"(first: {name})"]


def of_another_shape(folder: Path) -> list[str]:
    name = a_tensor(folder, "dense.down_NDF")
    change_weights(folder, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    return [f"{name} has shape", "in the file, but config.json lays out"]


def of_another_version(folder: Path) -> list[str]:
    change_layouts(folder, lambda quantization: quantization.update(format_version=99))
    return ["Locum format version 99", "install the version"]


def of_another_layout(folder: Path) -> list[str]:
    def change(quantization: dict[str, Any]) -> None:
        quantization["layers"][min(quantization["layers"])]["expert_width"] *= 2

    change_layouts(folder, change)
    return ["expert_width", "restore the config.json"]


def truncated(folder: Path) -> list[str]:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000])
    return [str(folder / WEIGHTS), "is damaged"]


DAMAGES: dict[str, Callable[[Path], list[str]]] = {
    damage.__name__: damage
    for damage in (
        *(without_a_tensor, without_a_containers_tensor, of_another_shape, of_another_version, of_another_layout),
        truncated,
    )
}
