"""Finding the MoE layers of any transformers model by one rule, and reading and slicing their experts.

The rule: an experts module carries the flags that transformers' `use_experts_implementation` gives it (`has_gate`,
`is_transposed`, ...) and a `down_proj`; its router is the sibling named `gate` or `router`, and every tensor of the
router has the expert axis first. What does not fit gets a row in `FAMILIES`; what is not safe is refused there, by
name, with the reason. There is no other per-model code anywhere.

Letters: E experts, K top-k, T tokens, D model width, F expert width, G 2F with a gate and F without.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .container import StandInExperts
from .errors import UnsupportedModel
from .shapes import LayerShape
from .stand_ins import ExpertWeights

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # config entries that hold E


@dataclass(frozen=True)
class Family:
    """An exception to the rule for one `model_type`."""

    refuse: str = ""  # why nothing can be done safely


FAMILIES: dict[str, Family] = {
    "deepseek_v4": Family(refuse="its hash-routed layers map token ids to experts, so experts cannot be renumbered"),
    "zaya": Family(refuse="its router has a skip class beside the experts"),
    "longcat_flash": Family(refuse="its router selects zero-computation experts beside the real ones"),
    "muse_spark": Family(refuse="it normalises each expert's output before the gate, which no stand-in reproduces yet"),
}


@dataclass(frozen=True)
class MoeLayer:
    """A live layer: its shape and its two modules. `experts` is a stock module or, once compressed, the container."""

    shape: LayerShape
    experts: nn.Module
    router: nn.Module


def is_stock_experts(module: nn.Module) -> bool:
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed") and hasattr(module, "down_proj")


def find_layers(model: nn.Module) -> tuple[MoeLayer, ...]:
    """The MoE layers of a live model in model order (on any device, meta included).

    Raises UnsupportedModel for a dense model, a family that is refused and a layer that does not fit the rule.
    """
    model_type = model.config.model_type
    if reason := FAMILIES.get(model_type, Family()).refuse:
        raise UnsupportedModel(f"model type {model_type!r} is not supported: {reason}")
    modules = dict(model.named_modules())
    names = [n for n, m in modules.items() if is_stock_experts(m) or isinstance(m, StandInExperts)]
    if not names:
        raise UnsupportedModel(_why_no_layers(model_type, modules))
    return tuple(_layer(name, modules, model_type) for name in names)


def _why_no_layers(model_type: str, modules: dict[str, nn.Module]) -> str:
    if any(name.rpartition(".")[2] in ("experts", "local_experts") for name in modules):
        return (
            f"model type {model_type!r} has experts, but not behind transformers' experts interface, which is where "
            f"Locum observes and replaces them; this family is not supported"
        )
    return f"model type {model_type!r} has no mixture-of-experts layers; Locum compresses MoE models only"


def _layer(name: str, modules: dict[str, nn.Module], model_type: str) -> MoeLayer:
    experts = modules[name]
    block_name = name.rpartition(".")[0]
    block = modules[block_name]
    found = [n for n in ("gate", "router") if isinstance(getattr(block, n, None), nn.Module)]
    if len(found) != 1:
        raise UnsupportedModel(
            f"{name} ({model_type}): expected one router named 'gate' or 'router' beside it, found {found or 'none'}"
        )
    router_name = f"{block_name}.{found[0]}"
    router = modules[router_name]
    num_experts = experts.num_experts
    for tensor_name, tensor in router_tensors(router):
        if tensor.ndim == 0 or tensor.shape[0] != num_experts:
            raise UnsupportedModel(
                f"{router_name}.{tensor_name} ({model_type}) has shape {list(tensor.shape)}; expected the "
                f"{num_experts} experts on its first axis"
            )
    shape = _layer_shape(name, experts, router_name, router, block)
    return MoeLayer(shape, experts, router)


def _layer_shape(name: str, experts: nn.Module, router_name: str, router: nn.Module, block: nn.Module) -> LayerShape:
    if isinstance(experts, StandInExperts):
        layout = experts.layout
        sizes = (layout.hidden_size, layout.expert_width, layout.has_gate, layout.has_bias)
    else:
        d, f = experts.down_proj.shape[1:] if not experts.is_transposed else reversed(experts.down_proj.shape[1:])
        sizes = (d, f, experts.has_gate, experts.has_bias)
    top_k = getattr(router, "top_k", None) or getattr(block, "top_k", None) or getattr(block, "num_experts_per_tok", 0)
    groups = getattr(router, "num_group", None) or getattr(router, "n_group", None) or 1
    if (getattr(router, "topk_method", None) or "").startswith("greedy"):
        groups = 1  # DeepSeek-V2 keeps the setting but does not use it
    kind, renormalised = _probe_router(router, sizes[0])
    shared = [m for n, m in block.named_children() if "shared_expert" in n and "gate" not in n]
    tensors = [tensor for _, tensor in router_tensors(router)]
    return LayerShape(
        name=name,
        num_experts=experts.num_experts,
        top_k=int(top_k),
        hidden_size=int(sizes[0]),
        expert_width=int(sizes[1]),
        router=router_name,
        router_kind=kind,
        renormalised=renormalised,
        num_groups=int(groups),
        shared_experts=len(shared),
        has_gate=sizes[2],
        has_bias=sizes[3],
        router_numel=sum(t.numel() // t.shape[0] for t in tensors),
        router_bytes=sum(t.numel() // t.shape[0] * t.element_size() for t in tensors),
    )


def router_tensors(router: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers of a router, by name."""
    state = router.state_dict()
    tensors = {**dict(router.named_parameters()), **dict(router.named_buffers())}
    return ((name, tensors[name]) for name in state)


def _probe_router(router: nn.Module, hidden_size: int) -> tuple[str, bool]:
    """The score function and whether gates are renormalised, found by trying the router on random input.

    Only for people to read (`inspect`, reports): statistics always use the indices and weights of the model itself.
    """
    twin = copy.deepcopy(router).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    with torch.no_grad(), torch.device("cpu"):  # from_pretrained builds models inside a meta device context
        for _, tensor in router_tensors(twin):
            tensor.copy_(normal(*tensor.shape) * 0.3 if tensor.ndim > 1 else torch.zeros(tensor.shape))
        try:
            logits_TE, gate_TK, index_TK = twin(normal(16, hidden_size))[:3]
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return "unknown", False
    sums_T = gate_TK.float().sum(dim=-1)
    renormalised = bool((sums_T / sums_T[0] - 1).abs().max() < 1e-3) and gate_TK.shape[1] > 1
    for kind, scores_TE in (("softmax", logits_TE.float().softmax(-1)), ("sigmoid", logits_TE.float().sigmoid())):
        ratio_TK = gate_TK.float() / scores_TE.gather(1, index_TK)
        if bool((ratio_TK / ratio_TK[:, :1] - 1).abs().max() < 1e-3):
            return kind, renormalised
    return "other", renormalised


def canonical_gate(experts: nn.Module) -> Callable[[Tensor], Tensor]:
    """The family's own activation as a function of [P, G] with all gate columns before all up columns.

    It works on a copy of the module without weights, so that holding it holds no memory.
    """
    if isinstance(experts, StandInExperts):
        return experts.apply_gate
    shell = copy.copy(experts)
    shell._parameters = {}
    if not experts.has_gate:
        return shell.act_fn
    if experts.is_concatenated:
        return shell._apply_gate
    return lambda pre_PG: shell._apply_gate(torch.stack(pre_PG.chunk(2, dim=-1), dim=-1).flatten(-2))


def read_expert(experts: nn.Module, e: int) -> ExpertWeights:
    """Expert `e` of a stock experts module, in the one orientation that stand-ins use. Views where possible."""
    first_GD = (experts.gate_up_proj if experts.has_gate else experts.up_proj)[e].detach()
    down_DF = experts.down_proj[e].detach()
    if experts.is_transposed:
        first_GD, down_DF = first_GD.T, down_DF.T
    bias_G = down_bias_D = None
    if experts.has_bias:
        bias_G = (experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias)[e].detach()
        down_bias_D = experts.down_proj_bias[e].detach()
    if not experts.has_gate:
        return ExpertWeights(None, first_GD, down_DF, None, bias_G, down_bias_D)
    gate_FD, up_FD = _split_gate(first_GD, experts.is_concatenated)
    gate_bias_F, up_bias_F = (None, None) if bias_G is None else _split_gate(bias_G, experts.is_concatenated)
    return ExpertWeights(gate_FD, up_FD, down_DF, gate_bias_F, up_bias_F, down_bias_D)


def _split_gate(gate_up_G: Tensor, is_concatenated: bool) -> tuple[Tensor, Tensor]:
    if is_concatenated:
        gate, up = gate_up_G.chunk(2, dim=0)
        return gate, up
    return gate_up_G[0::2], gate_up_G[1::2]


def write_expert(experts: nn.Module, e: int, weights: ExpertWeights) -> None:
    """The inverse of `read_expert`: puts one expert's weights into a stock experts module."""

    def first(gate: Tensor | None, up: Tensor) -> Tensor:
        if gate is None:
            return up
        return torch.cat([gate, up]) if experts.is_concatenated else torch.stack([gate, up], dim=1).flatten(0, 1)

    name = "gate_up_proj" if experts.has_gate else "up_proj"
    first_GD, down_DF = first(weights.gate_FD, weights.up_FD), weights.down_DF
    with torch.no_grad():
        getattr(experts, name)[e].copy_(first_GD.T if experts.is_transposed else first_GD)
        experts.down_proj[e].copy_(down_DF.T if experts.is_transposed else down_DF)
        if experts.has_bias:
            getattr(experts, name + "_bias")[e].copy_(first(weights.gate_bias_F, weights.up_bias_F))
            experts.down_proj_bias[e].copy_(weights.down_bias_D)


def slice_router(router: nn.Module, keep: tuple[int, ...] | int) -> None:
    """Keep these rows of everything the router has per expert (or, given a count, make room for that many rows)."""
    for name, tensor in list(router_tensors(router)):
        holder = router.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        if isinstance(keep, int):
            rows = torch.empty((keep, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
        else:
            rows = tensor.detach()[list(keep)].clone()
        if isinstance(tensor, nn.Parameter):
            setattr(holder, leaf, nn.Parameter(rows, requires_grad=tensor.requires_grad))
        else:
            holder._buffers[leaf] = rows
    count = keep if isinstance(keep, int) else len(keep)
    for attribute in ("num_experts", "n_routed_experts", "out_features"):
        if isinstance(getattr(router, attribute, None), int):
            setattr(router, attribute, count)


def slice_experts(experts: nn.Module, keep: tuple[int, ...]) -> None:
    """Keep these experts of a stock experts module."""
    for name, parameter in list(experts.named_parameters(recurse=False)):
        setattr(
            experts, name, nn.Parameter(parameter.detach()[list(keep)].clone(), requires_grad=parameter.requires_grad)
        )
    experts.num_experts = len(keep)


def set_expert_count(config: object, count: int) -> None:
    """Write the number of experts into a config, under whichever names it has."""
    for name in EXPERT_COUNTS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, count)
