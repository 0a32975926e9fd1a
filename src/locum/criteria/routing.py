"""Criteria that read the router alone: how often, and with what weight, an expert is selected."""

from __future__ import annotations

import torch
from torch import Tensor

from ..stats.sums import LayerStatistics
from .criterion import criterion


@criterion("evtc", paper="arXiv 2504.05586 (MC-Suite)", needs=("token_count",), reverse="evtc_max")
def evtc(layer: LayerStatistics) -> Tensor:
    """Expert vocabulary coverage: experts that see few different tokens go first.

    S_e = (different tokens that selected e) / V,  V the vocabulary

    Units:    a fraction of the vocabulary.
    Cost:     E*V numbers per layer.
    """
    return layer["token_count"].clamp(max=1).mean(dim=1)


@criterion("frequency", paper="arXiv 2404.05089 (SEER-MoE)", needs=("count",), reverse="euf_max")
def frequency(layer: LayerStatistics) -> Tensor:
    """How often an expert is selected: the baseline that every other criterion has to beat.

    S_e = n_e

    Units:    tokens; comparable across layers too where top-k and the number of experts are equal.
    Differs:  SEER-MoE ("actual" heavy hitters) also ranks over all layers at once; here a plan decides over which
              experts to rank. EUF of MC-Suite, arXiv 2504.05586, is the same.
    """
    return layer["count"].clone()


@criterion("gate", paper="arXiv 2603.12645 (LightMoE)", needs=("gate_sum",))
def gate(layer: LayerStatistics) -> Tensor:
    """The share of the layer's router weight that went to an expert: LightMoE's importance score (Eq. 2).

    S_e = G_e / sum_i G_i,  G_e = sum_{t in T_e} g_t,e

    Units:    a fraction of the layer: at least 0, with sum 1 (all 0 without tokens).
    Differs:  the paper does not say whether G(x) is masked to the selected experts. Here it is, as in the paper's Eq. 1;
              `gate_softmax` is the other reading. Without the division it is the soft frequency of REAP's code
              (weighted_expert_frequency_sum), with the same order.
    """
    return _share(layer["gate_sum"])


@criterion("proficiency", paper="arXiv 2206.00277 (TSEP)", needs=("gate_sum",))
def proficiency(layer: LayerStatistics) -> Tensor:
    """The router weight that went to an expert, in equal shares of the layer: what task-specific expert pruning goes by.

    S_e = Z G_e / sum_i G_i,  G_e = sum_{t in T_e} g_t,e,  Z the experts that the layer has

    Units:    equal shares: 1 for every expert where all do the same (all 0 without tokens); comparable across layers.
    Differs:  TSEP drops, after each window of a fine-tuning, every expert below a share beta (its alpha score; the paper's text could
              not be read). Here the lowest over all layers go (--budget global), so that the amount says beta; windows are
              rounds (compress --rounds N --recover full), down to one expert of a layer with prune's --lower-top-k. Within a layer the order is that of `gate`.
    """
    return len(layer["gate_sum"]) * _share(layer["gate_sum"])


@criterion("gate_softmax", paper="arXiv 2404.05089 (SEER-MoE)", needs=("softmax_sum",))
def gate_softmax(layer: LayerStatistics) -> Tensor:
    """The share of the router's probability that went to an expert, whether it was selected or not.

    S_e = P_e / sum_i P_i,  P_e = sum_t softmax(logits_t)_e

    Units:    a fraction of the layer: at least 0, with sum 1 (all 0 without tokens).
    Edges:    a never-routed expert gets a positive value and can rank above a routed one. For a sigmoid router this is
              not what the model computes; prefer `gate` there.
    Cost:     one softmax over all experts per token.
    Differs:  SEER-MoE calls it "soft" heavy hitters. Expert Drop, arXiv 2406.02500, has it too, with masked weights for
              DeepSeek; it is the unmasked reading of LightMoE's Eq. 2, arXiv 2603.12645.
    """
    return _share(layer["softmax_sum"])


def _share(mass_E: Tensor) -> Tensor:
    total = mass_E.sum()
    return mass_E / torch.where(total > 0, total, 1.0)
