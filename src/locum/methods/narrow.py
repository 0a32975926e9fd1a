"""Narrow: experts lose their least important columns, so that experts of a layer differ in width.

Letters: E experts, F expert width, X blocks of an expert's columns, the best block first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..budgets.ranks import rank_step
from ..experts.columns import COLUMNS
from ..experts.parts.narrowed import Narrowed
from ..options import option
from ..plans.plan import KEPT, LayerPlan, Slot
from ..shapes import LayerShape, ModelShape
from ..stats.sums import Statistics
from . import Weights, method

BUDGETS = ("layer", "global", "expert")


@method("narrow", paper="arXiv 2508.02322 (CAMERA)")
@dataclass(frozen=True)
class Narrow:
    """Cut the columns that matter least out of every expert: numbers of its hidden state, rows of gate and up, columns of down.

    1. An expert's columns are sorted by their score, and taken in blocks of `multiple`.
    2. The blocks with the smallest sums go: of every layer the same share (CAMERA), with `budget="global"` of the whole model
       (HEAPr), with `budget="expert"` of every expert, so that all have one width and `locum export --to stock` can make a
       stock checkpoint of narrower experts.
    What is left of an expert computes what the whole one does with the other columns at zero. The router is untouched.

    Needs:    the statistics of columns that the score of columns reads: of CAMERA one pass, of HEAPr a backward pass too.
    Edges:    no expert goes below `minimum`; a never-routed one comes down to it first. A block at the end of a width that is no
              multiple is smaller.
    Source:   CAMERA-P, arXiv 2508.02322, and HEAPr, arXiv 2509.22299. Differs: whole blocks go, where the papers rank single
              columns (`multiple=1`); columns are cut out, where CAMERA's code sets them to zero; every expert keeps some.
    """

    columns: str = option("camera", "whose score columns have; heapr needs gradients", choices=COLUMNS)
    budget: str = option(
        "layer", "what gives up the same share: layer, expert, or the model as a whole", choices=BUDGETS
    )
    minimum: int = option(1, "smallest width of an expert, rounded up to the multiple", at_least=1)
    multiple: int = option(32, "what widths are multiples of; halved for small weights", at_least=1)

    def needs(self) -> tuple[str, ...]:
        return COLUMNS[self.columns].needs

    def score_experts(
        self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None
    ) -> tuple[Tensor, ...]:
        """[E, X] of every layer: the sums of its experts' blocks."""
        scores = COLUMNS[self.columns].scores
        return tuple(
            _blocks(scores(statistics.layer(layer.name)), rank_step(layer, self.multiple)) for layer in shape.layers
        )

    def plan(self, scored: Sequence[Tensor], shape: ModelShape, amount: float) -> list[LayerPlan]:
        steps = [rank_step(layer, self.multiple) for layer in shape.layers]
        free = [block_EX[:, -(-self.minimum // step) :] for block_EX, step in zip(scored, steps, strict=True)]
        pools = [free] if self.budget == "global" else [[block_EX] for block_EX in free]
        if self.budget == "expert":
            lost_L = [torch.full((len(x),), int(amount * x.shape[1] + 1e-9)) for x in free]
        else:
            lost_L = [lost_E for pool in pools for lost_E in _lost(pool, amount)]
        layers = zip(shape.layers, scored, lost_L, steps, strict=True)
        return [
            LayerPlan(layer.name, tuple(self._slot(layer, block_EX.shape[1] - n, step) for n in lost_E.tolist()))
            for layer, block_EX, lost_E, step in layers
        ]

    def _slot(self, layer: LayerShape, blocks: int, step: int) -> Slot:
        width = blocks * step
        return KEPT if width >= layer.expert_width else Slot((Narrowed(width, self.columns),))


def _blocks(score_EF: Tensor, step: int) -> Tensor:
    """[E, X] the sums of every expert's columns, best first, `step` at a time."""
    sorted_EF = score_EF.sort(dim=1, descending=True).values
    return torch.stack([block.sum(dim=1) for block in sorted_EF.split(step, dim=1)], dim=1)


def _lost(pool: Sequence[Tensor], amount: float) -> list[Tensor]:
    """[E] of every layer of a pool: how many blocks each expert loses, where the lowest sums of the pool go.

    An expert's sums fall, so those that go are its last ones. Of equal sums, those of the lower layer and index go.
    """
    value = torch.cat([block_EX.reshape(-1) for block_EX in pool])
    gone = torch.zeros_like(value, dtype=torch.bool)
    gone[value.sort(stable=True).indices[: int(amount * len(value) + 1e-9)]] = True
    parts = gone.split([block_EX.numel() for block_EX in pool])
    return [part.view(block_EX.shape).sum(dim=1) for part, block_EX in zip(parts, pool, strict=True)]
