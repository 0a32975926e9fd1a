"""What the `quantization_config` of compressed-tensors says: groups of layers, each with a format and its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def groups_of(quantization: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The groups: a format's name, and what is said of the weights in it. None where another library wrote it."""
    if quantization.get("quant_method") != "compressed-tensors":
        return
    for group in (quantization.get("config_groups") or {}).values():
        if isinstance(group, Mapping):
            yield str(group.get("format") or quantization.get("format")), group.get("weights") or {}


def formats_named(quantization: Mapping[str, Any]) -> set[str]:
    return {name for name, _ in groups_of(quantization)}
