"""Leave one out: experts go by what the model's loss says of each of them, counts by what it says of many.

Ranks that have met share the layers.

Letters: C candidates, E experts, X numbers of experts that go, from 1 to E.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ranks
from ..budgets.counts import lowest, spare
from ..budgets.sets import finite, removed_mask
from ..options import option
from ..shapes import LayerShape
from . import Explorer, method
from .prune import Prune


@method("leave-one-out", paper="no paper (the loss itself)")
@dataclass(frozen=True)
class LeaveOneOut(Prune):
    """Drop the experts whose removal costs the model the least loss, each tried alone, exactly, on a sample.

    1. Every expert of every layer is removed alone: `removal_loss`, the yardstick of all criteria.
    2. With `curve`, more and more experts of each layer are removed, in that order: `loss_curve`.
    Both are the search (`locum search`); the plan drops the experts with the lowest removal_loss, as many of each layer as
    the budget says, by default those for which the losses of step 2 have the smallest sum.

    Needs:    removal_loss and, for the budget `measured`, loss_curve, from a search; output_peak, by which Super Experts are
              found.
    Edges:    never below top-k, equal numbers per group for group-limited routers. Experts that are tried alone may be
              missed more together.
    Source:   not from a paper. Other methods take --score removal_loss or --budget measured from the same file.
    """

    searched_with: ClassVar = ("seed", "curve")

    score: str = option("removal_loss", "criterion by which experts are ranked; see locum list criteria")
    budget: str = option("measured", "how many go from each layer; see locum list budgets")
    curve: bool = option(True, "measure losses of many experts of a layer too; without, other budgets decide")
    seed: int = option(0, "seed of the search: which tokens are its sample", at_least=0)

    def explore(self, explorer: Explorer, progress: Callable[[str, int, int], None]) -> dict[str, dict[str, Tensor]]:
        """`removal_loss` and `loss_curve` of every layer. The model stays as it is."""
        layers = explorer.shape.layers

        def of_layer(index: int) -> dict[str, Tensor]:
            layer = layers[index]
            alone_E = self._losses(explorer, layer, [(e,) for e in range(layer.num_experts)])
            found = {"removal_loss": alone_E}
            if self.curve:
                steps = range(layer.num_groups, spare(layer) + 1, layer.num_groups)
                losses = self._losses(explorer, layer, [lowest(alone_E, x, layer.num_groups) for x in steps])
                found["loss_curve"] = _filled(losses, layer)
            progress("leave one out", index + 1, len(layers))
            return found

        names = (layer.name for layer in layers)
        return dict(zip(names, ranks.divide(range(len(layers)), of_layer), strict=True))

    def _losses(self, explorer: Explorer, layer: LayerShape, sets: list[tuple[int, ...]]) -> Tensor:
        if spare(layer) < layer.num_groups:
            return torch.zeros(len(sets), dtype=torch.float64)
        error_C = explorer.loss_increase(layer.name, removed_mask(sets, layer.num_experts))
        return torch.tensor(finite(error_C), dtype=torch.float64)


def _filled(losses: Tensor, layer: LayerShape) -> Tensor:
    """[X] with the losses of every number, from those of whole rounds over the groups."""
    if not len(losses):
        return torch.zeros(layer.num_experts, dtype=torch.float64)
    rounds_X = torch.arange(layer.num_experts) // layer.num_groups
    return losses[rounds_X.clamp(max=len(losses) - 1)]
