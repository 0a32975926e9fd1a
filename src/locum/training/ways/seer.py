"""Train while fewer and fewer of the selected experts run, down to what a routing policy says."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from ...experts.policies.in_turn import InTurn, each_of
from ...experts.policies.main_with_vectors import MainWithVectors
from ...experts.policies.policy import Policy
from ...options import option
from ...plans.plan import Plan
from ...shapes import LayerShape
from ..adapters import (
    check_adapters,
    keep_size_option,
    open_adapters,
    rank_option,
    train_bases_option,
    with_adapters,
)
from ..context import Context
from ..routers import router_parameters
from . import Way, way


def running_at(step: int, steps: int, end_fraction: float, top_k: int, least: int) -> int:
    """How many experts run for a token at this step: from `top_k`, one fewer at a time, to `least` from step end_fraction * steps on."""
    end = end_fraction * steps
    return least if step >= end else top_k - math.floor((top_k - least) * step / end)


@way("seer", source="arXiv 2404.05089 (SEER-MoE), its second stage")
@dataclass(frozen=True)
class Seer(Way):
    """Train adapters and routers while the number of experts that run falls from the router's top-k to what the policy says.

        K(t) = K - floor((K - M) t / (f T))   up to step f T of T, then M;   loss = CE + lambda H

    K is the router's top-k, M the most that the layer's policy runs, f `end_fraction`, H the routers' entropy, lambda `--entropy`.

    Trained:  as by `lora`, and the routers of all MoE layers.
    Loss:     cross entropy of the next token, and with `--entropy` the routers' entropy.
    Edges:    while more run than the policy says, those with the largest weights run, and vectors wait. A validation before step
              f T is of no result.
    Raises:   OptionError where no layer has a routing policy, or for a rank above the smaller side of a layer's experts.
    Source:   SEER-MoE, arXiv 2404.05089. Differs: adapters sit on experts, in the checkpoint's own precision; its lambda is
              not known here, so that there is none unless it is given.
    """

    across_ranks: ClassVar[bool] = True
    rank: int = rank_option()
    train_bases: bool = train_bases_option()
    keep_size: bool = keep_size_option()
    end_fraction: float = option(
        0.5, "fraction of the steps after which no more experts run than the policy says", at_least=0, at_most=1
    )

    def objection(self, plan: Plan | None) -> str | None:
        if any(layer.routing for layer in (plan.layers if plan else ())):
            return None
        return (
            "lowers how many experts run to what a routing policy says, and no layer has one "
            "(--method compressed-experts --vectors none gives them one)"
        )

    def becomes(self, plan: Plan | None, layers: Iterable[LayerShape]) -> Plan | None:
        return with_adapters(plan, layers, self)

    def check(self, context: Context) -> None:
        check_adapters(context, self)

    def prepare(self, context: Context, start: int) -> None:
        open_adapters(context, self)
        for tensor in router_parameters(context.model):
            tensor.requires_grad_(True)

    def at_step(self, context: Context, step: int) -> dict[str, float]:
        most = 0
        for layer in context.layers:
            policy = layer.layout.routing
            if policy is not None:
                least = policy.most(layer.top_k)
                running = running_at(step, context.steps, self.end_fraction, layer.top_k, least)
                routing = _first(policy, running) if running > least else policy
                layer.container.layout = replace(layer.container.layout, routing=routing)
                most = max(most, running)
        return {"experts": most}

    def is_result(self, context: Context, step: int) -> bool:
        return step >= self.end_fraction * context.steps


def _first(policy: Policy, running: int) -> Policy:
    """So many experts with the largest weights, with weights as the policy makes them where it is of this kind. What is added beside
    experts stays."""
    alike = next((each for each in each_of(policy) if isinstance(each, MainWithVectors)), MainWithVectors(running))
    beside = tuple(each for each in each_of(policy) if each.only_adds)
    first = replace(alike, main=running, vectors="none")
    return InTurn((first, *beside)) if beside else first
