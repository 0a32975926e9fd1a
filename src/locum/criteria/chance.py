"""The criterion that knows nothing: what every other has to beat."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from ..stats.sums import LayerStatistics
from .criterion import criterion


@criterion("random", paper="no paper (the baseline of any comparison)", needs=("count", "gate_sum"))
def random(layer: LayerStatistics) -> Tensor:
    """A number drawn for each expert: the baseline that a comparison of criteria has to show.

    S_e = sha256(layer's name, n_e, G_e) as a fraction of 2^64, 0 < S_e < 1;  G_e = sum_{t in T_e} g_t,e

    Units:    none; the draws are uniform and independent of how useful an expert is.
    Differs:  the seed is the statistics: other calibration text, or another --seed of `calibrate`, draws anew.
    """
    pairs = zip(layer["count"].tolist(), layer["gate_sum"].tolist(), strict=True)
    drawn = [_draw(f"{layer.shape.name} {count:.0f} {mass:.6e}") if count > 0 else mass for count, mass in pairs]
    return torch.tensor(drawn, dtype=torch.float64)


def _draw(text: str) -> float:
    """A number between 0 and 1 that a text stands for. NaN in the text is NaN in the number."""
    if "nan" in text.split():
        return math.nan
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") + 0.5) / 2**64
