"""A compressed checkpoint that vLLM reads without Locum, from version 0.33 on: constants in place of experts.

The rules are vLLM's (its page "Expert substitution (MoNE)", pull request vllm-project/vllm#50415; MoNE: arXiv 2507.00390):

    config.json     "approximate_experts": {layer: [experts]}; everything else as of the stock model
    tensors         <experts>.<e>.approx_value [D] for each of them, in place of its weights; an expert that is left has its
                    stock tensors under its own number, and routers have a row for every expert
    computes        what it would, where a selected expert e of the list adds its gate times approx_value

vLLM also reads the same from `compression_config`, but refuses a config that has both, and takes `compression_config` for
one of a quantisation where it is alone.

vLLM has one number of experts for all layers, so one that was dropped has to come back, as the constant zero. Where a
router selects by scores and a bias, the bias keeps it from ever being selected, and the layer is truly pruned; gates are
made of scores without it. Survivors of a layer come first, in each group of a router that has groups.

Letters: T tokens, K top-k, E experts, D model width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..checkpoints.read import SUBSTITUTED
from ..checkpoints.skeleton import skeleton
from ..containers.container import StandInExperts
from ..containers.layout import Layout
from ..experts.parts.constant import Constant
from ..models.conversions import save_as_stock
from ..models.families import MoeLayer, find_layers, set_expert_count, slice_router
from ..models.router_rules import spread_gates
from ..models.routers import router_tensors
from ..models.stored import stored_dtype, stored_tensors
from .whole_experts import NOTHING, constants_of, own_experts, parts_in, without_rows

NEVER = -1e4  # a selection bias: scores are of the order of one. Not infinite: kernels take that for "no expert here"
VALUE = "approx_value"
TRIED = 64  # random tokens on which a router must do as before


@dataclass(frozen=True)
class Renumbering:
    """What becomes of the experts of one layer in the file."""

    ids: tuple[int, ...]  # the number in the file of each of the checkpoint's experts
    total: int  # E

    @property
    def dead(self) -> tuple[int, ...]:
        """Numbers that no expert of the checkpoint has: they must never be selected."""
        return tuple(sorted(set(range(self.total)) - set(self.ids)))


def renumber(layer: MoeLayer, total: int) -> Renumbering:
    """Survivors first in every group; all keep their numbers where none was dropped."""
    groups = layer.shape.num_groups
    mine, theirs = layer.shape.num_experts // groups, total // groups
    return Renumbering(tuple(e // mine * theirs + e % mine for e in range(layer.shape.num_experts)), total)


def total_experts(layers: tuple[MoeLayer, ...], stock: PreTrainedModel) -> int:
    """E: the most that a layer has left, or what the config says where other layers share its number."""
    fixed = [x.shape.num_experts for x in find_layers(stock) if not x.shape.stock_can_drop]
    return max(fixed + [layer.shape.num_experts for layer in layers])


def stock_config(config: PreTrainedConfig) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    del config.quantization_config
    return config


# --- what the form cannot hold ---------------------------------------------------------------------------------------


def form_faults(config: PreTrainedConfig, layouts: dict[str, Layout]) -> list[str]:
    """What keeps a checkpoint with containers from this form, in words; empty where it can have it."""
    model, stock = skeleton(config), skeleton(stock_config(config))
    layers = find_layers(model)
    found = {name: fault for name, layout in layouts.items() if (fault := _part_fault(layout))}
    total = total_experts(layers, stock)
    for layer in layers:
        fault = _place_fault(layer, stock) or _router_fault(layer, renumber(layer, total))
        if fault and layer.shape.name not in found:
            found[layer.shape.name] = fault
    kinds: dict[str, list[str]] = {}
    for name, fault in found.items():
        kinds.setdefault(fault, []).append(name)
    return [f"{fault} ({names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)})" for fault, names in kinds.items()]


def _part_fault(layout: Layout) -> str:
    """What a container has that is neither an expert's own weights nor a constant."""
    found = [part for part in parts_in(layout) if part not in (NOTHING, Constant.plural)]
    if len(without_rows(layout)) == layout.num_experts:
        found.append("a layer without a single expert that has weights")
    return " and ".join(found)


def _place_fault(layer: MoeLayer, stock: PreTrainedModel) -> str:
    """What of a family's files or experts vLLM's rules leave no place for."""
    if layer.shape.hidden_size != stock.config.get_text_config().hidden_size:
        return "experts in a narrower space than the model's"
    names = expert_files(stock, layer.shape.name, stock.get_submodule(layer.shape.name).state_dict())
    if any(len(_numbers(name)) != 2 for name in names):
        return "a family whose files do not keep the weights of each expert apart"
    return ""


def _router_fault(layer: MoeLayer, numbers: Renumbering) -> str:
    """Whether experts that were dropped cannot come back without ever being selected: tried on this router, whose weights
    nobody needs, filled at random."""
    if not numbers.dead:
        return ""
    layer.router.to_empty(device="cpu").float()
    tensors = dict(layer.router.state_dict())
    for part in layer.per_expert:
        if part.holder is layer.block:
            new = tensors[part.leaf] = torch.empty_like(part.tensor, device="cpu", dtype=torch.float32)
            setattr(part.holder, part.leaf, nn.Parameter(new) if isinstance(part.tensor, nn.Parameter) else new)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        tensor.fill_(1) if "scale" in name or "norm" in name else tensor.normal_(0, 0.3, generator=generator)
    x_TD = torch.randn(TRIED, layer.shape.hidden_size, generator=generator)
    parts = router_tensors(layer.router, layer.block, layer.shape.num_experts, layer.family.router, layer.shape.router)
    layer = replace(layer, per_expert=parts)
    before = gates(layer, x_TD)
    widen_router(layer, numbers)
    after = gates(layer, x_TD)
    if before is None or after is None:
        return "unequal numbers of experts with a router that cannot be tried alone"
    index_TK, gate_TK = before
    expected_TE = spread_gates(torch.tensor(numbers.ids)[index_TK], gate_TK, numbers.total)
    if torch.allclose(spread_gates(*after, numbers.total), expected_TE, atol=1e-5):
        return ""
    return "unequal numbers of experts with a router that selects without a bias"


@torch.no_grad()
def gates(layer: MoeLayer, x_TD: Tensor) -> tuple[Tensor, Tensor] | None:
    """Index and gates [T, K] that a router gives, or None where it wants more than inputs and its block's biases."""
    biases = [getattr(part.holder, part.leaf) for part in layer.per_expert if part.holder is layer.block]
    for inputs in (x_TD, x_TD[None]):
        try:
            output = layer.router(inputs, *biases)
            index_TK = next(part for part in output if not part.is_floating_point())
            return index_TK, next(part for part in output if part.shape == index_TK.shape and part.is_floating_point())
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, StopIteration):
            continue
    return None


# --- writing it -------------------------------------------------------------------------------------------------------


def widen_router(layer: MoeLayer, numbers: Renumbering) -> None:
    """Rows for the dead: zero, and NEVER where the router has one number per expert, as a selection bias is."""
    old = [(part, getattr(part.holder, part.leaf).detach()) for part in layer.per_expert]
    slice_router(layer, numbers.total)
    for part, rows in old:
        wide = getattr(part.holder, part.leaf).data
        own, rest = rows.split([len(numbers.ids), rows.shape[part.axis] - len(numbers.ids)], dim=part.axis)
        wide.fill_(NEVER if part.numel == 1 else 0)
        wide.index_copy_(part.axis, torch.tensor(numbers.ids), own)
        wide.narrow(part.axis, numbers.total, rest.shape[part.axis]).copy_(rest)


def expert_files(model: PreTrainedModel, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that the files of a family have for the experts module `name`."""
    return revert_weight_conversion(model, {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()})


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdecimal()]


def _layer_files(
    model: PreTrainedModel, layer: MoeLayer, numbers: Renumbering, stock: PreTrainedModel
) -> tuple[int, dict[int, Tensor], dict[str, Tensor]]:
    """The number of a layer, the constants by their number in the file, and all tensors that the file has for it."""
    name, experts = layer.shape.name, layer.experts
    if isinstance(experts, StandInExperts):
        values = constants_of(experts)
        own = own_experts(experts, stock.get_submodule(name))
    else:
        values, own = {}, experts.state_dict()
    whole = [e for e in range(layer.shape.num_experts) if e not in values]
    tensors = {}
    for file_name, tensor in expert_files(model, name, own).items():
        number, place = _numbers(file_name)
        prefix, leaf = file_name.rsplit(f".{place}.", 1)
        tensors[f"{prefix}.{numbers.ids[whole[place]]}.{leaf}"] = tensor
    zero_D = torch.zeros(layer.shape.hidden_size, dtype=tensor.dtype)
    values = {numbers.ids[e]: value_D for e, value_D in values.items()} | dict.fromkeys(numbers.dead, zero_D)
    return number, values, tensors | {f"{prefix}.{e}.{VALUE}": values[e].clone() for e in sorted(values)}


def substitute(model: PreTrainedModel) -> dict[str, Tensor]:
    """Turn a loaded checkpoint with containers into this form: gives the tensors of its files, and changes config and
    routers in place. The checkpoint must have no `form_faults`."""
    stock, layers = skeleton(stock_config(model.config)), find_layers(model)
    total = total_experts(layers, stock)
    save_as_stock(model)
    tensors: dict[str, Tensor] = {}
    listed: dict[str, list[int]] = {}
    for layer in layers:
        numbers = renumber(layer, total)
        number, values, files = _layer_files(model, layer, numbers, stock)
        tensors |= {n: tensor.to(stored_dtype(model, layer.shape.name, tensor)) for n, tensor in files.items()}
        if values:
            listed[str(number)] = sorted(values)
        if numbers.dead:
            widen_router(layer, numbers)
    experts = tuple(f"{layer.shape.name}." for layer in layers)
    rest = {name: tensor for name, tensor in stored_tensors(model).items() if not name.startswith(experts)}
    tensors |= revert_weight_conversion(model, rest)
    del model.config.quantization_config
    for config in (model.config, model.config.get_text_config()):
        set_expert_count(config, total)
    setattr(model.config, SUBSTITUTED, listed)
    return tensors
