"""Running a live model's experts under observation, and leaving everything as it was.

Letters: T tokens, K top-k, P pairs (token, expert) sorted by expert, Q pairs of some experts, E experts, D model
width, F expert width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..errors import UnsupportedModel
from ..kernels.grouped import grouped_linear
from ..stats.events import RoutedEvent
from .families import MoeLayer, find_layers, is_stock_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CHUNK = 2**20  # numbers of the experts' inputs at a time on a CPU: 2 MiB in bfloat16


def observable_layers(model: PreTrainedModel) -> tuple[MoeLayer, ...]:
    layers = find_layers(model)
    for layer in layers:
        if not is_stock_experts(layer.experts):
            raise UnsupportedModel(
                f"{layer.shape.name} is compressed already ({type(layer.experts).__name__}); calibrate the original model"
            )
        if getattr(layer.experts, "_is_expert_parallel", False):
            raise UnsupportedModel(f"{layer.shape.name} is split over devices by expert; load the model without it")
    return layers


def run_experts(
    experts: nn.Module, x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor, inside: bool = False
) -> tuple[Tensor, RoutedEvent]:
    """A stock experts module's output [T, D], and every selected pair behind it.

    On a CPU a few experts at a time, so that what lies between their products stays in the cache. With `inside`, the
    pairs' inputs and hidden states are in the event too.
    """
    expert_P, order_P = torch.sort(index_TK.reshape(-1), stable=True)
    token_P, gate_P = order_P // index_TK.shape[1], gate_TK.reshape(-1)[order_P]
    counts = tuple(torch.bincount(expert_P, minlength=experts.num_experts).tolist())
    weight = experts.down_proj
    out_PD = torch.empty(len(order_P), x_TD.shape[1], dtype=weight.dtype, device=weight.device)
    seen: list[tuple[Tensor, Tensor]] = []
    at_once = x_TD.device.type != "cpu" or torch.is_grad_enabled()  # gradients come back to one tensor of hidden states
    room = len(order_P) if at_once else CHUNK // x_TD.shape[1]
    start = 0
    for some in _some_experts(counts, room):
        pairs = slice(start, start + sum(counts[some]))
        start = pairs.stop
        in_QD = x_TD[token_P[pairs]]
        pre_QG = _project(
            experts, "gate_up_proj" if experts.has_gate else "up_proj", in_QD, expert_P[pairs], some, counts
        )
        hidden_QF = experts._apply_gate(pre_QG) if experts.has_gate else experts.act_fn(pre_QG)
        out_QD = _project(experts, "down_proj", hidden_QF, expert_P[pairs], some, counts)
        if getattr(experts, "has_post_expert_norm", False):  # since transformers 5.23
            out_QD = experts.post_expert_norm(out_QD)
        out_PD[pairs] = out_QD
        if inside:
            seen.append((in_QD, hidden_QF))
    in_PD, hidden_PF = (
        (None, None) if not seen else seen[0] if len(seen) == 1 else map(torch.cat, zip(*seen, strict=True))
    )
    y_TD = _weighted_sum(out_PD, gate_TK, order_P).to(x_TD.dtype)
    return y_TD, RoutedEvent(expert_P, gate_P, out_PD, counts, in_PD, hidden_PF, token_P)


def _some_experts(counts: tuple[int, ...], room: int) -> Iterator[slice]:
    """Runs of experts that have `room` pairs at most between them, or one expert that has more alone."""
    first = total = 0
    for e, count in enumerate(counts):
        if e > first and total + count > room:
            yield slice(first, e)
            first, total = e, 0
        total += count
    yield slice(first, len(counts))


def _project(
    experts: nn.Module, name: str, x_QI: Tensor, expert_Q: Tensor, some: slice, counts: tuple[int, ...]
) -> Tensor:
    weight = getattr(experts, name)[some]
    weight_EOI = weight.mT if experts.is_transposed else weight
    out_QO = grouped_linear(x_QI.to(weight.dtype), weight_EOI, list(counts[some]))
    return out_QO.add_(getattr(experts, name + "_bias")[expert_Q]) if experts.has_bias else out_QO


def _weighted_sum(out_PD: Tensor, gate_TK: Tensor, order_P: Tensor) -> Tensor:
    """[T, D] every token's outputs times their gates; pair p of the outputs is number order_P[p] of T*K."""
    if gate_TK.dtype == out_PD.dtype and not torch.is_grad_enabled():
        place_P = torch.empty_like(order_P)
        place_P[order_P] = torch.arange(len(order_P), device=order_P.device)
        return functional.embedding_bag(place_P.view_as(gate_TK), out_PD, per_sample_weights=gate_TK, mode="sum")
    gated_PD = out_PD * gate_TK.reshape(-1)[order_P, None]  # in the wider type of the two
    return torch.empty_like(gated_PD).index_copy_(0, order_P, gated_PD).view(*gate_TK.shape, -1).sum(dim=1)


@contextlib.contextmanager
def experts_implementation(
    model: PreTrainedModel, layers: tuple[MoeLayer, ...], function: Callable[..., Tensor]
) -> Iterator[None]:
    """Put a function behind transformers' experts interface, for this model alone, for as long as the block runs.

    `set_experts_implementation` is not used to go back: it would check and adjust what was there before.
    """
    name = f"locum_observer_{id(model)}"
    before = [(config, config._experts_implementation) for config in configs_of(model)]
    try:
        ALL_EXPERTS_FUNCTIONS[name] = function
        try:
            model.set_experts_implementation(name)
        except (RuntimeError, ValueError) as error:
            raise UnsupportedModel(f"model type {model.config.model_type!r} cannot be observed: {error}") from error
        for layer in layers:
            if layer.experts.config._experts_implementation != name:
                raise UnsupportedModel(
                    f"{layer.shape.name} ({model.config.model_type}) does not follow set_experts_implementation, so its "
                    f"experts cannot be observed"
                )
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation
        ALL_EXPERTS_FUNCTIONS.pop(name, None)


def configs_of(model: nn.Module) -> list[Any]:
    """Every config in a model, parents before children, because setting a parent's implementation sets its children's."""
    found: dict[int, Any] = {}

    def walk(config: Any) -> None:
        if config is not None and id(config) not in found and hasattr(config, "_experts_implementation"):
            found[id(config)] = config
            for key in getattr(config, "sub_configs", {}):
                walk(getattr(config, key, None))

    for module in model.modules():
        walk(getattr(module, "config", None))
    return list(found.values())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for as long as the block runs; every module then gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
