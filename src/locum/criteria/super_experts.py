"""Super Experts: the few experts that make a model's massive activations. They are kept whatever a criterion says of them.

No score: experts of all layers are compared with one another. Letters: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..shapes import ModelShape
from ..stats.sums import Statistics

NEEDS = ("output_peak",)
QUANTILE = 0.995
OF_LARGEST = 0.1
MEDIANS = 10
DEPTH = 0.75


def super_experts(statistics: Statistics, shape: ModelShape) -> list[set[int]]:
    """The Super Experts of every layer. Raises StatisticsError for statistics without output_peak."""
    return find_super_experts([statistics.layer(layer.name)["output_peak"] for layer in shape.layers])


def find_super_experts(peak_LE: Sequence[Tensor]) -> list[set[int]]:
    """Experts whose largest output stands out of those of all experts of the model.

    peak_e > max( 99.5% quantile of all peaks, largest peak / 10, 10 * median peak ),  e in the first 75% of the layers

    Needs:    output_peak.
    Units:    hidden state.
    Edges:    no expert, in a model whose peaks are alike; one layer is always looked at.
    Source:   Super Experts, arXiv 2507.23279: quantile and tenth of the largest, in the layers where massive activations
              form; the three quarters are how REAP's code reads that. Differs: the median is ours. By the other two rules
              alone the loudest expert of any model is one, also where no activation is massive.
    """
    peaks = torch.cat([peak_E.double() for peak_E in peak_LE])
    least = max(float(peaks.quantile(QUANTILE)), OF_LARGEST * float(peaks.max()), MEDIANS * float(peaks.median()))
    deep = max(1, int(DEPTH * len(peak_LE)))
    found = [(peak_E > least).nonzero().flatten().tolist() for peak_E in peak_LE[:deep]]
    return [set(experts) for experts in found] + [set() for _ in peak_LE[deep:]]
