"""Compressed Experts: half of the selected experts run, the others leave vectors behind."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import PlanError
from ..experts.policies.main_with_vectors import VECTORS, MainWithVectors
from ..options import option
from ..plans.plan import KEPT, LayerPlan
from ..shapes import LayerShape, ModelShape
from ..stats.sums import Statistics
from . import Weights, method


@method("compressed-experts", paper="arXiv 2503.00634 (Compressed Experts)", saves="active")
@dataclass(frozen=True)
class CompressedExperts:
    """Run only the main experts of those that the router selects; the others modulate what these read.

    The main experts of a token are those with the largest weights; the vectors of the others, weighted by theirs, are
    multiplied into the inputs of gate, up and down (formulas in routing.py). It saves active parameters and time, not
    memory: any expert is some token's main one, so all of them stay. Vectors start at one, which is the plain model
    with fewer experts: train them, `locum recover --how full` (the paper), `lora` or `vectors`.

    Needs:    nothing; a checkpoint is enough.
    Edges:    an odd top-k rounds up; a router that selects a single expert leaves nothing to save and is refused.
    Source:   Compressed Experts, arXiv 2503.00634: three vectors per expert, as in its code and its counts ("hidden" is
              the one of its text); weights as the model makes them. `static`, `none` and `renormalise` are controls
              that it lacks.
    """

    main: int = option(0, "selected experts that run for a token; 0: half of them", at_least=0)
    vectors: str = option("projections", "what the other selected experts leave behind", choices=VECTORS)
    renormalise: bool = option(False, "scale the main experts' weights to the sum of all selected ones")

    def needs(self) -> tuple[str, ...]:
        return ()

    def score_experts(self, statistics: Statistics | None, shape: ModelShape, weights: Weights | None = None) -> None:
        return None  # no expert is better than another

    def plan(self, scored: None, shape: ModelShape, amount: float) -> list[LayerPlan]:
        return [
            LayerPlan(layer.name, (KEPT,) * layer.num_experts, routing=self._routing(layer)) for layer in shape.layers
        ]

    def _routing(self, layer: LayerShape) -> MainWithVectors:
        if layer.top_k == 1:
            raise PlanError(f"{layer.name} selects one expert for every token, so there is none to run without")
        return MainWithVectors(self.main or -(-layer.top_k // 2), self.vectors, self.renormalise)
