"""Criteria: one number per expert of a layer, higher means keep. Each is one function beside its formula.

    @criterion("my_score", paper="arXiv:NNNN.NNNNN", needs=("count", "output_norm"))
    def my_score(layer: LayerStatistics) -> Tensor: ...

is all it takes to add one: calibration then knows what to collect, and the conformance tests run over it.

In the formulas: t is a token, e an expert, T_e the tokens that selected e, n_e = |T_e|, g_t,e the gate that the model
multiplies the output with, f_e(x_t) the output before the gate. Letters: E experts, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import StatisticsError
from ..registry import Registry
from ..stats.sums import STATISTICS, LayerStatistics, output_variance


@dataclass(frozen=True)
class Criterion:
    """A named score. Calling it gives [E] float64, all finite; higher means keep."""

    name: str
    paper: str  # where its formula is from: an arXiv id, or a word on its origin
    needs: tuple[str, ...]  # names of statistics
    score: Callable[[LayerStatistics], Tensor]

    def __call__(self, layer: LayerStatistics) -> Tensor:
        score_E = self.score(layer)
        if not bool(score_E.isfinite().all()):
            expert = int((~score_E.isfinite()).nonzero()[0])
            raise StatisticsError(
                f"criterion {self.name!r} gives {float(score_E[expert])} for expert {expert} of layer {layer.shape.name}; "
                f"the model's outputs on the calibration data were not finite: check the checkpoint, or calibrate in "
                f"bfloat16 or float32 instead of float16"
            )
        return score_E


CRITERIA: Registry[Criterion] = Registry("criterion", entry_points="locum.criteria")


def criterion(name: str, paper: str, needs: tuple[str, ...]) -> Callable[[Callable], Callable]:
    """Register the function below as a criterion. Raises OptionError for a need that is not a statistic."""

    def register(score: Callable[[LayerStatistics], Tensor]) -> Callable[[LayerStatistics], Tensor]:
        CRITERIA.add(name, Criterion(name, paper, tuple(STATISTICS[need].name for need in needs), score))
        return score

    return register


def needs_of(names: Iterable[str]) -> tuple[str, ...]:
    """The statistics that these criteria read, each once."""
    return tuple(dict.fromkeys(need for name in names for need in CRITERIA[name].needs))


@criterion("frequency", paper="arXiv:2404.05089", needs=("count",))
def frequency(layer: LayerStatistics) -> Tensor:
    """How often an expert is selected: the baseline that every other criterion has to beat.

    S_e = n_e

    Needs:    count; routed tokens.
    Shapes:   returns (E,) float64.
    Units:    tokens; comparable within a layer, and across layers with equal top-k and number of experts.
    Order:    higher means keep.
    Edges:    a never-routed expert gets 0, the lowest value; equal counts tie.
    Raises:   StatisticsError if count was not collected.
    Cost:     E numbers per layer.
    Source:   SEER-MoE ("actual" heavy hitters), arXiv 2404.05089; the same as EUF of MC-Suite, arXiv 2504.05586.
              Differs: SEER-MoE also ranks over all layers at once; here a plan decides over which experts to rank.
    """
    return layer["count"].clone()


@criterion("gate", paper="arXiv:2603.12645", needs=("gate_sum",))
def gate(layer: LayerStatistics) -> Tensor:
    """The share of the layer's gate weight that went to an expert: LightMoE's importance score.

    S_e = G_e / sum_i G_i,  G_e = sum_{t in T_e} g_t,e

    Needs:    gate_sum; routed tokens.
    Shapes:   returns (E,) float64, at least 0, with sum 1 (all 0 without tokens).
    Units:    a fraction of the layer; comparable within a layer.
    Order:    higher means keep.
    Edges:    a never-routed expert gets 0, the lowest value; equal sums tie.
    Raises:   StatisticsError if gate_sum was not collected.
    Cost:     E numbers per layer.
    Source:   LightMoE, arXiv 2603.12645, Eq. 2. Differs: the paper does not say whether G(x) is masked to the selected
              experts. Here it is, as in the paper's Eq. 1; `gate_softmax` is the other reading. Without the division it
              is the soft frequency of REAP's code (weighted_expert_frequency_sum), with the same order.
    """
    return _share(layer["gate_sum"])


@criterion("gate_softmax", paper="arXiv:2404.05089", needs=("softmax_sum",))
def gate_softmax(layer: LayerStatistics) -> Tensor:
    """The share of the router's probability that went to an expert, whether it was selected or not.

    S_e = P_e / sum_i P_i,  P_e = sum_t softmax(logits_t)_e

    Needs:    softmax_sum; router logits of all tokens.
    Shapes:   returns (E,) float64, at least 0, with sum 1 (all 0 without tokens).
    Units:    a fraction of the layer; comparable within a layer.
    Order:    higher means keep.
    Edges:    a never-routed expert gets a positive value and can rank above a routed one; equal sums tie. For a sigmoid
              router this is not what the model computes; prefer `gate` there.
    Raises:   StatisticsError if softmax_sum was not collected.
    Cost:     E numbers per layer, one softmax over all experts per token.
    Source:   SEER-MoE ("soft" heavy hitters), arXiv 2404.05089; Expert Drop, arXiv 2406.02500; the unmasked reading of
              LightMoE's Eq. 2, arXiv 2603.12645. Differs: Expert Drop takes masked gates for DeepSeek.
    """
    return _share(layer["softmax_sum"])


@criterion("ean", paper="arXiv:2510.13999", needs=("output_norm",))
def ean(layer: LayerStatistics) -> Tensor:
    """Expert activation norm, over tokens: how much an expert says in total, before its gate.

    S_e = sum_{t in T_e} ||f_e(x_t)||_2

    Needs:    output_norm; routed tokens.
    Shapes:   returns (E,) float64.
    Units:    hidden-state L2 norm; comparable within a layer (norms grow with depth).
    Order:    higher means keep.
    Edges:    a never-routed expert gets 0, the lowest value; equal sums tie.
    Raises:   StatisticsError if output_norm was not collected.
    Cost:     E numbers per layer, one pass over expert outputs.
    Source:   "EAN" as REAP's paper and code (ean_sum) read it, arXiv 2510.13999. Differs: MC-Suite, which named it,
              takes norms along tokens instead; that reading is `ean_dims`. This one grows with n_e, that with sqrt(n_e).
    """
    return layer["output_norm"].clone()


@criterion("ean_dims", paper="arXiv:2504.05586", needs=("output_square",))
def ean_dims(layer: LayerStatistics) -> Tensor:
    """Expert activation norm, over dimensions: MC-Suite's own definition and its best criterion.

    S_e = sum_d sqrt( sum_{t in T_e} f_e(x_t)_d^2 )

    Needs:    output_square; routed tokens.
    Shapes:   returns (E,) float64.
    Units:    hidden-state value times sqrt(tokens); comparable within a layer.
    Order:    higher means keep.
    Edges:    a never-routed expert gets 0, the lowest value; equal sums tie.
    Raises:   StatisticsError if output_square was not collected.
    Cost:     E*D numbers per layer, one pass over expert outputs.
    Source:   Finding Fantastic Experts in MoEs (MC-Suite), arXiv 2504.05586, EAN, which drops the minimum. Differs: the
              paper re-estimates after every expert dropped and fine-tunes in between; this is one estimate. REAP's
              "EAN" is `ean`.
    """
    return layer["output_square"].clamp(min=0).sqrt().sum(dim=-1)


@criterion("reap", paper="arXiv:2510.13999", needs=("count", "gated_output_norm"))
def reap(layer: LayerStatistics) -> Tensor:
    """Router-weighted expert activation: how much an expert contributes whenever it is selected.

    S_e = (1 / n_e) sum_{t in T_e} g_t,e ||f_e(x_t)||_2

    Needs:    count, gated_output_norm; routed tokens.
    Shapes:   returns (E,) float64.
    Units:    hidden-state L2 norm; comparable within a layer (norms grow with depth).
    Order:    higher means keep.
    Edges:    a never-routed expert gets 0, the lowest value; a rare but strong one ranks high; equal means tie.
    Raises:   StatisticsError if a needed statistic was not collected.
    Cost:     2E numbers per layer, one pass over expert outputs.
    Source:   REAP, arXiv 2510.13999. Differs: its code multiplies with the full softmax unless told to renormalise;
              here g is the gate that the model itself uses, which the paper's formula says. The two agree where gates
              are neither renormalised nor scaled.
    """
    count_E = layer["count"]
    return torch.where(count_E > 0, layer["gated_output_norm"] / torch.where(count_E > 0, count_E, 1.0), 0.0)


@criterion("mone", paper="arXiv:2507.00390", needs=("count", "gate_sum", "output_square", "output_sum", "tokens"))
def mone(layer: LayerStatistics) -> Tensor:
    """How badly a constant would stand in for an expert: its gate weight times the spread of its outputs.

    S_e = (G_e / T) || sqrt( Var_{t in T_e} f_e(x_t) ) ||_2,  G_e = sum_{t in T_e} g_t,e, T all tokens, Var unbiased

    Needs:    count, gate_sum, output_sum, output_square, tokens; routed tokens, and the number of all.
    Shapes:   returns (E,) float64.
    Units:    hidden-state L2 norm; comparable within a layer.
    Order:    higher means keep; a low value marks an expert that its mean output replaces well.
    Edges:    0, the lowest value, for a never-routed expert, one with a single token and one whose output is constant;
              these tie.
    Raises:   StatisticsError if a needed statistic was not collected.
    Cost:     2E*D numbers per layer, two passes over expert outputs.
    Source:   MoNE, arXiv 2507.00390 (redundancy phi = phi_var * phi_freq). Differs: descriptions of the paper give
              phi_freq as the mean gate over the tokens that selected e; this follows the authors' code, which divides
              by all tokens, so that how often e is selected counts too.
    """
    total = torch.where(layer["tokens"] > 0, layer["tokens"], 1.0)
    return layer["gate_sum"] / total * output_variance(layer).sum(dim=-1).sqrt()


def _share(mass_E: Tensor) -> Tensor:
    total = mass_E.sum()
    return mass_E / torch.where(total > 0, total, 1.0)
