"""Group-local routing: experts that are used together in one group, and a token's experts from few groups."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..budgets.partition import partition
from ..errors import PlanError
from ..experts.policies.group_local import GroupLocal
from ..options import option
from ..plans.plan import KEPT, LayerPlan
from ..shapes import LayerShape, ModelShape
from ..stats.sums import Statistics
from . import Weights, method


@method("groups", paper="arXiv 2110.07431 (SAM)", saves="devices")
@dataclass(frozen=True)
class Groups:
    """Choose a token's experts from few groups, which hold experts that tokens use together.

    the `open` groups with the largest sum of probabilities; in them, the K experts with the largest

    A group may be a device: then a token's experts lie on `open` devices at most, and the plan says on how many they lay before.
    Groups are of equal size, or differ by one, and co-activation inside of them is as large as swaps of two experts can make it,
    so that a model which was not trained so loses least. It saves neither parameters nor memory.

    Needs:    co_count and gate_sample.
    Edges:    one group, or all of them open, is the router's own choice. Refused for routers with groups of their own, with a
              selection bias, or with weights that are neither a softmax nor a sigmoid.
    Source:   SAM, arXiv 2110.07431: hierarchical routing, there for models that are trained with it. Grouping by co-activation
              as in GRACE-MoE, arXiv 2509.25041, which places experts and does not change the routing.
    """

    groups: int = option(2, "groups of experts, such as devices", at_least=1)
    open: int = option(1, "groups that a token may use", at_least=1)

    def needs(self) -> tuple[str, ...]:
        return ("co_count", "gate_sample")

    def score_experts(
        self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None
    ) -> list[tuple[tuple[int, ...], float]]:
        """The group of every expert, and how many groups a sampled token touched, for every layer."""
        found = []
        for layer in shape.layers:
            self._check(layer)
            seen = statistics.layer(layer.name)
            groups = partition(seen["co_count"], self.groups)
            found.append((groups, touched(seen["gate_sample"], groups)))
        return found

    def plan(self, scored: list[tuple[tuple[int, ...], float]], shape: ModelShape, amount: float) -> list[LayerPlan]:
        return [
            LayerPlan(
                layer.name,
                (KEPT,) * layer.num_experts,
                routing=GroupLocal(groups, self.open, layer.router_kind, layer.renormalised, before),
            )
            for layer, (groups, before) in zip(shape.layers, scored, strict=True)
        ]

    def _check(self, layer: LayerShape) -> None:
        if self.groups > layer.num_experts or self.open > self.groups:
            raise PlanError(
                f"--groups {self.groups} with --open {self.open}: {layer.name} has {layer.num_experts} experts; make 1 to "
                f"{layer.num_experts} groups, and open 1 to all of them"
            )


def touched(gate_UE: Tensor, groups: tuple[int, ...]) -> float:
    """In how many groups a token's experts lie, on average; rows of zeros are no tokens. 0 without any."""
    used_UJ = gate_UE.new_zeros(len(gate_UE), max(groups) + 1)
    used_UJ.index_add_(1, gate_UE.new_tensor(groups).long(), (gate_UE != 0).to(gate_UE.dtype))
    counts_U = (used_UJ > 0).sum(dim=1).double()
    return float(counts_U.sum() / (counts_U > 0).sum().clamp(min=1))
