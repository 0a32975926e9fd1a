"""What stands in for an expert, as arithmetic on weights: means, adapters, alignment, and one layer built from a plan.

Nothing here knows where weights come from or where they go. A layer's experts arrive through a function
`read(expert) -> ExpertWeights`; what leaves is a dictionary of tensors in the container's layout.

Letters: E experts, D model width, F expert width, G first product's width (2F with a gate), R rank, N stacked items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..containers.layout import Layout
from ..errors import PlanError, StatisticsError
from ..plans.plan import START_NEEDS, LayerPlan, Slot
from ..shapes import LayerShape
from ..stats.sums import LayerStatistics, mean_output


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


def alignment(expert: ExpertWeights, reference: ExpertWeights) -> Tensor:
    """[F] the order of an expert's hidden units in which they most resemble those of `reference`.

    Units are matched by the inner product of their gate, up and down weights together, each matrix scaled to unit
    norm, with the Hungarian algorithm (as MC-SMoE, arXiv 2310.01334). Cost: F x F x 3D products and O(F^3) matching.
    """

    def units(e: ExpertWeights) -> Tensor:
        parts = [e.up_FD, e.down_DF.T] + ([] if e.gate_FD is None else [e.gate_FD])
        return torch.cat([part.float() / part.float().norm().clamp(min=1e-30) for part in parts], dim=1)

    similarity_FF = units(reference) @ units(expert).T
    _, order = linear_sum_assignment(similarity_FF.numpy(force=True), maximize=True)
    return torch.as_tensor(order, device=expert.up_FD.device)


def align(expert: ExpertWeights, reference: ExpertWeights) -> ExpertWeights:
    """An expert with its hidden units permuted to those of `reference` that they resemble most."""
    return permute_hidden(expert, alignment(expert, reference))


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


def whitened_factors(matrix: Tensor, gram_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The rank-`rank` factors A [R, I], B [O, R] that lose least of what a matrix [O, I] says about its inputs.

    They minimise ||(W - B A) S||_F, S S^T = G + jitter I, with G = sum x x^T over the inputs: SVD-LLM, arXiv 2403.07378,
    which truncates W S = U Sigma V^T and takes B A = U_R Sigma_R V_R^T S^-1. That product is U_R U_R^T W, and U are the
    eigenvectors of W S S^T W^T, so neither S nor its inverse is needed, and a singular G (fewer tokens than inputs)
    does no harm: the jitter, a millionth of G's mean diagonal, decides directions that no token saw. G = 0 (no token
    at all) gives the plain SVD. Both factors of a direction get the same norm. All of it in float64.
    """
    q_OM, rest_MI = torch.linalg.qr(matrix.double())  # so that eigenvectors are of the smaller side, M = min(O, I)
    gram_II = gram_II.to(rest_MI)
    scale = float(gram_II.diagonal().mean())
    jitter_II = torch.eye(len(gram_II)).to(gram_II) * (1e-6 * scale if scale > 0 else 1.0)
    spread_MM = rest_MI @ (gram_II + jitter_II) @ rest_MI.T
    u_MR = torch.linalg.eigh(spread_MM).eigenvectors.flip(1)[:, :rank]
    a_RI = u_MR.T @ rest_MI
    root_R = torch.linalg.vector_norm(a_RI, dim=1).sqrt()
    a_RI = a_RI / torch.where(root_R > 0, root_R, 1.0)[:, None]
    return a_RI.to(matrix.dtype), (q_OM @ u_MR * root_R).to(matrix.dtype)


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
