"""A criterion of another package: how much an expert's output is spread over dimensions, times how often it is selected."""

from __future__ import annotations

from torch import Tensor

from locum.criteria.criterion import criterion
from locum.stats.sums import LayerStatistics


@criterion("spread", paper="arXiv 2504.05586 (MC-Suite)", needs=("output_square",))
def spread(layer: LayerStatistics) -> Tensor:
    """The greatest root of summed squares of an expert's outputs over the dimensions.

    S_e = max_d sqrt(sum over tokens of f_e(x)_d^2)

    Units:    hidden-state value times sqrt(tokens); comparable within a layer.
    Edges:    a never-routed expert gets 0.
    """
    return layer["output_square"].clamp(min=0).sqrt().amax(dim=-1)
