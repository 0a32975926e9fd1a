"""NAEE: all sets of experts are tried, and the one that changes a layer's output least goes.

Ranks that have met share the layers.

Letters: E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ranks
from ..budgets.counts import spare
from ..budgets.sets import search_sets
from ..errors import PlanError
from ..options import option
from ..shapes import LayerShape, ModelShape
from . import Explorer, method
from .found_sets import FoundSets


@method("naee", paper="arXiv 2402.14800 (NAEE)")
@dataclass(frozen=True)
class NAEE(FoundSets):
    """Drop from every layer the set of experts without which its output changes least, of all sets of that size.

    min over sets S of x experts: ||F(X) - F_without S(X)||_F,  X the layer's inputs on a sample of the text, the router run anew

    The search (`locum search`) tries every set of 1, 2, ... experts, up to `most` of a layer, in batches of routing over cached
    products of expert outputs: no expert runs again. One search serves any target up to that. Every layer gives the same share.

    Needs:    best_sets, from a search.
    Edges:    never below top-k, equal numbers per group for group-limited routers. A layer of which some number has more than
              `limit` sets is refused before anything is loaded: `hope` chooses sets of any number of experts without trying
              them, `moe-i2` tries those that a genetic search comes to. Experts that no token selects go first. Super Experts
              are looked for by no plan of it; the error knows them where their output counts.
    Source:   NAEE, arXiv 2402.14800, "layerwise": inputs are the original model's. Differs: one norm over all sampled tokens,
              where its code adds up one for each text; its other variant, which takes inputs anew after every pruned layer
              (progressive), and its skipping of second experts are left out.
    """

    searched_with: ClassVar = ("most", "limit", "seed")

    most: float = option(0.5, "largest share of a layer's experts of which sets are tried", above=0, at_most=0.95)
    limit: int = option(100_000, "most sets of one number of experts that are tried", at_least=1)
    seed: int = option(0, "seed of the search: which tokens are its sample", at_least=0)

    def check(self, shape: ModelShape) -> None:
        """Raises PlanError for a layer with too many sets."""
        for layer in shape.layers:
            for count in self._counts(layer):
                if (sets := _number_of_sets(layer, count)) > self.limit:
                    fits = f"give --most {(count - layer.num_groups) / layer.num_experts:.3g} or less"
                    raise PlanError(
                        f"{layer.name} has {sets:.3g} sets of {count} of its {layer.num_experts} experts, and naee tries all of "
                        f"them, --limit {self.limit} at most; {fits if count > layer.num_groups else 'raise --limit'}, or take "
                        f"--method hope, which chooses sets without trying them, or moe-i2, which tries some"
                    )

    def explore(self, explorer: Explorer, progress: Callable[[str, int, int], None]) -> dict[str, dict[str, Tensor]]:
        """`best_sets` of every layer. The model stays as it is."""
        layers = explorer.shape.layers
        self.check(explorer.shape)

        def of_layer(index: int) -> dict[str, Tensor]:
            best_XE = self._best(explorer, layers[index])
            progress("all sets", index + 1, len(layers))
            return {"best_sets": best_XE}

        names = (layer.name for layer in layers)
        return dict(zip(names, ranks.divide(range(len(layers)), of_layer), strict=True))

    def _best(self, explorer: Explorer, layer: LayerShape) -> Tensor:
        best_XE = torch.zeros(layer.num_experts, layer.num_experts, dtype=torch.float64)
        for count in self._counts(layer):
            ((members, _),) = search_sets(
                layer.num_experts,
                count,
                lambda removed_CE: explorer.output_error(layer.name, removed_CE),
                population=self.limit,
                generations=1,  # sets are all tried where there are no more than these two multiplied
                keep=1,
                num_groups=layer.num_groups,
            )
            best_XE[count - 1 :] = 0
            best_XE[count - 1 :, list(members)] = 1
        return best_XE

    def _counts(self, layer: LayerShape) -> range:
        """The numbers of experts of which sets are tried."""
        most = min(spare(layer), int(self.most * layer.num_experts + 1e-9))
        return range(layer.num_groups, most + 1, layer.num_groups)


def _number_of_sets(layer: LayerShape, count: int) -> int:
    """Of `count` experts, equally many of each group."""
    return math.comb(layer.num_experts // layer.num_groups, count // layer.num_groups) ** layer.num_groups
