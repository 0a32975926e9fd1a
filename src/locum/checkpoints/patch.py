"""Adapters: vectors and routers in a small file of their own, over a base checkpoint whose weights stay as they are.

    folder/vectors.safetensors    vectors of auxiliary experts and routers, under the names they have in the whole model
    folder/config.json            that of the whole model, routing policies included
    folder/plan.json, locum.json  the plan, and the base: its name, its fingerprint, a hash of weights of the live model

`locum.load_model`, and with it every command, takes such a folder for the checkpoint that base and adapter
make together. Where the plan changes nothing but routing, the base is the original checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ..containers.container import StandInExperts
from ..containers.layout import Layout
from ..errors import CheckpointError
from ..experts.parts.own_weights import OwnWeights
from ..files import fingerprint
from ..formats.plain import FLOAT_ENTRIES
from ..models.families import find_layers, read_expert
from ..models.sizes import shape_of
from ..models.stored import stored_tensors
from ..places import name_of, remember
from ..plans.plan_file import load_plan
from .application import apply_plan
from .convert import open_containers
from .read import about_adapter, base_of, fingerprint_checkpoint
from .skeleton import Source, layouts_of
from .weight_files import ADAPTER, is_adapter

SAMPLES = 64  # values of each tensor that tell one base from another


def write_adapter(model: PreTrainedModel, folder: Path) -> None:
    """The adapter's tensors, and the config of the whole model."""
    own = vectors_and_routers(model)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in stored_tensors(model).items() if name in own}
    save_file(tensors, folder / ADAPTER, {"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)


def adapter_notes(model: PreTrainedModel, base: Path) -> dict[str, Any]:
    """What an adapter says of its base."""
    mark = fingerprint_checkpoint(base)
    remember(mark, base)
    return {"base": name_of(base), "base_fingerprint": mark, "weights_fingerprint": weights_of(model)}


def weights_of(model: nn.Module) -> str:
    """A hash of samples of the weights that an adapter leaves alone, equal for a stock model and its container.

    Of bfloat16 values, so that the precision in which a base was loaded makes no difference.
    """

    def sample(tensor: torch.Tensor) -> bytes:
        values = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // SAMPLES)]
        return values.bfloat16().float().cpu().numpy().tobytes()

    own, layers = vectors_and_routers(model), find_layers(model)
    apart = tuple(f"{layer.shape.name}." for layer in layers)
    parts: list[bytes | str] = []
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_floating_point() and name not in own and not name.startswith(apart):
            parts += [name, sample(tensor)]
    for layer in layers:
        experts = layer.experts
        if not isinstance(experts, StandInExperts):
            parts.append(sample(read_expert(experts, 0).down_DF))
        elif experts.layout.num_dense:
            first = next(prefix for prefix, stack in experts.layout.prefixed() if stack.part == OwnWeights.name)
            parts.append(sample(experts.get_parameter(f"{first}down_NDF")[0]))
    return fingerprint(*parts)


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Put the routing policies, vectors and routers of an adapter folder into its base, in place.

    `model` is the live base, stock or compressed, in any precision. Raises CheckpointError, before anything is changed,
    for another base, and for an adapter whose tensors are not those that its config asks for.
    """
    folder = Path(folder)
    about, layouts, plan = about_adapter(folder), layouts_of(folder), load_plan(folder / "plan.json")
    if plan.keeps_experts:
        plan.validate(shape_of(model))
    if weights_of(model) != about.get("weights_fingerprint"):
        raise CheckpointError(
            f"{folder} is an adapter for other weights than these; load its base, {about.get('base')}, and attach it to that"
        )
    tensors = _read(folder / ADAPTER)
    experts = {layer.shape.name: layer.experts for layer in find_layers(model)}
    expected = {name: tuple(p.shape) for name, p in vectors_and_routers(model).items()}
    for name, layout in layouts.items():
        if name not in experts or not (
            _layout(experts[name]) == layout or (plan.keeps_experts and _whole(experts[name]))
        ):
            raise CheckpointError(f"{folder}: the model's {name} is not what the adapter was made for; load its base")
        stored = layout.routing.tensors(layout) if layout.routing else {}
        expected |= {f"{name}.{tensor}": size for tensor, size in stored.items()}
    _check_tensors(folder, expected, {name: _form(t.shape, t.is_floating_point()) for name, t in tensors.items()})
    if all(_whole(module) for module in experts.values()):
        if any(map(_layout, experts.values())):
            open_containers(model)
        apply_plan(model, plan)
    with torch.no_grad():
        for name, parameter in vectors_and_routers(model).items():
            parameter.copy_(tensors[name])
    return model


def check_adapter(folder: str | Path, source: Source) -> None:
    """Refuse a folder whose tensors are not those that its config asks for, if it is an adapter's. The header alone is asked."""
    if is_adapter(folder):
        header = source.files[Path(folder) / ADAPTER]
        expected = {name: tuple(p.shape) for name, p in vectors_and_routers(source.model).items()}
        found = {name: _form(entry["shape"], entry["dtype"] in FLOAT_ENTRIES) for name, entry in header.items()}
        _check_tensors(Path(folder), expected, found)


def _form(shape: Sequence[int], computes: bool) -> tuple[int, ...] | None:
    """A tensor's shape, or None where it holds whole numbers, which are none of a model's."""
    return tuple(shape) if computes else None


def _check_tensors(
    folder: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...] | None]
) -> None:
    if expected != found:
        first = min(name for name in {*expected, *found} if expected.get(name, ()) != found.get(name, ""))
        raise CheckpointError(
            f"{folder / ADAPTER} does not hold what its config.json describes (first: {first}); fetch it again"
        )


def _layout(experts: nn.Module) -> Layout | None:
    return experts.layout if isinstance(experts, StandInExperts) else None


def _whole(experts: nn.Module) -> bool:
    """Whether every expert is there whole: a stock layer, or the container of one that was pruned."""
    layout = _layout(experts)
    return layout is None or layout.only_dense


def load_adapted(folder: Path, load: Callable[[Path], PreTrainedModel]) -> PreTrainedModel:
    """The base that an adapter names, opened by `load`, with the adapter in it."""
    about = about_adapter(folder)
    base = base_of(folder)
    if not (base / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is an adapter over {base}, which is not there; put the base beside it, or load it from where it is and "
            f"attach the adapter with locum.load_adapter(model, folder)"
        )
    if (now := fingerprint_checkpoint(base)) != about.get("base_fingerprint"):
        raise CheckpointError(
            f"{base} is not what the adapter {folder} was trained on, or has changed since (fingerprint {now}, then "
            f"{about.get('base_fingerprint')}); put the right one there"
        )
    return load_adapter(load(base), folder).eval()


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); fetch it again") from error


def vectors_and_routers(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters, by name, that make a model with routing policies out of its base: what an adapter file holds."""
    found: dict[str, nn.Parameter] = {}
    for layer in find_layers(model):
        routers = layer.router.named_parameters()
        found |= {f"{layer.shape.router}.{name}": p for name, p in routers if p.is_floating_point()}
        if isinstance(layer.experts, StandInExperts):
            stored = layer.experts.policy_tensors
            found |= {f"{layer.shape.name}.{name}": layer.experts.get_parameter(name) for name in stored}
    return found
