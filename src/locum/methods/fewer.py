"""What methods share that run fewer of the experts that a router selects: how many are wanted, and what weights become."""

from __future__ import annotations

from torch import Tensor

from ..errors import PlanError
from ..shapes import LayerShape, ModelShape
from ..stats.sums import LayerStatistics

RENORMALISE = ("as-model", "yes", "no")
AS_MODEL = "scale weights to the sum of all selected ones; as-model: where the router makes them sum to one"


def renormalises(option: str, layer: LayerShape) -> bool:
    return layer.renormalised if option == "as-model" else option == "yes"


def halfway(layer: LayerShape) -> float:
    """Halfway from one expert to all that are selected."""
    return (1 + layer.top_k) / 2


def check_mean(mean: float, shape: ModelShape) -> None:
    """Refuse a mean number of experts that no layer can have. Raises PlanError."""
    most = max(layer.top_k for layer in shape.layers)
    if mean and not 1 <= mean <= most:
        raise PlanError(f"--mean-experts is {mean:g}; allowed: 1 to {most}, what the router selects, or 0 for halfway")


def tokens_of(layer: LayerStatistics) -> Tensor:
    """The number of tokens that the layer's experts saw."""
    return layer["count"].sum() / layer.shape.top_k
