"""What config.json says of containers, and containers put where it says, into a model without weights.

A layer that the stock layout cannot hold is named there:

    "quantization_config": {"quant_method": "locum", "format_version": 2, "layers": {experts module: layout}}

`rest` is beside `layers` where the checkpoint is quantised: the quantization_config of all that is in no container. Own weights
of containers' experts then lie in the files as the family has them, in the number format that they came in (own_rows.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..containers.container import StandInExperts
from ..containers.layout import Layout
from ..errors import CheckpointError, PlanError
from ..models.choosing import choose_by
from ..models.families import canonical_activation, find_layers, leave_router_logits, slice_router
from ..shapes import LayerShape

FORMAT_VERSION = 2
READS = (1, FORMAT_VERSION)  # versions differ in how a layout is written (containers/layout_version_1.py)
ENTRIES = ("quant_method", "format_version", "layers")
REST = "rest"  # the entry that a quantised checkpoint has beside them


@register_quantization_config("locum")
class LocumConfig(QuantizationConfigMixin):
    """Which layers of a checkpoint are containers, and their layouts."""

    def __init__(
        self,
        layers: dict[str, Any],
        format_version: int = FORMAT_VERSION,
        quant_method: str = "locum",
        rest: dict[str, Any] | None = None,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format_version = format_version
        self.layers = layers
        self.rest = rest

    def to_dict(self) -> dict[str, Any]:
        said = super().to_dict()
        return said if said[REST] else {name: value for name, value in said.items() if name != REST}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The entry of a config.json. Raises CheckpointError for what is not as Locum writes it: without its layers, a
        compressed model would pass for a stock one."""
        version = config_dict.get("format_version", FORMAT_VERSION)
        if type(version) is not int or version not in READS:
            raise CheckpointError(
                f"the checkpoint has Locum format version {version!r}; this Locum reads version {FORMAT_VERSION}; install "
                f"the version that wrote it, or a newer one"
            )
        lacks, more = sorted({*ENTRIES} - {*config_dict}), sorted({*config_dict} - {*ENTRIES, REST})
        if lacks or more:
            said = [f"lacks {', '.join(lacks)}"] * bool(lacks) + [f"has {', '.join(map(repr, more))}"] * bool(more)
            raise CheckpointError(
                f"quantization_config in config.json {' and '.join(said)}; its entries are {', '.join(ENTRIES)}; restore the "
                f"config.json that was written with the weights"
            )
        if not isinstance(config_dict["layers"], dict) or not config_dict["layers"]:
            raise CheckpointError(
                f"config.json lists Locum's layers as {config_dict['layers']!r:.100}; expected a table of layer names, one or "
                f"more; restore the config.json that was written with the weights"
            )
        rest = config_dict.get(REST)
        if rest is not None and (not isinstance(rest, dict) or rest.get("quant_method") in (None, "locum")):
            raise CheckpointError(
                f"config.json says {REST}={rest!r:.100} beside Locum's layers; expected the quantization_config of the "
                f"quantised checkpoint that they were made from; restore the config.json that was written with the weights"
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)


def containers_of(model: nn.Module) -> list[tuple[str, StandInExperts]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, StandInExperts)]


def note_layouts(model: PreTrainedModel) -> None:
    """Let a model's config say the layouts that its containers have."""
    said = getattr(model.config, "quantization_config", None)
    if isinstance(said, LocumConfig):
        found = {name: container.layout.to_json() for name, container in containers_of(model)}
        said.layers = {name: found.get(name, layout) for name, layout in said.layers.items()}


def note_containers(model: PreTrainedModel) -> None:
    """Let a model's config say its containers, all of whose layers are such, and their layouts."""
    layers = {name: container.layout.to_json() for name, container in containers_of(model)}
    said = getattr(model.config, "quantization_config", None)
    if isinstance(said, LocumConfig):
        said.layers = layers
    else:
        model.config.quantization_config = LocumConfig(layers)


def place_containers(model: PreTrainedModel, layers: dict[str, Any]) -> None:
    """Swap the experts modules named in `layers` for empty containers, and make room in their routers."""
    found = {layer.shape.name: layer for layer in find_layers(model)}
    for said, data in layers.items():
        name = by_place(said, found)
        if name is None:
            raise CheckpointError(f"config.json describes a container for {said!r}, which this model does not have")
        layer, layout = found[name], read_layout(said, data)
        check_layout(name, layout, layer.shape)
        weight = layer.experts.down_proj
        container = StandInExperts(layout, canonical_activation(layer.experts), weight.dtype, weight.device)
        container.post_expert_norm = getattr(layer.experts, "post_expert_norm", None)
        model.set_submodule(name, container)
        choose_by(layer, layout.routing)
        layer.block._is_hf_initialized = True  # some families' blocks would initialise the stock experts' own tensors
        if layout.num_experts != layer.shape.num_experts:
            slice_router(layer, layout.num_experts)
            leave_router_logits(model)


def by_place(said: str, found: Iterable[str]) -> str | None:
    """The layer that a config means. A family's classes put the same layers under different names: the bare model has no
    head around it, the one for text alone no towers beside it. The place in the stack of layers is the same."""
    alike = [said] if said in found else [name for name in found if _place(name) == _place(said)]
    return alike[0] if len(alike) == 1 else None


def _place(name: str) -> str:
    numbered = re.search(r"[^.]+\.\d+\..*", name)
    return numbered[0] if numbered else name


def read_layout(name: str, data: Any) -> Layout:
    """The layout of one container as config.json has it. Raises CheckpointError with the container's name."""
    try:
        return Layout.from_json(data)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error


def check_layout(name: str, layout: Layout, shape: LayerShape) -> None:
    """Refuse a layout that does not fit the stock layer which its container replaces."""
    for entry in ("hidden_size", "expert_width", "has_gate", "has_bias"):
        if getattr(layout, entry) != getattr(shape, entry):
            raise CheckpointError(
                f"config.json says {entry}={getattr(layout, entry)} for the container {name}, but the layer of the model "
                f"has {getattr(shape, entry)}; restore the config.json that was written with the weights"
            )
    if not shape.fewest_experts <= layout.num_experts <= shape.num_experts:
        raise CheckpointError(
            f"config.json gives the container {name} {layout.num_experts} experts; the layer can have "
            f"{shape.fewest_experts} to {shape.num_experts}; restore the config.json that was written with the weights"
        )
    if layout.routing is not None:
        try:
            left = replace(shape, num_experts=layout.num_experts)
            layout.routing.check(f"config.json, {name}: its routing policy", left)
        except PlanError as error:
            raise CheckpointError(f"{error}; restore the config.json that was written with the weights") from error
