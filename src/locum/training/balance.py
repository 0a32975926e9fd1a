"""The load-balance loss of routers (Switch Transformer, arXiv 2101.03961, Eq. 4-6, as Mixtral's).

    L = E sum over experts of f_e P_e

f_e is how often tokens select expert e (it sums to K over the experts, so even use gives L = K), P_e the mean of its
router probability. What counts as selected is what the model's own router selects, all K of them, whether a routing policy
lets them run or not. transformers' functions of this name pool the layers before they multiply f and P, so an expert that one
layer neglects and another one overloads looks balanced there; here each layer is balanced by itself. Padding does not count.

Letters: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from torch import Tensor

from ..models.routing import Routed


def load_balance(routed: Routed, mask_T: Tensor) -> Tensor:
    """The loss of one layer. `mask_T` is 1 for tokens that count and 0 for others."""
    share_TE, mask_T1 = routed.share_TE, mask_T.float()[:, None]
    tokens = mask_T1.sum().clamp(min=1)
    selected_E = share_TE.new_zeros(share_TE.shape[1])
    selected_E = selected_E.index_add(0, routed.index_TK.flatten(), mask_T1.expand(routed.index_TK.shape).flatten())
    return share_TE.shape[1] * ((selected_E / tokens) * ((share_TE * mask_T1).sum(dim=0) / tokens)).sum()
