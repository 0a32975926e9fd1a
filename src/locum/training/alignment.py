"""The alignment loss of group-local routing (SAM, arXiv 2110.07431): what is chosen in few groups should be what is best of all.

    L = mean over tokens of the sum over experts j of groups that are closed to the token, of max(0, a_j - a_K)

a are the router's scores, a_K the least among the experts chosen. It is 0 where the choice in the open groups is the router's
own among all. Formula as in an independent implementation (PKU-DAIR/Hetu, SAMGate); the paper's text could not be read. A
layer without such a policy adds nothing. Padding does not count.

Letters: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from torch import Tensor

from ..experts.policies.group_local import GroupLocal
from ..experts.policies.in_turn import each_of
from ..experts.policies.policy import Policy
from ..models.routing import Routed


def grouping(policy: Policy | None) -> GroupLocal | None:
    """The policy itself, or the one of those in turn, that chooses in groups."""
    return next((each for each in each_of(policy) if isinstance(each, GroupLocal)), None)


def alignment(routed: Routed, mask_T: Tensor) -> Tensor:
    """The loss of one layer. `mask_T` is 1 for tokens that count and 0 for others."""
    policy = grouping(routed.policy)
    if policy is None:
        return routed.logits_TE.new_zeros((), dtype=mask_T.float().dtype)
    score_TE = policy.score(routed.logits_TE)
    least_T1 = score_TE.gather(1, routed.index_TK).amin(dim=1, keepdim=True)
    above_TE = (score_TE - least_T1).clamp(min=0).masked_fill(policy.is_open(score_TE), 0)
    return (above_TE.sum(dim=1) * mask_T.float()).sum() / mask_T.float().sum().clamp(min=1)
