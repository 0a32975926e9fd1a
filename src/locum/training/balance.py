"""Losses that keep the use of experts even (Switch Transformer, arXiv 2101.03961, Eq. 4-6, and two of its kin).

    L = E sum over experts of f_e P_e

f_e is how often tokens select expert e (it sums to K over the experts, so even use gives L = K), P_e the mean of its
router probability. transformers' functions of this name pool the layers before they multiply f and P, so an expert that one
layer neglects and another one overloads looks balanced there; here each layer is balanced by itself. Padding does not count.

    load_balance      f counts what the model's own router selects, as Mixtral's does, whether a routing policy lets it run or not;
                      behind group-local routing, what that selects: the balance loss of SAM (arXiv 2110.07431), summed over its K choices
    running_balance   f counts the experts that run, as in dynamic top-p routing (arXiv 2403.07652)
    p_penalty         f counts the experts that run, each times its width h_e in hidden units, so that narrow ones are used more
                      (HMoE, arXiv 2408.10681); with equal widths it is h times `running_balance`

Letters: T tokens, E experts, K top-k, M experts that may run.
"""

from __future__ import annotations

from torch import Tensor

from ..models.routing import Routed


def load_balance(routed: Routed, mask_T: Tensor) -> Tensor:
    """The loss of what is selected in one layer. `mask_T` is 1 for tokens that count and 0 for others."""
    return _balance(routed, routed.index_TK, mask_T)


def running_balance(routed: Routed, mask_T: Tensor) -> Tensor:
    """The loss of what runs in one layer. `mask_T` is 1 for tokens that count and 0 for others."""
    return _balance(routed, routed.runs_TM, mask_T)


def p_penalty(routed: Routed, mask_T: Tensor) -> Tensor:
    """The loss of the widths that run in one layer. `mask_T` is 1 for tokens that count and 0 for others."""
    return _balance(routed, routed.runs_TM, mask_T, routed.share_TE.new_tensor(routed.width_E))


def _balance(routed: Routed, index_TM: Tensor, mask_T: Tensor, weight_E: Tensor | float = 1.0) -> Tensor:
    share_TE, mask_T1 = routed.share_TE, mask_T.float()[:, None]
    tokens = mask_T1.sum().clamp(min=1)
    counts_TM = mask_T1 * (index_TM >= 0)
    counted_E = share_TE.new_zeros(share_TE.shape[1])
    counted_E = counted_E.index_add(0, index_TM.clamp(min=0).flatten(), counts_TM.flatten())
    return share_TE.shape[1] * (weight_E * (counted_E / tokens) * ((share_TE * mask_T1).sum(dim=0) / tokens)).sum()
