"""Group-local routing: a token's experts come from few groups of experts, such as the devices that hold them.

Experts lie in groups; P are the router's scores of all experts (softmax or sigmoid of its logits):

    the `open` groups with the largest sum of P;  in them, the K experts with the largest P   (SAM, arXiv 2110.07431)

Weights are those scores, at the scale of the router's own: divided by their sum where it divides by it, and times its
constant. With one group, or with all of them open, it is the router's own choice. So it acts on the router, which has the
logits, and not on what was selected.

Letters: T tokens, K top-k, E experts, J groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import PlanError, unknown
from ...shapes import LayerShape
from .policy import Counts, Policy, Routed, check_number, fraction, policy, wide

SCORES = {"softmax": lambda logits_TE: logits_TE.softmax(dim=-1), "sigmoid": torch.sigmoid}


@policy("group_local")
@dataclass(frozen=True)
class GroupLocal(Policy):
    """The best experts of the best groups of experts run."""

    chooses: ClassVar[bool] = True

    groups: tuple[int, ...]  # the group of every expert
    open: int = 1  # groups that a token may use
    scores: str = "softmax"  # one of SCORES: what the router makes of its logits
    renormalised: bool = False  # whether the router divides the weights that it selects by their sum
    before: float = (
        0.0  # groups that a token of the calibration text touched with the router's own choice; 0: not known
    )

    @property
    def count(self) -> int:
        return len(set(self.groups))

    def check(self, where: str, shape: LayerShape | None) -> None:
        whole = [*self.groups] if isinstance(self.groups, tuple) else [None]
        if not whole or any(type(group) is not int or group < 0 for group in whole):
            raise PlanError(
                f"{where} has groups {self.groups!r:.80}; it must be a list of the group of every expert, from 0"
            )
        if type(self.open) is not int or not 1 <= self.open <= self.count:
            raise PlanError(
                f"{where} opens {self.open!r} groups for a token; allowed: 1 to {self.count}, those that there are"
            )
        if self.scores not in SCORES:
            raise PlanError(f"{where}: {unknown('scores', str(self.scores), SCORES)}")
        if type(self.renormalised) is not bool:
            raise PlanError(f"{where} has renormalised {self.renormalised!r}; it must be true or false")
        check_number(where, "before", self.before, self.count)
        if shape is not None:
            self._check_layer(where, shape)

    def _check_layer(self, where: str, shape: LayerShape) -> None:
        if shape.num_groups > 1:
            raise PlanError(
                f"{where}: the router of {shape.name} limits a token to some of its own {shape.num_groups} groups of experts "
                f"already; a second grouping would not be this router's"
            )
        if shape.router_kind not in SCORES:
            raise PlanError(
                f"{where}: the router of {shape.name} makes its weights in a way of its own ({shape.router_kind}), which the "
                f"scores of groups do not know; known are {' and '.join(SCORES)}"
            )
        if len(self.groups) != shape.num_experts:
            raise PlanError(
                f"{where} has groups for {len(self.groups)} experts; the layer has {shape.num_experts}; give every one a group"
            )
        if (room := sum(sorted(Counter(self.groups).values())[: self.open])) < shape.top_k:
            raise PlanError(
                f"{where}: the {self.open} smallest groups hold {room} experts, but the router selects top_k={shape.top_k}; open "
                f"more groups, or make fewer"
            )

    def most(self, top_k: int) -> int:
        return top_k

    def among(self, survivors: tuple[int, ...]) -> Policy:
        return replace(self, groups=tuple(self.groups[e] for e in survivors))

    def route(
        self, counts: Counts, tensors: Mapping[str, Tensor], x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> Routed:
        return Routed(index_TK, weight_TK, (x_TD,))

    def score(self, logits_TE: Tensor) -> Tensor:
        """[T, E] the router's scores, from its logits, in float32 at least."""
        return SCORES[self.scores](wide(logits_TE))

    def is_open(self, score_TE: Tensor) -> Tensor:
        """[T, E] whether an expert lies in a group that is open to the token."""
        kinds = sorted(set(self.groups))
        group_E = torch.tensor([kinds.index(group) for group in self.groups], device=score_TE.device)
        total_TJ = score_TE.new_zeros(len(score_TE), len(kinds)).index_add(1, group_E, score_TE)
        best_TJ = torch.sort(total_TJ, dim=1, descending=True, stable=True).indices[:, : self.open]
        return torch.zeros_like(total_TJ, dtype=torch.bool).scatter_(1, best_TJ, True)[:, group_E]

    def choose(self, logits_TE: Tensor, index_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Equal groups: the earlier one goes first."""
        score_TE = self.score(logits_TE)
        inside_TE = score_TE.masked_fill(~self.is_open(score_TE), -1)  # below every score
        mine_TK, chosen_TK = inside_TE.topk(index_TK.shape[1], dim=1)
        theirs_TK, given_TK = score_TE.gather(1, index_TK), wide(weight_TK)
        if self.renormalised:
            mine_TK, theirs_TK = (fraction(x, x.sum(dim=1, keepdim=True)) for x in (mine_TK, theirs_TK))
        # The router's own constant, from the expert that it gave the most.
        top_T1 = given_TK.argmax(dim=1, keepdim=True)
        scale_T1 = fraction(given_TK.gather(1, top_T1), theirs_TK.gather(1, top_T1))
        return chosen_TK.to(index_TK.dtype), (mine_TK * scale_T1).to(weight_TK.dtype)

    def __str__(self) -> str:
        said = f"experts of {self.open} of {self.count} groups"
        return f"{said}, of {self.before:.2f} before" if self.before else said
