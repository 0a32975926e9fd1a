"""What stands in for an expert, as arithmetic on weights: means, adapters, alignment, and one layer built from a plan.

Nothing here knows where weights come from or where they go. A layer's experts arrive through a function
`read(expert) -> ExpertWeights`; what leaves is a dictionary of tensors in the container's layout.

Letters: E experts, D model width, F expert width, G first product's width (2F with a gate), R rank, N stacked items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .errors import PlanError
from .layout import Layout
from .plan import Base, LayerPlan, Slot
from .shapes import LayerShape


@dataclass(frozen=True)
class ExpertWeights:
    """One expert in one orientation, whatever the family stores: gate and up are [F, D], down is [D, F]."""

    gate_FD: Tensor | None
    up_FD: Tensor
    down_DF: Tensor
    gate_bias_F: Tensor | None = None
    up_bias_F: Tensor | None = None
    down_bias_D: Tensor | None = None

    def map(self, function: Callable[[str, Tensor], Tensor]) -> ExpertWeights:
        """A copy with `function(name, tensor)` in place of every tensor that is there."""
        return replace(self, **{n: function(n, t) for n, t in vars(self).items() if t is not None})

    @property
    def gate_up_GD(self) -> Tensor:
        return self.up_FD if self.gate_FD is None else torch.cat([self.gate_FD, self.up_FD])

    @property
    def gate_up_bias_G(self) -> Tensor | None:
        if self.up_bias_F is None:
            return None
        return self.up_bias_F if self.gate_bias_F is None else torch.cat([self.gate_bias_F, self.up_bias_F])


@dataclass(frozen=True)
class Adapter:
    """Low-rank parts of one expert. `gate_up_A` stacks the A of gate and of up: [2R, D] ([R, D] without a gate)."""

    gate_up_A: Tensor
    gate_B_FR: Tensor | None
    up_B_FR: Tensor
    down_A_RF: Tensor
    down_B_DR: Tensor


def mean_expert(experts: list[ExpertWeights], weights: list[float]) -> ExpertWeights:
    """The weighted mean of experts, tensor by tensor, summed in float32 (LightMoE Eq. 4)."""

    def mean(name: str, first: Tensor) -> Tensor:
        total = torch.zeros_like(first, dtype=torch.float32)
        for expert, weight in zip(experts, weights, strict=True):
            total += weight * getattr(expert, name).float()
        return total.to(first.dtype)

    return experts[0].map(mean)


def permute_hidden(expert: ExpertWeights, order_F: Tensor) -> ExpertWeights:
    """Reorder an expert's hidden units. The function it computes stays the same."""
    return expert.map(
        lambda name, t: t if name == "down_bias_D" else t[:, order_F] if name == "down_DF" else t[order_F]
    )


def align(expert: ExpertWeights, reference: ExpertWeights) -> ExpertWeights:
    """Permute an expert's hidden units to those of `reference` that they resemble most.

    Units are matched by the inner product of their gate, up and down weights together, each matrix scaled to unit
    norm, with the Hungarian algorithm (as MC-SMoE, arXiv 2310.01334). Cost: F x F x 3D products and O(F^3) matching.
    """

    def units(e: ExpertWeights) -> Tensor:
        parts = [e.up_FD, e.down_DF.T] + ([] if e.gate_FD is None else [e.gate_FD])
        return torch.cat([part.float() / part.float().norm().clamp(min=1e-30) for part in parts], dim=1)

    similarity_FF = units(reference) @ units(expert).T
    _, order = linear_sum_assignment(similarity_FF.numpy(force=True), maximize=True)
    return permute_hidden(expert, torch.as_tensor(order, device=expert.up_FD.device))


def gaussian_factors(
    rows: int, columns: int, rank: int, like: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A [R, columns] drawn from N(0, 1/columns), B [rows, R] zero: the product starts at nothing (as LoRA)."""
    a = torch.randn(rank, columns, generator=generator) / columns**0.5
    return a.to(like), like.new_zeros(rows, rank)


def svd_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` factors A [R, columns], B [rows, R] of a matrix; singular values shared evenly by both."""
    u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    root = s[:rank].sqrt()
    return (root[:, None] * vh[:rank]).to(matrix.dtype), (u[:, :rank] * root).to(matrix.dtype)


def make_adapter(slot: Slot, old: ExpertWeights, base: ExpertWeights | None, generator: torch.Generator) -> Adapter:
    """The adapter that a slot starts with: nothing (gaussian), or the SVD of what the base leaves of the old weights.

    Without a base, gaussian starts would leave every gradient exactly zero (B = 0 in all three projections makes the
    hidden state zero), so `start="gaussian"` then draws B too, scaled so that B A has the old weights' variance.
    """

    def factors(name: str) -> tuple[Tensor, Tensor]:
        matrix = getattr(old, name)
        if slot.start == "svd":
            rest = matrix.float() - (0 if base is None else getattr(base, name).float())
            a, b = svd_factors(rest, slot.rank)
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


def aligned_members(base: Base, read: Callable[[int], ExpertWeights]) -> list[ExpertWeights]:
    """The experts that a base averages, in its order, hidden units aligned to the heaviest one's if it asks for that."""
    experts = [read(e) for e in base.experts]
    if not base.align:
        return experts
    reference = experts[max(range(len(experts)), key=lambda i: base.weights[i])]
    return [align(expert, reference) for expert in experts]


def old_weights(plan: LayerPlan, read: Callable[[int], ExpertWeights]) -> dict[int, ExpertWeights]:
    """The original weights of every replaced expert, in the hidden order of its base (annealing blends the two)."""
    old = {e: read(e) for e in plan.replaced}
    for b, base in enumerate(plan.bases):
        if base.align:
            for e, expert in zip(base.experts, aligned_members(base, read), strict=True):
                if e in old and plan.slots[e].base == b:
                    old[e] = expert
    return old


def build_layer(
    plan: LayerPlan, shape: LayerShape, read: Callable[[int], ExpertWeights], mean_output_ED: Tensor | None, seed: int
) -> tuple[Layout, dict[str, Tensor]]:
    """One layer of a plan as the container's layout and its tensors. Deterministic for a seed.

    `read(e)` gives the original expert e; `mean_output_ED` its mean outputs, where the plan has constants.
    """
    generator = torch.Generator().manual_seed(seed)
    layout = Layout.of(plan, shape)
    dense: list[ExpertWeights] = [read(e) for e, slot in enumerate(plan.slots) if slot.becomes == "kept"]
    bases = [mean_expert(aligned_members(b, read), list(b.weights)) for b in plan.bases]
    old = old_weights(plan, read) if any(s.rank and s.start == "svd" for s in plan.slots) else {}
    adapters: dict[int, list[Adapter]] = {}
    for e, slot in enumerate(plan.slots):
        if slot.rank:
            base = None if slot.base is None else bases[slot.base]
            adapter = make_adapter(slot, old.get(e) or read(e), base, generator)
            adapters.setdefault(slot.rank, []).append(adapter)
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
        if mean_output_ED is None:
            raise PlanError(f"{plan.layer}: the plan has constants, so the statistics it was made from are needed too")
        chosen = [e for e, slot in enumerate(plan.slots) if slot.constant]
        like = read(chosen[0]).down_DF
        tensors["constant_ND"] = mean_output_ED[chosen].to(like)
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
