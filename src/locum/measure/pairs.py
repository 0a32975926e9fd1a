"""Several compressed models on the same blocks of text: what each has lost, and how sure their order is.

All of them saw the same tokens, so a difference between two is known better than either alone: blocks are drawn anew for all
together. So are seeds (of calibration), which every model has alike: a difference that changes with the seed is not sure.

Letters: B blocks, Y sums per block, C candidates, J seeds, X draws.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import kendalltau

from .loss import INTERVAL, SUMS

NATS, TOKENS, ORIGINAL, KL = (SUMS.index(name) for name in ("nats", "tokens", "original_nats", "kl"))
Value = tuple[float, float, float]  # with its 95% interval


@dataclass(frozen=True, eq=False)
class Draws:
    """Mean loss above the original's, in nats per token: of every candidate, and in every draw of blocks and seeds."""

    delta_CJ: np.ndarray
    drawn_XC: np.ndarray

    @property
    def delta_C(self) -> np.ndarray:
        return self.delta_CJ.mean(axis=1)

    def of(self, c: int) -> Value:
        """What candidate `c` has lost."""
        return (float(self.delta_C[c]), *interval(self.drawn_XC[:, c]))

    def between(self, c: int, other: int) -> Value:
        """How much more candidate `c` has lost than another; below 0 where it is the better one."""
        apart = float(self.delta_C[c] - self.delta_C[other])
        return (apart, *interval(self.drawn_XC[:, c] - self.drawn_XC[:, other]))

    def sure(self, c: int, other: int) -> float:
        """In which share of the draws candidate `c` has lost less than another."""
        return float((self.drawn_XC[:, c] < self.drawn_XC[:, other]).mean())

    def order_over_seeds(self) -> float | None:
        """Kendall's tau between the orders that two seeds give, the mean over pairs of seeds; None for one of either."""
        pairs = list(itertools.combinations(self.delta_CJ.T, 2))
        if not pairs or len(self.delta_CJ) < 2:
            return None
        return float(np.mean([kendalltau(one, two).statistic for one, two in pairs]))


def draw(sums_CJBY: Sequence[Sequence[np.ndarray]], seed: int = 0, resamples: int = 1000) -> Draws:
    """Losses and their draws from what `loss.block_sums` gave of every candidate with every seed, on the same blocks."""
    sums_CJBY = np.asarray(sums_CJBY)
    _, seeds, blocks, _ = sums_CJBY.shape
    lost_CJB = sums_CJBY[..., NATS] - sums_CJBY[..., ORIGINAL]
    tokens_B = sums_CJBY[0, 0, :, TOKENS]
    generator = np.random.default_rng(seed)
    counts_XB = generator.multinomial(blocks, np.full(blocks, 1 / blocks), size=resamples)
    share_XJ = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    each_CJX = lost_CJB @ counts_XB.T / np.maximum(counts_XB @ tokens_B, 1)
    return Draws(lost_CJB.sum(-1) / max(tokens_B.sum(), 1), np.einsum("cjx,xj->xc", each_CJX, share_XJ))


def interval(values_X: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values_X, INTERVAL)
    return float(low), float(high)


def mean_kl(sums_JBY: Sequence[np.ndarray]) -> float:
    """KL(original || model), nats per token, the mean over seeds."""
    return float(np.mean([sums_BY[:, KL].sum() / sums_BY[:, TOKENS].sum() for sums_BY in sums_JBY]))
