"""A dense model: where every layer has one expert left, and a softmax gives that a weight of 1, the layer is a dense one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..checkpoints.load import load_model
from ..checkpoints.read import load_tokenizer, read_config
from ..checkpoints.skeleton import skeleton
from ..checkpoints.weight_files import is_adapter
from ..models.families import MoeLayer, find_layers, read_expert
from .folder import save_folder
from .stock import has_stock_layout, merged_first
from .target import target
from .tied_head import with_head

DENSE = {"mixtral": "mistral", "qwen3_moe": "qwen3", "granitemoe": "granite"}  # families alike but for their MoE layers


@target("dense")
@dataclass(frozen=True)
class Dense:
    """A folder of the dense family that computes the same, of a checkpoint with one expert left in every layer."""

    kind: ClassVar[str] = "folder"

    def fault(self, model: Path) -> str:
        config = read_config(model)
        if is_adapter(model):
            return merged_first(model)
        if not has_stock_layout(model):
            return "it has containers, and a dense layer has one whole expert; locum export --to stock first"
        if config.model_type not in DENSE:
            return f"no dense family is {config.model_type} without its MoE layers; known: {', '.join(DENSE)}"
        if getattr(config, "use_sliding_window", False):
            return "its attention sees a window, which dense families give to some layers alone; it stays as it is"
        live = skeleton(config)
        layers = find_layers(live)
        if most := max(layer.shape.num_experts for layer in layers) - 1:
            return (
                f"its layers have up to {most + 1} experts, and a dense layer is one; drop the others: locum compress --method prune "
                f"--lower-top-k --rounds N --recover full"
            )
        shapes = {name: tensor.shape for name, tensor in _tensors(live, layers).items()}
        with torch.device("meta"):
            expected = AutoModelForCausalLM.from_config(_config(config, layers[0])).state_dict()
        wrong = sorted({n for n in expected.keys() | shapes.keys() if n not in shapes or n not in expected})
        wrong += [name for name in expected if name not in wrong and shapes[name] != expected[name].shape]
        return f"the dense family has {wrong[0]} otherwise, or not at all; it stays as it is" if wrong else ""

    def write(self, model: Path, out: Path) -> str:
        tokenizer, live = load_tokenizer(model), load_model(model)
        layers = find_layers(live)
        config = _config(live.config, layers[0])
        with torch.device("meta"):
            dense = AutoModelForCausalLM.from_config(config, dtype=live.dtype)
        dense.load_state_dict(_tensors(live, layers), strict=True, assign=True)
        dense.tie_weights()
        if live.generation_config is not None:
            dense.generation_config = live.generation_config
        words = f"as a dense model of the family {config.model_type}: an ordinary checkpoint that computes the same"
        save_folder(with_head(dense), tokenizer, model, out, words)
        return f"a dense model ({config.model_type}), for any engine"


def _config(config: PreTrainedConfig, layer: MoeLayer) -> PreTrainedConfig:
    """What the dense family's config says of the same model."""
    family = DENSE[config.model_type]
    known = AutoConfig.for_model(family).to_dict()
    left_out = ("model_type", "architectures", "intermediate_size", "transformers_version", "quantization_config")
    said = {name: value for name, value in config.to_dict().items() if name in known and name not in left_out}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return AutoConfig.for_model(family, **{**said, "head_dim": head_dim, "intermediate_size": layer.shape.expert_width})


def _tensors(model: PreTrainedModel, layers: tuple[MoeLayer, ...]) -> Mapping[str, Tensor]:
    """The tensors of a model with the one expert of every layer in the place of its block."""
    blocks = [layer.shape.name.rpartition(".")[0] for layer in layers]
    inside = tuple(f"{block}." for block in blocks)
    found = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
    for layer, block in zip(layers, blocks, strict=True):
        expert, place = read_expert(layer.experts, 0), f"{block.rpartition('.')[0]}.mlp"
        parts = {"gate_proj": expert.gate_FD, "up_proj": expert.up_FD, "down_proj": expert.down_DF}
        found |= {f"{place}.{name}.weight": tensor.contiguous() for name, tensor in parts.items()}
    return found
