"""Expert Slimming: a share of every expert's weights becomes zero, in place."""

from __future__ import annotations

from dataclasses import dataclass

from ..experts.masks import MASKS, Pattern
from ..experts.parts.masked import Masked
from ..options import option
from ..plans.plan import LayerPlan, Slot
from ..shapes import ModelShape
from ..stats.sums import Statistics
from . import Weights, method

UNSTRUCTURED = "unstructured"


@method("expert-slimming", paper="arXiv 2406.02500 (Expert Slimming)", saves="products")
@dataclass(frozen=True)
class ExpertSlimming:
    """Make a part of the weights of every expert zero: of each row of gate, up and down those that score lowest.

    wanda: |w_oi| ||x_i||_2;  moe-pruner: |w_oi| ||g x_i||_2, g the gate;  magnitude: |w_oi|;  sparsegpt: w_oi^2 / U_ii^2, U^T U
    the inverse of the inputs' Gram matrix, and what a zero takes away is made up for by the weights of later inputs.

    The result is a stock checkpoint of the same size: it saves neither memory nor time, but in engines that have products for
    2:4. It is there to be compared with what removes parameters.

    Needs:    for wanda input_square and hidden_square, for moe-pruner those times gates, for sparsegpt input_gram, hidden_gram
              and count, for magnitude nothing.
    Edges:    of an expert that no token selected, the smallest weights go. A row that ends within a group of a pattern has fewer
              zeros. Biases stay.
    Source:   Expert Slimming of the holistic study, arXiv 2406.02500; Wanda, arXiv 2306.11695; SparseGPT, arXiv 2301.00774;
              MoE-Pruner, arXiv 2410.12013, without its distillation. Differs: an expert's Gram matrix borrows of the layer's
              where it saw few tokens; down's inputs are those of the whole expert, not of the one with zeros.
    """

    mask: str = option("wanda", "which weights become zero", choices=MASKS)
    pattern: str = option(
        "2:4", "how many stay of how many side by side, or unstructured", choices=("2:4", "4:8", UNSTRUCTURED)
    )
    share: float = option(
        0.5, "of each row's weights that become zero, where the pattern is unstructured", above=0, at_most=0.99
    )

    def needs(self) -> tuple[str, ...]:
        return MASKS[self.mask].needs

    def score_experts(self, statistics: Statistics | None, shape: ModelShape, weights: Weights | None = None) -> None:
        for (
            layer
        ) in shape.layers:  # every expert gets a mask; what that is made from is asked for now, not when it is made
            for need in self.needs():
                statistics.layer(layer.name)[need]

    def plan(self, scored: None, shape: ModelShape, amount: float) -> list[LayerPlan]:
        pattern = f"{self.share:.6f}".rstrip("0") if self.pattern == UNSTRUCTURED else self.pattern
        Pattern.of(pattern)
        slot = Slot((Masked(pattern, self.mask),))
        return [LayerPlan(layer.name, (slot,) * layer.num_experts) for layer in shape.layers]
