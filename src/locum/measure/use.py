"""How a live model uses its experts on text: how often each is selected, with what weights, and how sure its routers are.

Read off by hooks in forward passes, so that compressed layers are seen as stock ones are. Padding does not count.

Letters: B blocks, S tokens of a block, T tokens, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.families import MoeLayer
from ..models.routing import Routed, watched


@dataclass(frozen=True, eq=False)
class Use:
    """How one layer uses its experts. Sums over tokens, in float64 on the CPU."""

    tokens: int
    top_k: int
    count_E: Tensor  # tokens that selected an expert
    gate_E: Tensor  # the weights that they gave its outputs
    entropy: float = 0.0  # of the router's probabilities, nats, summed over tokens
    active: float = 0.0  # parameters of the experts that ran, summed over tokens

    def __add__(self, other: Use) -> Use:
        sums = (getattr(self, name) + getattr(other, name) for name in ("count_E", "gate_E", "entropy", "active"))
        return Use(self.tokens + other.tokens, self.top_k, *sums)

    @property
    def dead(self) -> int:
        """Experts that no token selected."""
        return int((self.count_E == 0).sum())

    @property
    def router_entropy(self) -> float:
        """The mean entropy of the router's probabilities, as a share of the most that there can be."""
        most = max(self.tokens, 1) * float(torch.tensor(float(len(self.count_E))).log())
        return self.entropy / most if most else 1.0

    @property
    def spread(self) -> float:
        """How many experts would share the work evenly if it were spread no wider, as a share of all: the exponential of the
        entropy of the counts, over E. 1 where all are used alike, 1 / E where one does everything, 0 without tokens."""
        share_E = self.count_E / self.count_E.sum().clamp(min=1)
        used_E = share_E[share_E > 0]
        return float((-(used_E * used_E.log()).sum()).exp()) / len(self.count_E) if len(used_E) else 0.0


def in_short(uses: Mapping[str, Use]) -> dict[str, float]:
    """What to report of a model's use: experts that no token selected, of how many; the least spread of a layer; the mean router
    entropy; the parameters of experts that ran for a token, which differ where experts differ in width, or tokens in their number."""
    return {
        "experts": sum(len(use.count_E) for use in uses.values()),
        "dead_experts": sum(use.dead for use in uses.values()),
        "least_spread": round(min(use.spread for use in uses.values()), 4),
        "router_entropy": round(sum(use.router_entropy for use in uses.values()) / len(uses), 4),
        "active_expert_parameters": round(sum(use.active / max(use.tokens, 1) for use in uses.values())),
        "tokens": next(iter(uses.values())).tokens,
    }


@torch.no_grad()
def uses_of(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Use]:
    """The use of every MoE layer over these batches of token ids and attention [B, S], by the layer's name."""
    found: dict[str, Use] = {}
    device = next(model.parameters()).device
    with watched(model) as routing:
        for ids_BS, attention_BS in batches:
            attention_BS = attention_BS.to(device)
            model.base_model(input_ids=ids_BS.to(device), attention_mask=attention_BS, use_cache=False)
            for layer in routing.layers:
                use = _use(routing.of(layer), attention_BS.reshape(-1) != 0, _sizes(layer))
                name = layer.shape.name
                found[name] = found[name] + use if name in found else use
    return found


def _sizes(layer: MoeLayer) -> tuple[int, ...]:
    """Parameters of every expert."""
    layout = getattr(layer.experts, "layout", None)
    return layout.expert_parameters if layout else (layer.shape.parameters(),) * layer.shape.num_experts


def _use(routed: Routed, keep_T: Tensor, sizes: tuple[int, ...]) -> Use:
    """Added up on the CPU, where the order of sums is always the same."""
    keep_T = keep_T.to(routed.index_TK.device)
    index_TK, weight_TK = routed.index_TK[keep_T].cpu(), routed.weight_TK[keep_T].double().cpu()
    share_TE = routed.share_TE[keep_T.to(routed.logits_TE.device)].double().cpu()
    zeros_E = torch.zeros(share_TE.shape[1], dtype=torch.float64)
    runs = index_TK >= 0
    count_E = zeros_E.index_add(0, index_TK[runs], torch.ones_like(weight_TK)[runs])
    gate_E = zeros_E.index_add(0, index_TK[runs], weight_TK[runs])
    entropy = -float((share_TE * share_TE.clamp(min=1e-300).log()).sum())
    running = routed.runs_TM[keep_T.to(routed.runs_TM.device)].cpu()
    active = float(torch.tensor(sizes, dtype=torch.float64)[running[running >= 0]].sum())
    return Use(len(index_TK), index_TK.shape[1], count_E, gate_E, entropy, active)
