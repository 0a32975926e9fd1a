"""Layer Drop: whole layers of experts go, those whose output turns the hidden state least.

Letters: E experts, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..budgets.counts import lowest
from ..options import option
from ..plans.plan import KEPT, NOTHING, LayerPlan
from ..shapes import ModelShape
from ..stats.sums import Statistics
from . import Weights, method

Scored = list[tuple[float, Tensor]]  # of every layer, 1 - S_l, and the gate mass of each expert [E]


@method("layer-drop", paper="arXiv 2406.02500 (Layer Drop)")
@dataclass(frozen=True)
class LayerDrop:
    """Leave nothing of all routed experts of the layers that change the hidden state least; other layers stay whole.

    S_l = mean_t cos(h_t, h_t + y_t),  h the hidden state before the norm in front of the experts' block, y the sum of the routed
    experts' outputs times their gates. The layers with the highest S_l go.

    Where what is asked for is no number of layers, the last one goes in part, the experts with the least gate mass first. Routers
    stay, and so do shared experts and the norm: what goes is what experts weigh, and what a token computes with them.

    Needs:    turn_sum, tokens and gate_sum.
    Edges:    `keep` layers stay, whatever is asked. Of equal similarities the earlier layer goes, of equal masses the expert
              with the lower index. A layer without tokens goes first.
    Source:   Layer Drop of the holistic study, arXiv 2406.02500. Differs: there shared experts, norm and router go too, and their
              output counts in S_l; layers go whole. Block Drop, which takes attention along, is `block-drop`.
    """

    keep: int = option(1, "fewest layers that keep their experts", at_least=0)

    def needs(self) -> tuple[str, ...]:
        return ("turn_sum", "tokens", "gate_sum")

    def score_experts(self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None) -> Scored:
        layers = [statistics.layer(layer.name) for layer in shape.layers]
        turns = [float(layer["turn_sum"] / layer["tokens"].clamp(min=1)) for layer in layers]
        return [(turn, layer["gate_sum"]) for turn, layer in zip(turns, layers, strict=True)]

    def plan(self, scored: Scored, shape: ModelShape, amount: float) -> list[LayerPlan]:
        order = sorted(range(len(scored)), key=lambda index: scored[index][0])[: max(0, len(scored) - self.keep)]
        left = int(amount * sum(shape.layers[index].num_experts for index in order) + 1e-9)
        slots_L = [[KEPT] * layer.num_experts for layer in shape.layers]
        for index in order:
            gone = min(left, len(slots_L[index]))
            for e in lowest(scored[index][1], gone):
                slots_L[index][e] = NOTHING
            left -= gone
        return [LayerPlan(layer.name, tuple(slots)) for layer, slots in zip(shape.layers, slots_L, strict=True)]
