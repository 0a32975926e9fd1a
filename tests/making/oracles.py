"""The slow, obvious versions that fast code is tested against: weights written out, one token and one expert at a time.

Letters: T tokens, K top-k, D model width, F expert width, G first product's width (2F with a gate).
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from locum.containers.container import StandInExperts
from locum.experts.policies.main_with_vectors import MainWithVectors
from locum.plans.plan import DROPPED, KEPT, NOTHING, Base, LayerPlan, Slot, stand_in
from locum.shapes import LayerShape
from locum.training.experts import TrainingExperts
from making.slots import base_of, has_constant, rank_of, rows_of, start_of


def expert_parts(container: StandInExperts, e: int) -> dict[str, Tensor | float]:
    """W1 [G, D], b1 [G], W2 [D, F], b2 [D] and c [D] of one expert: base + B A, written out; zero where it has nothing.

    In annealing: beta old + (1 - beta) (base and constant) + B A.
    """
    layout = container.layout
    d, f = layout.hidden_size, layout.expert_width
    g = f * (2 if layout.has_gate else 1)
    like = next(container.parameters(), torch.zeros(()))
    parts = {"W1": (g, d), "b1": (g,), "W2": (d, f), "b2": (d,), "c": (d,)}
    parts = {name: torch.zeros(shape, dtype=like.dtype) for name, shape in parts.items()}
    names = {"W1": "gate_up_NGD", "W2": "down_NDF", "b1": "gate_up_bias_NG", "b2": "down_bias_ND"}

    def add(stack, row, scale):
        for part, name in names.items():
            if hasattr(stack, name):
                parts[part] = parts[part] + scale * getattr(stack, name)[row]

    fades = isinstance(container, TrainingExperts) and container.old_of[e] >= 0
    rest = 1 - container.beta if fades else 1.0
    if fades:
        add(container.old, container.old_of[e], container.beta)
    if (row := layout.dense_of[e]) >= 0:
        own = container.dense.down_NDF.shape[0]
        add(container.dense if row < own else container.shared, row if row < own else row - own, rest)
    if (index := rows_of(layout).rank_of[e]) >= 0:
        stack, row, r = container.adapters[index], rows_of(layout).adapter_of[e], rows_of(layout).ranks[index]
        a = stack.gate_up_A[row]
        product = stack.up_B_FR[row] @ a[-r:]
        if layout.has_gate:
            product = torch.cat([stack.gate_B_FR[row] @ a[:r], product])
        parts["W1"] = parts["W1"] + product
        parts["W2"] = parts["W2"] + stack.down_B_DR[row] @ stack.down_A_RF[row]
    if (row := rows_of(layout).bias_of[e]) >= 0:
        add(container.biases, row, rest)
    if (row := rows_of(layout).constant_of[e]) >= 0:
        parts["c"] = parts["c"] + rest * container.constant_ND[row]
    return parts


def slow_experts(
    parts: Callable[[int], dict],
    activate: Callable[[Tensor], Tensor],
    x_TD: Tensor,
    index_TK: Tensor,
    gate_TK: Tensor,
    norm: Callable[[Tensor], Tensor] = lambda out_D: out_D,
) -> Tensor:
    """sum_k gate[t, k] (norm(W2 act(W1 x + b1) + b2) + c), token by token, expert by expert; norm where there is one."""
    rows = []
    for t in range(x_TD.shape[0]):
        y_D = torch.zeros_like(x_TD[t])
        for k in range(index_TK.shape[1]):
            p = parts(int(index_TK[t, k]))
            hidden_F = activate((p["W1"] @ x_TD[t] + p["b1"])[None])[0]
            y_D = y_D + gate_TK[t, k] * (norm(p["W2"] @ hidden_F + p["b2"]) + p["c"])
        rows.append(y_D)
    return torch.stack(rows) if rows else x_TD * 1


def random_layer_plan(shape: LayerShape, seed: int, with_dropped: bool = True) -> LayerPlan:
    """Every kind of slot, several ranks, shared bases and adapters without a base, at random."""
    rng = random.Random(seed)
    count = shape.num_experts
    limit = min(shape.hidden_size, shape.expert_width)

    def drawn() -> Slot:
        base = rng.choice([None, 0, 1])
        rank = rng.choice([0, 2, 3, limit])
        constant = rng.random() < 0.4 or (base is None and rank == 0)
        return stand_in(base, rank, rng.choice(["gaussian", "svd"]), constant)

    slots = [rng.choice([KEPT, NOTHING, drawn(), drawn(), drawn()]) for _ in range(count)]
    if with_dropped:
        for e in rng.sample(range(count), count // 4):
            slots[e] = DROPPED
    used = sorted({base_of(slot) for slot in slots if base_of(slot) is not None})
    slots = [
        stand_in(used.index(base_of(s)), rank_of(s), start_of(s), has_constant(s)) if base_of(s) is not None else s
        for s in slots
    ]
    bases = []
    for _ in used:
        members = tuple(sorted(rng.sample(range(count), rng.randint(1, 4))))
        weights = [rng.random() + 0.1 for _ in members]
        bases.append(Base(members, tuple(w / sum(weights) for w in weights), rng.random() < 0.5))
    return LayerPlan(shape.name, tuple(slots), tuple(bases))


def slow_routed(
    parts: Callable[[int], dict],
    activate: Callable[[Tensor], Tensor],
    policy: MainWithVectors,
    vectors_NV: Tensor | None,
    x_TD: Tensor,
    index_TK: Tensor,
    gate_TK: Tensor,
    norm: Callable[[Tensor], Tensor] = lambda out_D: out_D,
) -> Tensor:
    """Compressed Experts (arXiv 2503.00634, section 2.2) token by token: sort, split, theta, main experts on h theta.

    `vectors_NV` are the vectors themselves, one where nothing was learnt: gate's, up's and down's one after the other.
    """
    rows = []
    for t in range(x_TD.shape[0]):
        gates = list(gate_TK[t])
        order = sorted(range(len(gates)), key=lambda k: (-float(gates[k].detach()), k))
        main, rest = order[: policy.main], order[policy.main :]
        scale = sum(gates) / sum(gates[k] for k in main) if policy.renormalise else 1.0
        theta_V = theta_of(policy, vectors_NV, [int(index_TK[t, k]) for k in rest], [gates[k] for k in rest])
        y_D = torch.zeros_like(x_TD[t])
        for k in main:
            p = parts(int(index_TK[t, k]))
            d, f = p["W2"].shape
            gated = p["W1"].shape[0] == 2 * f
            on_gate, on_up, on_down = spread(policy, theta_V, d, f, gated, x_TD)
            first = [p["W1"][:f] @ (x_TD[t] * on_gate), p["W1"][f:] @ (x_TD[t] * on_up)] if gated else []
            pre_G = (torch.cat(first) if gated else p["W1"] @ (x_TD[t] * on_up)) + p["b1"]
            hidden_F = activate(pre_G[None])[0] * on_down
            y_D = y_D + scale * gates[k] * (norm(p["W2"] @ hidden_F + p["b2"]) + p["c"])
        rows.append(y_D)
    return torch.stack(rows)


def theta_of(
    policy: MainWithVectors, vectors_NV: Tensor | None, experts: list[int], gates: list[Tensor]
) -> Tensor | None:
    if vectors_NV is None or (policy.vectors != "static" and not experts):
        return None
    if policy.vectors == "static":
        return vectors_NV[0]
    return sum(gate / sum(gates) * vectors_NV[e] for e, gate in zip(experts, gates, strict=True))


def spread(
    policy: MainWithVectors, theta_V: Tensor | None, d: int, f: int, gated: bool, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What is multiplied into the inputs of gate, up and down."""
    ones_D, ones_F = like.new_ones(d), like.new_ones(f)
    if theta_V is None:
        return ones_D, ones_D, ones_F
    if policy.vectors == "hidden":
        return theta_V, theta_V, ones_F
    if gated:
        return theta_V[:d], theta_V[d : 2 * d], theta_V[2 * d :]
    return ones_D, theta_V[:d], theta_V[d:]
