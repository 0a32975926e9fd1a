"""MoBE: gate and up of all experts of a layer are mixtures of a few shared bases, each behind a factor of the expert's own."""

from __future__ import annotations

from dataclasses import dataclass

from ..budgets.ranks import rank_step
from ..experts.parts.basis_mixture import BasisMixture
from ..options import option
from ..plans.plan import KEPT, LayerPlan, Slot
from ..shapes import LayerShape, ModelShape
from ..stats.sums import Statistics
from . import Weights, method


@method("mobe", paper="arXiv 2508.05257 (MoBE)")
@dataclass(frozen=True)
class MoBE:
    """Make gate and up of every expert a factor of its own times a mixture of bases that the layer's experts share.

    W_e = A_e sum_j mix_e,j B_j for gate and for up, A_e [F, R], B_j [R, D]; fitted to the weights by least squares, A, B and mix in
    turn. Down stays as it is.

    Reads no data. As `amount` grows, matrices of full rank have fewer and fewer bases, down to `bases`; then the rank falls, one for all.

    Needs:    nothing but the checkpoint.
    Edges:    a layer that would not get smaller stays whole; at most gate and up are saved. With one basis it is the truncated SVD of
              all experts' matrices one below the other.
    Cost:     8 bytes for every weight of a layer's gate or up, and some 30 products of their size times the rank, when it is built.
    Source:   MoBE, arXiv 2508.05257, from a note on it. Differs: the mixture is linear, where the paper puts SiLU or tanh around it and
              lets mixing weights be positive and sum to one; least squares, where it runs Adam; matrices are not scaled to unit
              variance first. Below what F as the rank gives, where the paper ends, the rank falls.
    """

    bases: int = option(4, "fewest bases that the experts of a layer share", at_least=1)
    multiple: int = option(4, "what the rank is a multiple of; halved for small weights", at_least=1)

    def needs(self) -> tuple[str, ...]:
        return ()

    def score_experts(self, statistics: Statistics | None, shape: ModelShape, weights: Weights | None = None) -> None:
        return None

    def plan(self, scored: None, shape: ModelShape, amount: float) -> list[LayerPlan]:
        return [self._layer(layer, amount) for layer in shape.layers]

    def _layer(self, layer: LayerShape, amount: float) -> LayerPlan:
        whole = LayerPlan(layer.name, (KEPT,) * layer.num_experts)
        if amount <= 0:
            return whole
        count, d, f = layer.num_experts, layer.hidden_size, layer.expert_width
        left, full = (1 - amount) * count * d * f, min(d, f)  # numbers of one of the two
        bases, step = min(self.bases, count), rank_step(layer, self.multiple)
        more = int((left - count * f * full) / (full * d + count) + 1e-9)
        if more > bases:
            bases, rank = min(more, count), full
        else:
            rank = min(int((left - count * bases) / (count * f + bases * d) / step + 1e-9) * step, full)
            rank = max(step, rank)
        plan = LayerPlan(layer.name, (Slot((BasisMixture(bases, rank),)),) * count)
        return plan if plan.parameters(layer) < whole.parameters(layer) else whole
