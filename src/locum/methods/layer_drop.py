"""Layer Drop: whole layers of experts go, those whose output turns the hidden state least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..options import option
from ..plans.plan import KEPT, NOTHING, LayerPlan
from ..shapes import ModelShape
from ..stats.sums import Statistics
from . import Weights, method


@method("layer-drop", paper="arXiv 2406.02500 (Layer Drop)")
@dataclass(frozen=True)
class LayerDrop:
    """Leave nothing of all routed experts of the layers that change the hidden state least; other layers stay whole.

    S_l = mean_t cos(h_t, h_t + y_t),  h the hidden state before the norm in front of the experts' block, y the sum of the routed
    experts' outputs times their gates. The layers with the highest S_l go.

    Their routers stay, and so do shared experts and the norm: what goes is what experts weigh, and what a token computes with
    them.

    Needs:    turn_sum and tokens.
    Edges:    `keep` layers stay, whatever is asked. Of equal similarities the earlier layer goes. A layer without tokens goes
              first.
    Source:   Layer Drop of the holistic study, arXiv 2406.02500. Differs: there shared experts, norm and router go too, and their
              output counts in S_l; Block Drop, which takes attention along, is not there.
    """

    keep: int = option(1, "fewest layers that keep their experts", at_least=0)

    def needs(self) -> tuple[str, ...]:
        return ("turn_sum", "tokens")

    def score_experts(
        self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None
    ) -> tuple[float, ...]:
        """1 - S_l of every layer: how far it turns a token."""
        layers = [statistics.layer(layer.name) for layer in shape.layers]
        return tuple(float(layer["turn_sum"] / layer["tokens"].clamp(min=1)) for layer in layers)

    def plan(self, scored: Sequence[float], shape: ModelShape, amount: float) -> list[LayerPlan]:
        count = round(amount * max(0, len(scored) - self.keep))
        gone = sorted(range(len(scored)), key=lambda index: scored[index])[:count]
        return [
            LayerPlan(layer.name, (NOTHING if index in gone else KEPT,) * layer.num_experts)
            for index, layer in enumerate(shape.layers)
        ]
