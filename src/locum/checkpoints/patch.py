"""Adapters: vectors, routers and a few experts in a small file of their own, over a base checkpoint whose weights stay as they are.

    folder/vectors.safetensors    what routing policies store and routers, under the names they have in the whole model; of experts
                                  that were trained, the rows of stacks that are theirs alone, LAYER.dense.down_NDF.ROW
    folder/config.json            that of the whole model, routing policies included
    folder/plan.json, locum.json  the plan, and the base: its name, its fingerprint, a hash of weights of the live model; and the
                                  experts that were trained, by layer

`locum.load_model`, and with it every command, takes such a folder for the checkpoint that base and adapter
make together. Where the plan changes nothing but routing, the base is the original checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from ..experts.parts.own_weights import OwnWeights, rows_of
from ..experts.parts.own_weights import weights_of as weights_of_row
from ..experts.policies.in_turn import each_of
from ..experts.policies.policy import Policy
from ..files import fingerprint
from ..formats.plain import FLOAT_ENTRIES
from ..models.families import MoeLayer, find_layers, read_expert, write_expert
from ..models.sizes import shape_of
from ..models.stored import stored_tensors
from ..places import name_of, remember
from ..plans.plan import KEPT, LayerPlan
from ..plans.plan_file import load_plan
from .application import add_policy, apply_plan
from .convert import open_containers
from .placing import note_containers
from .read import about_adapter, base_of, fingerprint_checkpoint
from .skeleton import Source, layouts_of
from .weight_files import ADAPTER, is_adapter

SAMPLES = 64  # values of each tensor that tell one base from another
Experts = Mapping[str, Sequence[int]]  # some of every layer's, by the name of the layer


@dataclass(frozen=True)
class Row:
    """A row of a stack that is in an adapter, of a container or of the one that a stock layer would be."""

    layer: str
    prefix: str  # of the stack
    leaf: str
    row: int
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.prefix}{self.leaf}.{self.row}"


def write_adapter(model: PreTrainedModel, folder: Path, experts: Experts | None = None) -> None:
    """The adapter's tensors, those of these experts among them, and the config of the whole model."""
    stored = stored_tensors(model)
    tensors = {name: stored[name] for name in vectors_and_routers(model)}
    layers = {layer.shape.name: layer for layer in find_layers(model)}
    for row in rows_of_experts({name: _layout_of(layer) for name, layer in layers.items()}, experts or {}):
        module = layers[row.layer].experts
        if isinstance(module, StandInExperts):
            tensors[row.name] = stored[f"{row.layer}.{row.prefix}{row.leaf}"][row.row]
        else:
            dtype = stored[f"{row.layer}.down_proj"].dtype
            tensors[row.name] = rows_of(read_expert(module, row.row))[row.leaf].to(dtype)
    ready = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    save_file(ready, folder / ADAPTER, {"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)


def rows_of_experts(layouts: Mapping[str, Layout], experts: Experts) -> Iterator[Row]:
    """The rows that no other than these experts use."""
    for name, chosen in experts.items():
        layout, alone = layouts[name], layouts[name].rows_alone(chosen)
        for prefix, stack in layout.prefixed():
            for leaf, shape in stack.kind.tensors(stack.variant, layout).items():
                yield from (Row(name, prefix, leaf, row, shape) for row in alone.get(prefix, ()))


def adapter_notes(model: PreTrainedModel, base: Path, experts: Experts | None = None) -> dict[str, Any]:
    """What an adapter says of its base, and which experts it brings."""
    mark = fingerprint_checkpoint(base)
    remember(mark, base)
    experts = {name: list(chosen) for name, chosen in (experts or {}).items() if chosen}
    about = {"base": name_of(base), "base_fingerprint": mark, "weights_fingerprint": weights_of(model, experts)}
    return about | ({"experts": experts} if experts else {})


def experts_in(folder: Path) -> dict[str, list[int]]:
    """The experts that an adapter brings, as it says itself. Raises CheckpointError where it says no such thing."""
    said = about_adapter(folder).get("experts", {})
    is_right = isinstance(said, dict) and all(
        isinstance(chosen, list) and all(type(e) is int for e in chosen) for chosen in said.values()
    )
    if not is_right:
        raise CheckpointError(
            f"{folder}: its notes name no experts by layer, but {said!r:.60}; restore what Locum wrote"
        )
    return said


def weights_of(model: nn.Module, experts: Experts | None = None) -> str:
    """A hash of samples of the weights that an adapter with these experts leaves alone, equal for a stock model and its container.

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
        module, layout = layer.experts, _layout_of(layer)
        dense = next(((prefix, stack) for prefix, stack in layout.prefixed() if stack.part == OwnWeights.name), None)
        if dense is None:
            continue
        changed = layout.rows_alone((experts or {}).get(layer.shape.name, ())).get(dense[0], ())
        row = next((row for row in range(dense[1].num_rows) if row not in changed), None)
        if row is None:
            continue
        if isinstance(module, StandInExperts):
            parts.append(sample(module.get_parameter(f"{dense[0]}down_NDF")[row]))
        else:
            parts.append(sample(read_expert(module, row).down_DF))
    return fingerprint(*parts)


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Put the routing policies, vectors, routers and experts of an adapter folder into its base, in place.

    `model` is the live base, stock or compressed, in any precision. Sets of small experts (soft_lora) that it has from another adapter
    stay beside those that this one brings. Raises CheckpointError, before anything is changed, for another base, and for an adapter
    whose tensors are not those that its config asks for.
    """
    folder = Path(folder)
    about, layouts, plan = about_adapter(folder), layouts_of(folder), load_plan(folder / "plan.json")
    brought = experts_in(folder)
    if plan.keeps_experts:
        plan.validate(shape_of(model))
    if weights_of(model, _of_layers(brought, model)) != about.get("weights_fingerprint"):
        raise CheckpointError(
            f"{folder} is an adapter for other weights than these; load its base, {about.get('base')}, and attach it to that"
        )
    tensors = _read(folder / ADAPTER)
    layers = find_layers(model)
    experts = {layer.shape.name: layer.experts for layer in layers}
    there = {layer.shape.name: _layout_of(layer) for layer in layers}
    for name, layout in layouts.items():
        if name not in experts or not (
            _goes_over(layout, there[name]) or (plan.keeps_experts and _whole(experts[name]))
        ):
            raise CheckpointError(f"{folder}: the model's {name} is not what the adapter was made for; load its base")
    stored = {f"{name}.{tensor}": size for name, layout in layouts.items() for tensor, size in _stored(layout).items()}
    others = {f"{name}.{tensor}" for name, layout in there.items() for tensor in _stored(layout)}
    expected = {name: tuple(p.shape) for name, p in vectors_and_routers(model).items() if name not in others} | stored
    rows = _rows_in(folder, brought, there | layouts)
    expected |= {row.name: row.shape for row in rows}
    _check_tensors(folder, expected, {name: _form(t.shape, t.is_floating_point()) for name, t in tensors.items()})
    if plan.keeps_experts and all(_whole(module) for module in experts.values()):
        if any(map(_layout, experts.values())):
            open_containers(model)
        apply_plan(model, plan)
    elif more := [x for x in layers if x.shape.name in layouts and layouts[x.shape.name] != there[x.shape.name]]:
        for layer in more:
            add_policy(model, layer, layouts[layer.shape.name].routing)
        note_containers(model)
    with torch.no_grad():
        for name, parameter in vectors_and_routers(model).items():
            if name in expected:
                parameter.copy_(tensors[name])
        _put_rows(model, rows, tensors)
    return model


def _put_rows(model: nn.Module, rows: Sequence[Row], tensors: Mapping[str, torch.Tensor]) -> None:
    whole: dict[tuple[str, int], dict[str, torch.Tensor]] = {}  # of stock layers, by layer and expert
    layers = {layer.shape.name: layer.experts for layer in find_layers(model)}
    for row in rows:
        module = layers[row.layer]
        if isinstance(module, StandInExperts):
            module.get_parameter(row.prefix + row.leaf)[row.row].copy_(tensors[row.name])
        else:
            whole.setdefault((row.layer, row.row), {})[row.leaf] = tensors[row.name]
    for (layer, e), found in whole.items():
        write_expert(layers[layer], e, weights_of_row(found, layers[layer].has_gate))


def _rows_in(folder: Path, experts: Experts, layouts: Mapping[str, Layout]) -> list[Row]:
    """The rows that an adapter has to bring. Raises CheckpointError where the model has no such experts."""
    for name, chosen in experts.items():
        if name not in layouts or not all(0 <= e < layouts[name].num_experts for e in chosen):
            raise CheckpointError(f"{folder}: the model has no experts {chosen!s:.60} in {name}; load its base")
    return list(rows_of_experts(layouts, experts))


def _of_layers(experts: Experts, model: nn.Module) -> Experts:
    """Those of layers that a model has: of others is said later what is wrong."""
    names = {layer.shape.name for layer in find_layers(model)}
    return {name: chosen for name, chosen in experts.items() if name in names}


def check_adapter(folder: str | Path, source: Source) -> None:
    """Refuse a folder whose tensors are not those that its config asks for, if it is an adapter's. The header alone is asked."""
    if is_adapter(folder):
        header = source.files[Path(folder) / ADAPTER]
        expected = {name: tuple(p.shape) for name, p in vectors_and_routers(source.model).items()}
        layouts = {layer.shape.name: _layout_of(layer) for layer in source.layers}
        expected |= {row.name: row.shape for row in _rows_in(Path(folder), experts_in(Path(folder)), layouts)}
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


def _layout_of(layer: MoeLayer) -> Layout:
    """A layer's layout, or that of the container that would hold a stock one."""
    kept = LayerPlan(layer.shape.name, (KEPT,) * layer.shape.num_experts)
    return _layout(layer.experts) or Layout.of(kept, layer.shape)


def _goes_over(layout: Layout, there: Layout) -> bool:
    """Whether a container is what an adapter is for: all is alike but sets of small experts, of which those of a name have one size."""
    brought = _stored(layout)
    sizes_fit = all(brought.get(name, size) == size for name, size in _stored(there).items())
    return _without_sets(layout) == _without_sets(there) and sizes_fit


def _without_sets(layout: Layout) -> tuple[Layout, list[Policy]]:
    """A layout's experts, and its policies but those that only add to what the experts put out."""
    return replace(layout, routing=None), [each for each in each_of(layout.routing) if not each.only_adds]


def _stored(layout: Layout) -> dict[str, tuple[int, ...]]:
    """What a layer's policies store, by name."""
    return layout.routing.tensors(layout) if layout.routing else {}


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
