"""Several policies of one layer in turn, such as vectors for the experts that do not run, and top-p among those that do.

What one leaves is what the next one gets. The one that chooses on the router comes first, then the one that must see all
that was selected; others keep their order.

Letters: T tokens, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import OptionError, PlanError
from ...shapes import LayerShape
from .policy import Counts, Policy, Routed, policy, read_policy


@policy("in_turn")
@dataclass(frozen=True)
class InTurn(Policy):
    """Policies that follow one another."""

    policies: tuple[Policy, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.policies, tuple) or not all(isinstance(x, Policy | dict) for x in self.policies):
            raise OptionError(f"policies in turn are {self.policies!r:.80}; they must be a list of policies")
        if any(isinstance(x, InTurn) or (isinstance(x, dict) and x.get("policy") == self.name) for x in self.policies):
            raise OptionError("policies in turn have others in turn among them; put all of them into one list")
        read = [x if isinstance(x, Policy) else read_policy(x) for x in self.policies]
        object.__setattr__(self, "policies", tuple(sorted(read, key=lambda x: (not x.chooses, not x.reads_all))))

    @classmethod
    def of(cls, first: Policy | None, then: Policy | None) -> Policy | None:
        """A policy and another one on top, which takes the place of the one of its kind; of a kind with names, of the one of its name."""
        kept = {each.place: each for each in (*each_of(first), *each_of(then))}
        return next(iter(kept.values()), None) if len(kept) < 2 else cls(tuple(kept.values()))

    @property
    def chooses(self) -> bool:  # type: ignore[override]
        return any(each.chooses for each in self.policies)

    @property
    def reads_all(self) -> bool:  # type: ignore[override]
        return any(each.reads_all for each in self.policies)

    def check(self, where: str, shape: LayerShape | None) -> None:
        if len(self.policies) < 2:
            raise PlanError(f"{where} has {len(self.policies)} policies in turn; it takes two or more")
        for test in ("chooses", "reads_all"):
            if len(found := [each.name for each in self.policies if getattr(each, test)]) > 1:
                raise PlanError(f"{where} has {' and '.join(found)} in turn, each of which must be the first; keep one")
        places = [each.place for each in self.policies]
        if twice := [place for place in dict.fromkeys(places) if places.count(place) > 1]:
            raise PlanError(f"{where} has {twice[0]} more than once in turn; keep one")
        for each in self.policies:
            each.check(f"{where}, {each.name}", shape)

    def most(self, top_k: int) -> int:
        return min(each.most(top_k) for each in self.policies)

    def average(self, top_k: int) -> float:
        """The least of theirs: how they meet was not counted."""
        return min(each.average(top_k) for each in self.policies)

    def among(self, survivors: tuple[int, ...]) -> Policy:
        return replace(self, policies=tuple(each.among(survivors) for each in self.policies))

    def tensors(self, counts: Counts) -> dict[str, tuple[int, ...]]:
        return {name: size for each in self.policies for name, size in each.tensors(counts).items()}

    def per_token(self, top_k: int) -> int:
        return sum(each.per_token(top_k) for each in self.policies)

    def active(self, counts: Counts, top_k: int) -> int:
        return sum(each.active(counts, top_k) for each in self.policies)

    def added(self, tensors: Mapping[str, Tensor], x_TD: Tensor) -> Tensor | None:
        found = [each.added(tensors, x_TD) for each in self.policies]
        found = [more_TD for more_TD in found if more_TD is not None]
        return torch.stack(found).sum(dim=0) if found else None

    def route(
        self, counts: Counts, tensors: Mapping[str, Tensor], x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> Routed:
        routed = Routed(index_TK, weight_TK, (x_TD,))
        for each in self.policies:
            then = each.route(counts, tensors, x_TD, routed.index_TM, routed.weight_TM)
            changes = then.down_TF is not None or then.inputs[0] is not x_TD
            routed = then if changes else replace(routed, index_TM=then.index_TM, weight_TM=then.weight_TM)
        return routed

    def choose(self, logits_TE: Tensor, index_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
        for each in self.policies:
            index_TK, weight_TK = each.choose(logits_TE, index_TK, weight_TK)
        return index_TK, weight_TK

    def work(self, counts: Counts, index_TK: Tensor, routed: Routed) -> tuple[int, int]:
        pairs = [each.work(counts, index_TK, routed) for each in self.policies]
        return sum(numbers for numbers, _ in pairs), sum(operations for _, operations in pairs)

    def to_json(self) -> dict[str, Any]:
        return {"policy": self.name, "policies": [each.to_json() for each in self.policies]}

    def __str__(self) -> str:
        return "; ".join(map(str, self.policies))


def each_of(policy: Policy | None) -> tuple[Policy, ...]:
    """The policies of a layer one by one, in their order."""
    if isinstance(policy, InTurn):
        return policy.policies
    return () if policy is None else (policy,)
