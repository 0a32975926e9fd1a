"""One layer built from its plan: the tensors of a container, from the original experts and the statistics.

Nothing here knows where weights come from or where they go. A layer's experts arrive through a function
`read(expert) -> ExpertWeights`; what leaves is a dictionary of tensors in the container's layout.

Letters: E experts, D model width, F expert width, R rank, N stacked items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PlanError, StatisticsError
from ..experts.factors import gaussian_factors, svd_factors, whitened_factors
from ..experts.weights import ExpertWeights, alignment, mean_expert, permute_hidden
from ..plans.plan import START_NEEDS, LayerPlan, Slot
from ..shapes import LayerShape
from ..stats.sums import LayerStatistics, mean_output
from .layout import Layout


@dataclass(frozen=True)
class Adapter:
    """Low-rank parts of one expert. `gate_up_A` stacks the A of gate and of up: [2R, D] ([R, D] without a gate)."""

    gate_up_A: Tensor
    gate_B_FR: Tensor | None
    up_B_FR: Tensor
    down_A_RF: Tensor
    down_B_DR: Tensor


def make_adapter(
    slot: Slot,
    old: ExpertWeights,
    base: ExpertWeights | None,
    generator: torch.Generator,
    grams: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """The adapter that a slot starts with: nothing (gaussian), or the SVD of what the base leaves of the old weights.

    `grams` has, for `start="whitened"`, the Gram matrix of each weight's inputs, by the weight's name; they are those of
    the original expert, also for down, whose inputs change a little once gate and up are approximated.
    Without a base, gaussian starts would leave every gradient exactly zero (B = 0 in all three projections makes the
    hidden state zero), so `start="gaussian"` then draws B too, scaled so that B A has the old weights' variance.
    """

    def factors(name: str) -> tuple[Tensor, Tensor]:
        matrix = getattr(old, name)
        if slot.start != "gaussian":
            rest = matrix.float() - (0 if base is None else getattr(base, name).float())
            whitened = slot.start == "whitened"
            a, b = whitened_factors(rest, grams[name], slot.rank) if whitened else svd_factors(rest, slot.rank)
            return a.to(matrix.dtype), b.to(matrix.dtype)
        a, b = gaussian_factors(*matrix.shape, slot.rank, matrix, generator)
        if base is None:
            scale = float(matrix.float().std()) * (matrix.shape[1] / slot.rank) ** 0.5
            b = (torch.randn(b.shape, generator=generator) * scale).to(b)
        return a, b

    up_a, up_b = factors("up_FD")
    down_a, down_b = factors("down_DF")
    if old.gate_FD is None:
        return Adapter(up_a, None, up_b, down_a, down_b)
    gate_a, gate_b = factors("gate_FD")
    return Adapter(torch.cat([gate_a, up_a]), gate_b, up_b, down_a, down_b)


def hidden_orders(plan: LayerPlan, read: Callable[[int], ExpertWeights]) -> list[dict[int, Tensor]]:
    """For each base that aligns, the order of each member's hidden units: that of the heaviest one's; else nothing."""
    orders = []
    for base in plan.bases:
        heaviest = base.experts[max(range(len(base.experts)), key=lambda i: base.weights[i])]
        reference = read(heaviest) if base.align else None
        orders.append({e: alignment(read(e), reference) for e in base.experts} if base.align else {})
    return orders


def _reordered(read: Callable[[int], ExpertWeights], e: int, orders: Mapping[int, Tensor]) -> ExpertWeights:
    return permute_hidden(read(e), orders[e]) if e in orders else read(e)


def old_weights(
    plan: LayerPlan, read: Callable[[int], ExpertWeights], orders: list[dict[int, Tensor]] | None = None
) -> dict[int, ExpertWeights]:
    """The original weights of every replaced expert, in the hidden order of its base (annealing blends the two)."""
    orders = hidden_orders(plan, read) if orders is None else orders
    bases = {e: plan.slots[e].base for e in plan.replaced}
    return {e: _reordered(read, e, {} if base is None else orders[base]) for e, base in bases.items()}


def check_statistics(plan: LayerPlan, layer: Mapping[str, Tensor] | None) -> None:
    """Raise PlanError unless the statistics that building a layer reads are there."""
    if missing := [name for name in plan.needs if name not in (layer or {})]:
        has = "constants" if any(slot.constant for slot in plan.slots) else "whitened adapters"
        has = "constants and whitened adapters" if len(plan.needs) > 2 else has
        raise PlanError(
            f"{plan.layer}: the plan has {has}, so the statistics it was made from are needed too (missing: "
            f"{', '.join(missing)})"
        )


def _grams(plan: LayerPlan, layer: LayerStatistics) -> Callable[[int], dict[str, Tensor]]:
    """For an expert, the Gram matrix of each weight's inputs, in the expert's own hidden order."""
    input_EDD, hidden_EFF = (layer[name] for name in START_NEEDS["whitened"])
    if not bool(input_EDD.isfinite().all() and hidden_EFF.isfinite().all()):
        raise StatisticsError(
            f"the Gram matrices of layer {plan.layer} are not finite; calibrate in bfloat16 or float32 instead of float16"
        )
    return lambda e: {"gate_FD": input_EDD[e], "up_FD": input_EDD[e], "down_DF": hidden_EFF[e]}


def _make_adapters(
    plan: LayerPlan,
    read: Callable[[int], ExpertWeights],
    bases: list[ExpertWeights],
    orders: list[dict[int, Tensor]],
    layer: LayerStatistics | None,
    seed: int,
) -> dict[int, list[Adapter]]:
    """Adapters by rank, in the order of the experts."""
    generator = torch.Generator().manual_seed(seed)
    slots = [(e, slot) for e, slot in enumerate(plan.slots) if slot.rank]
    old = old_weights(plan, read, orders) if any(slot.start != "gaussian" for _, slot in slots) else {}
    grams_of = _grams(plan, layer) if any(slot.start == "whitened" for _, slot in slots) else None
    adapters: dict[int, list[Adapter]] = {}
    for e, slot in slots:
        grams = grams_of(e) if slot.start == "whitened" else None
        order_F = None if slot.base is None else orders[slot.base].get(e)
        if grams and order_F is not None:
            order_F = order_F.to(grams["down_DF"].device)
            grams["down_DF"] = grams["down_DF"][order_F][:, order_F]
        base = None if slot.base is None else bases[slot.base]
        adapter = make_adapter(slot, old.get(e) or read(e), base, generator, grams)
        adapters.setdefault(slot.rank, []).append(adapter)
    return adapters


def build_layer(
    plan: LayerPlan,
    shape: LayerShape,
    read: Callable[[int], ExpertWeights],
    layer: LayerStatistics | None = None,
    seed: int = 0,
) -> tuple[Layout, dict[str, Tensor]]:
    """One layer of a plan as the container's layout and its tensors. Deterministic for a seed.

    `read(e)` gives the original expert e; `layer` has the statistics that `plan.needs` names, where it names any.
    Raises PlanError where they are missing.
    """
    check_statistics(plan, layer)
    layout = Layout.of(plan, shape)
    dense: list[ExpertWeights] = [read(e) for e, slot in enumerate(plan.slots) if slot.becomes == "kept"]
    orders = hidden_orders(plan, read)
    bases = [
        mean_expert([_reordered(read, e, order) for e in base.experts], list(base.weights))
        for base, order in zip(plan.bases, orders, strict=True)
    ]
    adapters = _make_adapters(plan, read, bases, orders, layer, seed)
    tensors = {}
    if dense or bases:
        tensors |= stack_dense(dense + bases)
    for index, rank in enumerate(layout.ranks):
        stacked = stack_adapters(adapters[rank])
        tensors |= {f"adapters.{index}.{name}": tensor for name, tensor in stacked.items()}
    if max(layout.bias_of, default=-1) >= 0:
        chosen = [read(e) for e, slot in enumerate(plan.slots) if slot.rank and slot.base is None]
        tensors |= {
            "biases.gate_up_bias_NG": torch.stack([expert.gate_up_bias_G for expert in chosen]),
            "biases.down_bias_ND": torch.stack([expert.down_bias_D for expert in chosen]),
        }
    if layout.num_constants:
        chosen = [e for e, slot in enumerate(plan.slots) if slot.constant]
        like = read(chosen[0]).down_DF
        tensors["constant_ND"] = mean_output(layer)[chosen].to(like)
    if vectors := layout.tensor_shapes().get("offsets_NV"):
        tensors["offsets_NV"] = read(0).down_DF.new_zeros(vectors)  # every vector starts at one
    return layout, {name: tensor.contiguous() for name, tensor in tensors.items()}


def stack_dense(experts: list[ExpertWeights]) -> dict[str, Tensor]:
    """Experts side by side under the container's names."""
    stacked = {
        "dense.gate_up_NGD": torch.stack([e.gate_up_GD for e in experts]),
        "dense.down_NDF": torch.stack([e.down_DF for e in experts]),
    }
    if experts[0].up_bias_F is not None:
        stacked["dense.gate_up_bias_NG"] = torch.stack([e.gate_up_bias_G for e in experts])
        stacked["dense.down_bias_ND"] = torch.stack([e.down_bias_D for e in experts])
    return stacked


def stack_adapters(adapters: list[Adapter]) -> dict[str, Tensor]:
    """Adapters of one rank side by side under the container's names."""
    names = [name for name, tensor in vars(adapters[0]).items() if tensor is not None]
    return {name: torch.stack([getattr(adapter, name) for adapter in adapters]) for name in names}
