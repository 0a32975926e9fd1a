"""Statistics that trying removals on the model finds, by the model's own loss or by a layer's output.

Letters: E experts, X numbers of experts that go, from 1 to E.
"""

from __future__ import annotations

from torch import Tensor

from .definitions import statistic
from .events import SearchEvent


@statistic("removal_loss", axes="E", event=SearchEvent, on_demand=True)
def removal_loss(event: SearchEvent) -> Tensor:
    """What the whole model loses without one expert: the yardstick of every criterion.

    loss(model without e) - loss(model), the mean over the sample's tokens

    Needs:    a search on the live model (`locum search --method leave-one-out`); calibration does not give it.
    Shapes:   (E,).
    Units:    nats per token; comparable across layers. Below 0 where the model is better without the expert.
    Edges:    0 for an expert that no token misses, and in a layer that can spare none.
    Cost:     one pass of the model over the sample for each expert.
    Source:   not from a paper.
    """
    return event.found["removal_loss"]


@statistic("loss_curve", axes="X", event=SearchEvent, on_demand=True)
def loss_curve(event: SearchEvent) -> Tensor:
    """What the whole model loses as more and more experts of one layer go, those first that are missed least alone.

    loss(model without the x experts of the layer with the lowest removal_loss) - loss(model), x = 1, 2, ...

    Needs:    a search on the live model (`locum search --method leave-one-out`); calibration does not give it.
    Shapes:   (E,), the first for one expert; beyond what the layer can spare, the last one that it can.
    Units:    nats per token; comparable across layers.
    Edges:    0 in a layer that can spare none.
    Cost:     one pass of the model over the sample for each number of experts.
    Source:   not from a paper.
    """
    return event.found["loss_curve"]


@statistic("best_sets", axes="XE", event=SearchEvent, on_demand=True)
def best_sets(event: SearchEvent) -> Tensor:
    """Of every number of experts of a layer, the set that a search found to be missed least.

    1 in row x if e is one of the x experts that go; by `naee` those whose removal has the smallest ||F(X) - F_without(X)||_F of
    all sets, by `eep` those of a search over all layers, by the model's loss

    Needs:    a search on the live model (`locum search --method naee`, or eep); calibration does not give it.
    Shapes:   (E, E), the first row for one expert; below the largest number that was tried, its row again.
    Units:    0 or 1.
    Edges:    all 0 in a layer that can spare none. Of a group-limited router only numbers that are equally many of every group
              are tried; between them stands the row before.
    Cost:     naee: the layer's output on cached tokens for every set, without running an expert again; eep: a pass of the model
              for every set that it tries.
    Source:   NAEE, arXiv 2402.14800; EEP, arXiv 2407.00945.
    """
    return event.found["best_sets"]


@statistic("merge_weights", axes="XEE", event=SearchEvent, on_demand=True)
def merge_weights(event: SearchEvent) -> Tensor:
    """Of every number of experts of a layer, the mixtures that a search found for those that stay.

    row e, column i, for x experts that go: how much of W_i is in what takes the place of W_e; a row of zeros where e goes

    Needs:    a search on the live model (`locum search --method eep --mergings N`); calibration does not give it.
    Shapes:   (E, E, E), the first for one expert that goes; rows and gaps between numbers as those of `best_sets`.
    Units:    at least 0; a row sums to 1 or is zero.
    Edges:    ones on the diagonal in a layer that can spare none.
    Cost:     E*E*E float64 per layer; a pass of the model, and the mixtures, for every candidate that it tries.
    Source:   the expert merging matrices of EEP, arXiv 2407.00945.
    """
    return event.found["merge_weights"]
