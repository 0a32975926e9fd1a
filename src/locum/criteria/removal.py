"""The criterion that asks the model itself."""

from __future__ import annotations

from torch import Tensor

from ..stats.sums import LayerStatistics
from .criterion import criterion


@criterion("removal_loss", paper="no paper (the yardstick of any criterion)", needs=("removal_loss",))
def removal_loss(layer: LayerStatistics) -> Tensor:
    """What the whole model loses without one expert, exactly, on a sample: the yardstick of every other criterion.

    S_e = loss(model without e) - loss(model)

    Units:    nats per token; comparable across layers. Below 0 where the model is better without the expert.
    Edges:    what an expert is worth beside others that go too is another question.
    Cost:     a search (`locum search --method leave-one-out`): one pass of the model over the sample for each expert.
    """
    return layer["removal_loss"].clone()
