"""Compression methods: each file registers one, as a frozen dataclass of options that decides in two steps.

    score_experts(statistics, shape, weights) -> scored     once: reads statistics, and weights where the method declares it
    plan(scored, shape, amount) -> [LayerPlan]              for any amount from 0 (nothing) to 1 (most): cheap, reads nothing else

The search for a target calls `plan` some fifty times and `score_experts` once. What `scored` is, is the method's own. Every
method has `score_experts` and `plan`, and may have more:

    reads_weights    `score_experts` gets a reader of the experts' weights, one layer at a time (least squares, clustering)
    plan_for         a `TargetMethod` plans for a target itself: an integer program, a dynamic programme over bytes
    check            a `CheckedMethod` says of a model that it cannot do, before any work
    predicted        a `PredictingMethod` says what its plan is to cost the model
    explain          an `ExplainingMethod` says why its plan is what it is, for the plan's provenance
    corrected        a `CheckingMethod` plans again with what layers of its plan were measured to cost
    explore          a `SearchingMethod` tries removals on the live model; `locum search` writes what it finds to a file,
                     which `score_experts` then reads: one search serves any target

A method `saves` "stored" parameters, so that --remove or --fit says how many, or "bytes", where it puts parts into few bits itself
and both say how many bytes; or "active" parameters, "products" with weights that are zero, or "devices" that a token touches, which its
own options say. One that needs no statistics plans from a checkpoint's shape alone.

What a plan's slots mean in weights is the same for all methods. Other packages offer methods under the entry-point
group "locum.methods".
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from ..budgets.target import Target
from ..experts.weights import ExpertWeights
from ..plans.plan import LayerPlan
from ..registry import Registry, import_modules
from ..shapes import ModelShape
from ..stats.sums import Statistics

Scored = TypeVar("Scored")
Weights = Callable[[str], Callable[[int], ExpertWeights]]  # weights(layer)(e): expert e of one layer


class Method(Protocol[Scored]):
    """What the rest of Locum needs of a method. The decorator `method` sets the first five."""

    name: str
    paper: str
    saves: str
    reads_weights: bool
    published: Mapping[str, Any]

    def needs(self) -> tuple[str, ...]:
        """Statistics that scoring and building read."""
        ...

    def score_experts(self, statistics: Statistics | None, shape: ModelShape, weights: Weights | None = None) -> Scored:
        """Everything that plans are made from, whatever the amount. Called once.

        `statistics` is None where the method needs none and none are there, `weights` where it does not read them.
        """
        ...

    def plan(self, scored: Scored, shape: ModelShape, amount: float) -> list[LayerPlan]:
        """A plan for every layer. The same arguments give the same plan; `scored` is not changed."""
        ...


@runtime_checkable
class TargetMethod(Method[Scored], Protocol[Scored]):
    """A method that plans for a target itself; its `plan` then is for amounts that people ask for, not for a search."""

    def plan_for(self, scored: Scored, shape: ModelShape, target: Target) -> list[LayerPlan]:
        """The plan for a target (budgets/target.py). What it gives is checked against the target."""
        ...


@runtime_checkable
class SearchingMethod(Method[Scored], Protocol[Scored]):
    """A method that tries removals on the model."""

    searched_with: tuple[str, ...]  # options that the search reads; plans take them from what was searched
    seed: int  # of the search

    def explore(self, explorer: Explorer, progress: Callable[[str, int, int], None]) -> dict[str, dict[str, Tensor]]:
        """By layer and name, the values of the statistics that the search finds. The model may end up pruned.

        Of several ranks each has the model and calls this; all return the same. What is divided (ranks.py) they share.
        """
        ...


@runtime_checkable
class CheckedMethod(Method[Scored], Protocol[Scored]):
    """A method that cannot do every model, and says so before a model is loaded."""

    def check(self, shape: ModelShape) -> None:
        """Raises PlanError: what is too much, how much may be, and what to use instead."""
        ...


@runtime_checkable
class ExplainingMethod(Method[Scored], Protocol[Scored]):
    """A method whose plan says why."""

    def explain(self, scored: Scored, layers: Sequence[LayerPlan]) -> dict[str, Any]:
        """What becomes an entry of the plan's provenance under the method's name, in JSON."""
        ...


@runtime_checkable
class PredictingMethod(TargetMethod[Scored], Protocol[Scored]):
    """A method that knows what its plan is to cost, so that sizes can be compared before anything is made (`locum frontier`)."""

    def predicted(self, scored: Scored, layers: Sequence[LayerPlan]) -> float:
        """KL from the original in nats per token, as far as the method sees."""
        ...


@runtime_checkable
class CheckingMethod(PredictingMethod[Scored], ExplainingMethod[Scored], Protocol[Scored]):
    """A method whose plan is measured on the model and made again by what was found, in `compress` (stages/checking.py)."""

    checks: int  # how many plans may follow from the first one

    def predicted_by_layer(self, scored: Scored, layers: Sequence[LayerPlan]) -> list[float]:
        """What each layer of a plan is to cost, in nats per token."""
        ...

    def corrected(self, scored: Scored, factor_L: Sequence[float]) -> Scored:
        """The same where everything in a layer costs so many times as much."""
        ...


class Explorer(Protocol):
    """A live model on which removals and stand-ins can be tried; measure/removals.py has the real one. Letters: C candidates,
    E experts, L layers."""

    shape: ModelShape  # of the original model
    statistics: Statistics | None  # of the calibration before the search: what stand-ins are built from

    def output_error(self, layer: str, removed_CE: Tensor) -> Tensor:
        """[C] float64: ||F(X) - F_without(X)||_F over the cached tokens of that layer, the router re-run without the
        removed."""
        ...

    def loss_increase(self, layer: str, removed_CE: Tensor) -> Tensor:
        """[C] float64: mean next-token loss of the whole model without them, minus that of the full model, nats per
        token."""
        ...

    def loss_without(self, candidates: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """[C] float64: the same where each candidate maps any layers of the model to removed [E] bools."""
        ...

    def loss_merged(self, candidates: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """[C] float64: the same where each candidate maps any layers to weights [E, E]: the weights of expert e become the
        sum over i of weight[e, i] times those of expert i, and one whose row is zero is removed."""
        ...

    def block_error(self, candidates: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """[C] float64: each candidate maps the consecutive layers of one block to removed [E] bools; || hidden state
        after the block's last decoder layer, original minus pruned ||_F, attention, norms and residuals included, from
        the original input."""
        ...

    together: int  # how many plans `stand_ins` best tries at once

    def stand_ins(self, plans: Sequence[LayerPlan], with_losses: bool) -> tuple[Tensor, Tensor]:
        """For plans of one layer, float64: [C, E] of each expert sum g^2 |f(x) - f'(x)|^2 over the cached tokens that are routed to it,
        g its gate, f' what becomes of it by the plan; and [C] KL(model || model in which the layer is what the plan makes of it), the
        mean over the cached tokens, infinite where it is not asked for."""
        ...

    def divergences(self, variants: Sequence[Mapping[str, LayerPlan]]) -> Tensor:
        """[C] float64: the same KL where each variant maps any layers to what becomes of them."""
        ...

    def output_square(self, layer: str) -> Tensor:
        """A float64: the sum over the cached tokens of |y|^2, y what the layer's experts give together."""
        ...

    def noise_price(self, size: float) -> Tensor:
        """[L] float64: KL(model || model with noise in one layer's output), the mean over the cached tokens, divided by the sum of
        the noise's squares. The noise is normal and has this share of the output's size."""
        ...

    def prune(self, removed: Mapping[str, Tensor]) -> None:
        """Removes these experts from the live model for good and caches afresh; masks stay in the original numbering
        and from now on what was pruned counts as removed on both sides of every comparison."""
        ...


TARGETED = ("stored", "bytes")  # what a method may save that --remove and --fit ask for
SAVED = {
    "active": "active parameters",
    "devices": "devices that a token touches",
    "products": "products with zeros",
}  # and what its own options say
METHODS: Registry[type[Method]] = Registry("method", "locum.methods")


def method(
    name: str,
    paper: str,
    saves: str = "stored",
    reads_weights: bool = False,
    published: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[[type[Method]], type[Method]]:
    """Register a method under the name its paper gives it.

    It `saves` "stored" or "active" parameters, "bytes", "products" or "devices". One that `reads_weights` plans only where the checkpoint
    is at hand.
    Defaults of options are the best that is known; `published` are the paper's own values where those differ.
    """

    def register(cls: type[Method]) -> type[Method]:
        cls.name, cls.paper, cls.saves, cls.reads_weights, cls.published = name, paper, saves, reads_weights, published
        return METHODS.add(name, cls)

    return register


import_modules(sys.modules[__name__])
