"""Criteria that read the norms of experts' outputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..stats.outliers import outside
from ..stats.sums import LayerStatistics
from .criterion import criterion

FAR = 3  # standard deviations from the mean (MC-Suite)
UNDECIDED = 0.85  # share of the largest entropy above which a router says little (MESA)


@criterion("ean", paper="arXiv 2510.13999 (REAP)", needs=("output_norm",))
def ean(layer: LayerStatistics) -> Tensor:
    """Expert activation norm, over tokens: how much an expert says in total, before its router weight.

    S_e = sum_{t in T_e} ||f_e(x_t)||_2

    Units:    hidden-state L2 norm; norms grow with depth. It grows with n_e, `ean_dims` with sqrt(n_e).
    Differs:  this is "EAN" as REAP's paper and code (ean_sum) read it. MC-Suite, arXiv 2504.05586, which named it, takes
              norms along tokens instead; that reading is `ean_dims`.
    """
    return layer["output_norm"].clone()


@criterion("ean_dims", paper="arXiv 2504.05586 (MC-Suite)", needs=("output_square",), reverse="ean_dims_max")
def ean_dims(layer: LayerStatistics) -> Tensor:
    """Expert activation norm, over dimensions: MC-Suite's own definition and its best criterion.

    S_e = sum_d sqrt( sum_{t in T_e} f_e(x_t)_d^2 )

    Units:    hidden-state value times sqrt(tokens).
    Cost:     E*D numbers per layer.
    Differs:  the paper estimates anew after every expert dropped and fine-tunes in between; this is one estimate.
              REAP's "EAN" is `ean`.
    """
    return layer["output_square"].clamp(min=0).sqrt().sum(dim=-1)


@criterion("eas", paper="arXiv 2504.05586 (MC-Suite)", needs=("output_cosine", "tokens"), reverse="eas_max")
def eas(layer: LayerStatistics) -> Tensor:
    """Expert activation similarity: experts whose outputs are least like those of the others go first.

    S_e = 1 + 1 / (E - 1) sum_{i != e} mean_t cos(f_e(x_t), f_i(x_t)), over all tokens

    Units:    a mean cosine, plus one.
    Edges:    knows nothing of routing; an expert whose outputs are all 0 gets 0.
    Cost:     every expert runs on every token.
    Differs:  the paper's sum of cosines without itself; a mean, plus one, has the same order and is not below 0. On which
              tokens, it does not say.
    """
    cosine_EE = layer["output_cosine"] / layer["tokens"].clamp(min=1)
    others_E = (cosine_EE.sum(dim=1) - cosine_EE.diagonal()) / max(1, len(cosine_EE) - 1)
    return torch.where(cosine_EE.diagonal() != 0, (1 + others_E).clamp(min=0), cosine_EE.diagonal())


@criterion(
    "eao",
    paper="arXiv 2504.05586 (MC-Suite)",
    needs=("count", "output_histogram", "output_square", "output_sum"),
    reverse="eao_max",
)
def eao(layer: LayerStatistics) -> Tensor:
    """Expert activation outliers: experts with few extreme outputs go first.

    S_e = number of f_e(x_t)_d, t in T_e and all d, outside of mean +- 3 std of them all, std unbiased

    Units:    numbers of outputs; it grows with n_e.
    Edges:    ties are common where tokens are few.
    Cost:     1024 numbers more per expert and layer; one more pass over outputs.
    Differs:  the paper does not say whether mean and std are of all outputs or of every dimension; here, as in `ego`, of all. They are
              exact, but outputs are counted in bins of 6% of their size: those of the two bins that are cut lie evenly in them.
    """
    numbers_E = layer["count"] * layer.shape.hidden_size
    mean_E = layer["output_sum"].sum(dim=1) / numbers_E.clamp(min=1)
    spread_E = (layer["output_square"].sum(dim=1) - numbers_E * mean_E.square()).clamp(min=0)
    far_E = FAR * (spread_E / (numbers_E - 1).clamp(min=1)).sqrt()
    found_E = outside(layer["output_histogram"], mean_E - far_E, mean_E + far_E)
    return torch.where(far_E.isnan(), far_E, found_E)


@criterion("man", paper="arXiv 2606.15716 (unified scoring)", needs=("count", "output_norm"))
def man(layer: LayerStatistics) -> Tensor:
    """Mean activation norm: how loud an expert is where it is selected, however often and with what weight that is.

    S_e = (1 / n_e) sum_{t in T_e} ||f_e(x_t)||_2

    Units:    hidden-state L2 norm; norms grow with depth.
    Edges:    a rare but loud expert ranks high.
    Differs:  nothing. "ean_mean" of REAP's code is the same.
    """
    return _per_token(layer["output_norm"], layer["count"])


@criterion("msan", paper="arXiv 2606.15716 (unified scoring)", needs=("count", "output_square"))
def msan(layer: LayerStatistics) -> Tensor:
    """Mean squared activation norm: as `man`, with more weight on an expert's loudest tokens.

    S_e = (1 / n_e) sum_{t in T_e} ||f_e(x_t)||_2^2

    Units:    hidden-state L2 norm squared.
    Edges:    a rare but loud expert ranks high.
    Cost:     E*D numbers per layer.
    """
    return _per_token(layer["output_square"].sum(dim=-1), layer["count"])


@criterion("weighted_ean", paper="arXiv 2504.06792 (EASY-EP)", needs=("gated_output_norm",))
def weighted_ean(layer: LayerStatistics) -> Tensor:
    """How much an expert contributed in total, after its router weight.

    S_e = sum_{t in T_e} g_t,e ||f_e(x_t)||_2

    Units:    hidden-state L2 norm; it is n_e times `reap`.
    Differs:  this is EASY-EP's expert importance alone (its ablation without the token term), and "weighted_ean_sum" of
              REAP's code; with the token term it is `easy_ep`.
    """
    return layer["gated_output_norm"].clone()


@criterion("easy_ep", paper="arXiv 2504.06792 (EASY-EP)", needs=("turned_output_norm",))
def easy_ep(layer: LayerStatistics) -> Tensor:
    """How much an expert contributed to tokens that the layer changes: output-aware importance times token contribution.

    S_e = sum_{t in T_e} g_t,e ||f_e(x_t)||_2 s_t,  s_t = max(0, 1 - cos(h_t, h_t + y_t)), h_t the residual stream in front of
    the layer, y_t what the routed experts add to it

    Units:    hidden-state L2 norm.
    Cost:     one cosine per token.
    Differs:  mixed domains: the paper divides each domain's scores by their sum first; here all tokens count alike.
    """
    return layer["turned_output_norm"].clone()


@criterion("reap", paper="arXiv 2510.13999 (REAP)", needs=("count", "gated_output_norm"))
def reap(layer: LayerStatistics) -> Tensor:
    """Router-weighted expert activation: how much an expert contributes whenever it is selected.

    S_e = (1 / n_e) sum_{t in T_e} g_t,e ||f_e(x_t)||_2

    Units:    hidden-state L2 norm; norms grow with depth.
    Edges:    a rare but strong expert ranks high.
    Differs:  REAP's code multiplies with the full softmax unless told to renormalise; here g is the router weight that
              the model itself uses, which the paper's formula says. The two agree where weights are neither
              renormalised nor scaled.
    """
    return _per_token(layer["gated_output_norm"], layer["count"])


@criterion("reap_renormalised", paper="arXiv 2510.13999 (REAP)", needs=("count", "renormalised_output_norm"))
def reap_renormalised(layer: LayerStatistics) -> Tensor:
    """REAP with router weights that add up to one for every token, whatever the model's own do.

    S_e = (1 / n_e) sum_{t in T_e} g_t,e / (sum_{j selected by t} g_t,j) ||f_e(x_t)||_2

    Units:    hidden-state L2 norm; norms grow with depth.
    Edges:    a rare but strong expert ranks high.
    Differs:  nothing: `renormalize_router_weights` of the authors' code. Where the model renormalises, it is `reap` (up to
              the constant that gates are scaled by).
    """
    return _per_token(layer["renormalised_output_norm"], layer["count"])


@criterion(
    "mesa",
    paper="arXiv 2609.04453 (MESA)",
    needs=("router_entropy", "tokens", "count", "output_norm", "gated_output_norm"),
)
def mesa(layer: LayerStatistics) -> Tensor:
    """What experts say without the router's weights where the router is undecided, and with them where it is not.

    S_e = man_e where H > 0.85 log E, else reap_e,  H = (1 / T) sum_t -sum_e p_t,e log p_t,e, p_t = softmax(logits_t)

    Units:    hidden-state L2 norm; norms grow with depth, and layers may be on either side of the rule.
    Edges:    a rare but loud expert ranks high.
    Cost:     one softmax over all experts per token.
    Differs:  the rule alone is MESA's: its summary says that routers whose entropy is above 85% of the largest gain by its score
              and others lose. The score itself could not be read; `man`, which leaves gates out, stands for it.
    """
    entropy = float(layer["router_entropy"] / layer["tokens"].clamp(min=1))
    without_gates_E, with_gates_E = man(layer), reap(layer)
    undecided = entropy > UNDECIDED * math.log(max(layer.shape.num_experts, 2))
    return without_gates_E if undecided else with_gates_E


def _per_token(total_E: Tensor, count_E: Tensor) -> Tensor:
    return torch.where(count_E > 0, total_E / torch.where(count_E > 0, count_E, 1.0), 0.0)
