"""What experts of a checkpoint were given in calibration, for exports that weigh numbers by it.

Letters: E experts, D model width, F expert width.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..checkpoints.read import fingerprint_checkpoint
from ..errors import StatisticsError
from ..experts.quantisers import QUANTISERS, layer_means, seen_by
from ..stats.statistics_file import load_statistics
from ..stats.sums import Statistics

NEEDS = QUANTISERS["gptq"].needs


class ExpertsSeen:
    """The mean Gram matrices of what goes into an expert and of its hidden units, with what it borrows (experts/quantisers.py)."""

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics
        self._layer = ""

    def __call__(self, layer: str, e: int) -> tuple[Tensor, Tensor]:
        """[D, D] and [F, F]."""
        input_EDD, hidden_EFF, count_E = self._read(layer)
        seen = seen_by({"up_FD": input_EDD[e], "down_DF": hidden_EFF[e]}, float(count_E[e]), *self._means)
        return seen["up_FD"], seen["down_DF"]

    def tokens(self, layer: str) -> Tensor:
        """How many each expert saw [E]."""
        return self.statistics.layer(layer)["count"]

    def _read(self, layer: str) -> list[Tensor]:
        if layer != self._layer:  # one layer's matrices are in memory
            of_layer = self.statistics.layer(layer)
            self._matrices, self._layer = [of_layer[need] for need in NEEDS], layer
            if not all(bool(matrix.isfinite().all()) for matrix in self._matrices):
                raise StatisticsError(
                    f"the Gram matrices of layer {layer} are not finite; calibrate in bfloat16 or float32 instead of float16"
                )
            self._means = layer_means(*self._matrices)
        return self._matrices


def experts_seen(path: Path, model: Path) -> ExpertsSeen:
    """From a statistics file of this very checkpoint. Raises StatisticsError for any other, and where it has no Gram matrices."""
    statistics = load_statistics(path)
    theirs, here = statistics.origin.model_fingerprint, fingerprint_checkpoint(model)
    if theirs != here:
        raise StatisticsError(
            f"statistics {path} belong to another checkpoint (fingerprint {theirs}) than {model} ({here}); calibrate this one"
        )
    for layer in statistics.shape.layers:
        if missing := [name for name in NEEDS if name not in statistics.layer(layer.name)]:
            raise StatisticsError(f"statistics {path} lack {', '.join(missing)}; calibrate without --no-gram")
    return ExpertsSeen(statistics)
