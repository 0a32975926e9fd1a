"""A router's rule, found from what the router did, and its gates for any set of removed experts, without the router.

Most routers do one of a few things with their logits: scores by softmax or sigmoid, the best K of them (a bias may be
added for this choice alone), gates that are the scores, perhaps divided by their sum, times a constant. Such a rule is
used only where it gives back the choices and gates that were recorded; whoever uses it also compares it with the real
router on removals. Removing an expert means a logit of minus infinity: the next best is chosen in its place, and the
softmax is over those that are left.

What a token prefers does not change when others leave, so experts are kept in each token's own order, best first, and of
E only the first M = K + (number removed) can matter.

Letters: T tokens, E experts, K top-k, C candidates (sets of removed experts), M experts at the head of a token's order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

TOLERANCE = 1e-5  # of gates; for gates in half precision, one rounding step of theirs
DIGITS = 5  # of a constant that gates are scaled by


def _exponential(logits_TE: Tensor) -> Tensor:
    return (logits_TE - logits_TE.amax(dim=-1, keepdim=True)).exp()


@dataclass(frozen=True, eq=False)
class GateRule:
    """Scores of all tokens, the order in which each token prefers experts, and how gates are made of the scores."""

    order_TE: Tensor  # experts, the preferred first
    score_TE: Tensor  # float64, in that order; of a softmax, before it is divided by its sum
    top_k: int
    divided_by: str  # what scores are divided by: "all", "chosen" or nothing
    dtype: torch.dtype  # that gates are rounded to
    scale: float = 1.0

    @cached_property
    def sums_at(self) -> Tensor:
        """[T, E] scores where each expert has its own column, for sums over those that are left."""
        return torch.empty_like(self.score_TE).scatter_(1, self.order_TE, self.score_TE)

    def gates(self, removed_CE: Tensor, ahead: int) -> Tensor:
        """[C, T, M] gates of the first `ahead` experts in each token's order, 0 for those not chosen."""
        kept_CTM = ~removed_CE[:, self.order_TE[:, :ahead]]
        chosen_CTM = kept_CTM & (kept_CTM.cumsum(dim=-1, dtype=torch.int16) <= self.top_k)
        gate_CTM = self.score_TE[:, :ahead] * chosen_CTM
        if self.divided_by == "chosen":
            gate_CTM = gate_CTM / gate_CTM.sum(dim=-1, keepdim=True)
        elif self.divided_by == "all":
            gate_CTM = gate_CTM / ((~removed_CE).to(self.sums_at) @ self.sums_at.T)[..., None]
        return (gate_CTM * self.scale).to(self.dtype).double()

    def spread(self, removed_CE: Tensor) -> Tensor:
        """[C, T, E] gates, each expert in its own column."""
        gate_CTE = self.gates(removed_CE, self.order_TE.shape[1])
        return torch.zeros_like(gate_CTE).scatter_(2, self.order_TE.expand_as(gate_CTE), gate_CTE)


def spread_gates(index_TK: Tensor, gate_TK: Tensor, num_experts: int) -> Tensor:
    """[T, E] float64 gates, each expert in its own column."""
    zeros_TE = torch.zeros(len(index_TK), num_experts, dtype=torch.float64, device=index_TK.device)
    return zeros_TE.scatter_add_(1, index_TK, gate_TK.double())


def same_gates(one_TE: Tensor, two_TE: Tensor, dtype: torch.dtype) -> bool:
    """Whether gates agree, except for which of several equally good experts a token takes."""
    limit = max(TOLERANCE, torch.finfo(dtype).eps) * max(1.0, float(two_TE.abs().max()))
    one_TE, two_TE = (gates.sort(dim=-1).values for gates in (one_TE, two_TE))
    return bool((one_TE - two_TE).abs().max() <= limit)


def find_rule(logits_TE: Tensor, index_TK: Tensor, gate_TK: Tensor, biases: tuple[Tensor, ...]) -> GateRule | None:
    """The rule that gives these gates for these logits, if one of the few does. `biases` [E] may help the choice."""
    num_experts = logits_TE.shape[1]
    recorded_TE = spread_gates(index_TK, gate_TK, num_experts)
    chosen_TE = torch.zeros_like(recorded_TE, dtype=torch.bool).scatter_(1, index_TK, True)
    for rule in _rules(logits_TE, chosen_TE, index_TK.shape[1], gate_TK.dtype, biases):
        if not bool(chosen_TE.gather(1, rule.order_TE[:, : rule.top_k]).all()):
            continue
        gate_TE = _full(rule)
        ratio = float(recorded_TE.sum() / gate_TE.sum())
        rule = replace(rule, scale=float(f"{ratio:.{DIGITS}g}"))
        limit = max(TOLERANCE, torch.finfo(gate_TK.dtype).eps) * max(1.0, float(recorded_TE.abs().max()))
        if bool((_full(rule) - recorded_TE).abs().max() <= limit):
            return rule
    return None


def _full(rule: GateRule) -> Tensor:
    nothing_1E = torch.zeros(1, rule.order_TE.shape[1], dtype=torch.bool, device=rule.order_TE.device)
    return rule.spread(nothing_1E)[0]


def _rules(
    logits_TE: Tensor, chosen_TE: Tensor, top_k: int, dtype: torch.dtype, biases: tuple[Tensor, ...]
) -> Iterator[GateRule]:
    wide_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    unbiased_TE = _order(wide_TE, chosen_TE)
    for divided_by in ("chosen", "all"):
        score_TE = _exponential(logits_TE.double()).gather(1, unbiased_TE)
        yield GateRule(unbiased_TE, score_TE, top_k, divided_by, dtype)
    # A softmax with a bias is not among them: its scores, and so the choice, change when experts leave.
    orders = [unbiased_TE, *(_order(wide_TE.sigmoid() + bias_E.to(wide_TE), chosen_TE) for bias_E in biases)]
    for order_TE in orders:
        for divided_by in ("chosen", ""):
            yield GateRule(order_TE, logits_TE.double().sigmoid().gather(1, order_TE), top_k, divided_by, dtype)


def _order(choice_TE: Tensor, chosen_TE: Tensor) -> Tensor:
    """Experts by what the choice goes by, best first; of equals, those that were chosen first."""
    first_TE = torch.sort(chosen_TE.to(torch.int8), dim=-1, descending=True, stable=True).indices
    rest_TE = torch.sort(choice_TE.gather(1, first_TE), dim=-1, descending=True, stable=True).indices
    return first_TE.gather(1, rest_TE)
