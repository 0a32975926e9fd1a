"""The entropy of routers as a loss (SEER-MoE, arXiv 2404.05089, its second stage): fewer experts then have to run.

Dynamic top-p routing (arXiv 2403.07652) lowers the same, with a weight of 1e-4, and so does HMoE's top-p form (arXiv 2408.10681) times
the number of experts; the sign that the latter prints would raise it.

    L = mean over tokens of  - sum over experts of P_e log P_e

P is the router's probability of each expert. A router that is sure of one expert for every token has 0, one that cannot tell them
apart log E. Lowered while a policy runs fewer of the selected experts than the model was trained with, it moves weight to
those that run. Padding does not count.

Letters: T tokens, E experts.
"""

from __future__ import annotations

from torch import Tensor

from ..models.routing import Routed


def router_entropy(routed: Routed, mask_T: Tensor) -> Tensor:
    """The loss of one layer, in nats. `mask_T` is 1 for tokens that count and 0 for others."""
    share_TE, mask_T = routed.share_TE, mask_T.float()
    floor = share_TE.new_tensor(1e-30)  # 0 log 0 is 0, and no gradient is infinite
    entropy_T = -(share_TE * share_TE.clamp(min=floor).log()).sum(dim=1)
    return (entropy_T * mask_T).sum() / mask_T.sum().clamp(min=1)
