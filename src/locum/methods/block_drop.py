"""Block Drop: whole decoder layers go, those that turn the hidden state least.

Letters: L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..options import option
from ..plans.plan import KEPT, LayerPlan
from ..shapes import ModelShape
from ..stats.sums import Statistics
from . import Weights, method


@method("block-drop", paper="arXiv 2406.02500 (Block Drop)")
@dataclass(frozen=True)
class BlockDrop:
    """Take out the decoder layers that change the hidden state least, attention and norms with them; others stay whole.

    S_l = mean_t cos(h_t, h'_t),  h the hidden state before a decoder layer, h' after it. The layers with the highest S_l go.

    What is left is a stock checkpoint with fewer layers: it computes less for every token, and its cache is smaller. The amount is a
    share of the experts, as for every method, and so of the decoder layers that have some.

    Needs:    decoder_turn_sum and tokens.
    Edges:    `keep` layers stay, whatever is asked. Of equal similarities the earlier layer goes, and a layer without tokens goes
              first. Families whose config says by a rule which layer is what, so that another would change, are refused by `apply`;
              so are quantised checkpoints.
    Source:   Block Drop of the holistic study, arXiv 2406.02500, where layers go one by one (its "discrete" way). Differs: layers
              without experts, such as dense first ones, stay; the best run of consecutive layers is not searched for.
    """

    keep: int = option(1, "fewest decoder layers with experts that stay", at_least=1)

    def needs(self) -> tuple[str, ...]:
        return ("decoder_turn_sum", "tokens")

    def score_experts(self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None) -> list[float]:
        """1 - S of every layer [L]."""
        layers = [statistics.layer(layer.name) for layer in shape.layers]
        return [float(layer["decoder_turn_sum"] / layer["tokens"].clamp(min=1)) for layer in layers]

    def plan(self, scored: list[float], shape: ModelShape, amount: float) -> list[LayerPlan]:
        order = sorted(range(len(scored)), key=scored.__getitem__)
        gone = order[: round(amount * max(0, len(scored) - self.keep))]
        return [
            LayerPlan.without(layer) if index in gone else LayerPlan(layer.name, (KEPT,) * layer.num_experts)
            for index, layer in enumerate(shape.layers)
        ]
