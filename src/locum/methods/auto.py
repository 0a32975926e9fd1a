"""Auto: every expert becomes what costs the model least, all operations under one budget of bytes.

Ranks that have met share the layers.

Letters: L layers, E experts, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .. import ranks
from ..budgets.candidates import KINDS, Candidate, candidates
from ..budgets.choosing import Choices, Chosen, choose, choose_alike
from ..budgets.counts import spare
from ..budgets.guards import cost_of, with_floors, without_dead_ends
from ..budgets.serving import SERVES, Serving, most_alike
from ..budgets.sets import removed_mask
from ..budgets.target import Target
from ..criteria import super_experts
from ..errors import OptionError, StatisticsError, unknown
from ..experts.parts.shared_base import SharedBase
from ..options import option
from ..plans.layer_plan import Base, LayerPlan, Slot
from ..shapes import LayerShape, ModelShape
from ..stats.stand_ins import CANDIDATES
from ..stats.sums import LayerStatistics, Statistics
from . import Explorer, Weights, method

COSTS = ("measured", "shuffled", "random")
LEAST = 0.5  # of the price of noise: what hardly costs anything is lost in rounding
PROTECTED_BITS = ("", "int8-g32", "int4-g32")  # in which the weights of a Super Expert may be


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's candidates, what they cost in nats per token, and their bytes."""

    candidates: Sequence[Candidate]
    choices: Choices
    share: Mapping[str, np.ndarray]  # by domain [E]: nats per token of it for a unit of each expert's cost


@method("auto", paper="no paper (all operations under one budget)", saves="bytes")
@dataclass(frozen=True)
class Auto:
    """Give every expert of every layer what costs the model least: its weights in 8 to 2 bits, fewer columns, low rank or a base with an
    adapter in 4 bits, a constant, nothing, or no place at all, so that all of them together fit the bytes.

    min over choices c_e of sum_l sum_e p_l,c_e error(e, c_e)  with  sum_l sum_e bytes(c_e) + bases <= budget

    1. Sweep: every candidate of every expert is built from the Gram matrices, as a plan would have it, and run on the sample:
       error(e, c) = sum over tokens routed to e of g^2 |f_e(x) - f'_e(x)|^2; of a dropped expert what the layer's output loses when the
       router chooses others (`candidate_error`). As a share of what the expert gives in the sample, sum g^2 |f_e(x)|^2, it is known
       well; what the expert gives is taken from all of calibration, or chance would choose.
    2. Prices: the loss of the model where all experts of a layer are a candidate (`candidate_loss`) says what a unit of that candidate's
       errors costs there, in nats. Errors of rounding cost what noise of their size costs (`error_price`, `--price noise`, which needs
       one pass for a layer); those of low rank and fewer columns cost two or three times as much, as they are alike for all experts
       of a token.
       A tenth (`--prior`) of what experts give and lose is that of the layer's mean expert. Without it, what calibration used little is made
       so small that other text loses several times as much.
    3. Choice: Lagrange multipliers, then what room is left is filled (budgets/choosing.py). Bases are an expert's own rows, which then cost
       nothing more, or a mean, in 4 bits: one for all experts of a layer, or one for each group of near-copies (budgets/medoids.py), as
       far as they pay.
       What runs without Locum (`--serves any`, `llamacpp`) has equally many whole experts in every layer: each number is tried.
    4. Check, in `compress` (stages/checking.py): the model that the plan makes, and the same with each layer as it was, on validation text.
       Where a layer costs more or less than predicted, the choice is made again; the better plan stays.
    Steps 1 and 2 are the search (`locum search`), also of a model that is streamed; one serves any size. The plan's provenance says of every expert what it costs, and
    what the next smaller and larger candidates would have.

    Needs:    candidate_error, candidate_loss and error_price, from a search; gated_norm_product; what its candidates are built from:
              input_gram, hidden_gram, count, output_sum, weight_product and the columns of CAMERA; output_peak, by which Super Experts are found.
    Edges:    never below top-k; nothing is dropped from group-limited routers, or where it is refused. Super Experts keep own weights, in
              4 bits at least; fewer experts than top-k of a layer become nothing, so that no token is left with nothing at all.
              `--remove` is a share of the experts' bytes. Of a quantised checkpoint nothing gets fewer bits.
    Source:   not from a paper. What the choice of each expert does to others is not seen: costs add up.
    """

    searched_with: ClassVar = ("price", "noise", "seed")

    price: str = option(
        "candidates",
        "what says how much errors cost: a layer that becomes all of a candidate, noise in its output, or its output alone",
        choices=("candidates", "noise", "output"),
    )
    noise: float = option(0.1, "size of the noise, as a share of the layer's output", above=0, at_most=1)
    seed: int = option(0, "seed of the search: the sample, and the noise", at_least=0)
    only: str = option(
        "all", f"kinds to choose from, separated by commas, of {', '.join(KINDS)}; a search tries these alone"
    )
    serves: str = option(
        "transformers",
        "engine that is to run the result, which says what experts can become: transformers or vllm with Locum beside it, llamacpp "
        "(whole experts in 16, 8 or 4 bits, one number of them for all layers), any engine without Locum (the same in 16 bits)",
        choices=tuple(SERVES),
    )
    protect: bool = option(
        True,
        "keep the weights of Super Experts, which make massive activations, and leave every token an expert that gives something",
    )
    protect_domains: str = option(
        None,
        "domains of calibration, separated by commas, that must lose at most a quarter more than they would lose at best",
        kind=str,
    )
    prior: float = option(
        0.1,
        "share of what experts give and lose that is taken as alike for all of a layer: other text than calibration's uses other experts",
        at_least=0,
        at_most=1,
    )
    checks: int = option(
        2,
        "in compress: how many times the plan is measured on the model, on validation text, and bytes shift between layers where that "
        "lowers the KL there",
        at_least=0,
        at_most=8,
    )
    costs: str = option("measured", "for comparison: costs of other experts, or of chance", choices=COSTS)
    draw: int = option(0, "seed of costs that are shuffled or random", at_least=0)

    def needs(self) -> tuple[str, ...]:
        built_from = ("gated_norm_product", "input_gram", "hidden_gram", "count", "output_sum", "weight_product")
        columns = ("gated_hidden_square", "gated_hidden_peak", "down_column_square")
        protecting = super_experts.NEEDS if self.protect else ()
        for kind in self.kinds:
            if kind not in KINDS:
                raise OptionError(unknown("kind for --only", kind, KINDS))
        return ("candidate_error", "candidate_loss", "error_price", *built_from, *columns, *protecting)

    @property
    def kinds(self) -> tuple[str, ...]:
        return KINDS if self.only == "all" else tuple(word.strip() for word in self.only.split(","))

    @property
    def _serving(self) -> Serving:
        return SERVES[self.serves]

    def _tried(self, candidate: Candidate) -> bool:
        return candidate.kind in self.kinds and self._serving.allows(candidate.kind, candidate.plan.slots[0])

    # --- the search

    def explore(self, explorer: Explorer, progress: Callable[[str, int, int], None]) -> dict[str, dict[str, Tensor]]:
        """`candidate_error` and `error_price` of every layer. The model stays as it is."""
        layers = explorer.shape.layers

        def of_layer(index: int) -> Tensor:
            found_XC = _errors(explorer, layers[index], self._tried, self.price == "candidates")
            progress("candidates", index + 1, len(layers))
            return found_XC

        if self.price == "output":
            square_L = torch.stack([explorer.output_square(layer.name) for layer in layers])
            price_L = torch.where(square_L > 0, 1 / square_L, 0.0)
        else:
            price_L = explorer.noise_price(self.noise)
        progress("prices", len(layers), len(layers))
        found_L = ranks.divide(range(len(layers)), of_layer)
        return {
            layer.name: {"candidate_error": found_XC[:-1], "candidate_loss": found_XC[-1], "error_price": price}
            for layer, found_XC, price in zip(layers, found_L, price_L, strict=True)
        }

    # --- the plan

    def score_experts(
        self, statistics: Statistics, shape: ModelShape, weights: Weights | None = None
    ) -> tuple[Layer, ...]:
        found = [statistics.layer(layer.name) for layer in shape.layers]
        for name in self._protected:
            if name not in statistics.domains:
                raise OptionError(unknown("domain for --protect-domains", name, statistics.domains))
        pairs = zip(shape.layers, found, strict=True)
        cost_L = self._compared(shape, [_costs(layer, x, self.prior) for layer, x in pairs])
        kept = super_experts.super_experts(statistics, shape) if self.protect else [set()] * len(found)
        layers = zip(shape.layers, found, cost_L, kept, strict=True)
        return tuple(self._layer(layer, shape, x, *rest, _shares(statistics, layer)) for layer, x, *rest in layers)

    @property
    def _protected(self) -> tuple[str, ...]:
        return tuple(word.strip() for word in (self.protect_domains or "").split(",") if word.strip())

    def _layer(
        self,
        layer: LayerShape,
        shape: ModelShape,
        statistics: LayerStatistics,
        cost_EC: np.ndarray,
        protected: set[int],
        share: Mapping[str, np.ndarray],
    ) -> Layer:
        found = candidates(layer, statistics)
        cost_EC = cost_EC.copy()
        for c, candidate in enumerate(found):
            if candidate.plan is None or not self._tried(candidate):
                cost_EC[:, c] = np.inf
            elif not _keeps_weights(candidate.plan.slots[0]):
                cost_EC[sorted(protected), c] = np.inf
        gone_C = np.array([candidate.kind == "drop" for candidate in found])
        if not np.isfinite(cost_EC[:, ~gone_C]).any(1).all():
            raise OptionError(
                f"--only {self.only} with --serves {self.serves} leaves an expert of {layer.name} nothing that it can become, or "
                f"that was searched; name keep too"
            )
        plans = [c.plan for c in found]
        sets = list(dict.fromkeys(plan.bases for plan in plans if plan is not None and plan.bases))
        things = [(bases, index) for bases in sets for index in range(len(bases))]
        shared_EC = np.full(cost_EC.shape, -1)
        size_of: dict[tuple[Base, ...], int] = {}
        for c, plan in enumerate(plans):
            if plan is not None and plan.bases:
                size_of[plan.bases] = _base_bytes(plan, layer, shape)
                shared_EC[:, c] = [things.index((plan.bases, slot.base)) for slot in plan.slots]
        choices = Choices(
            cost_EC,
            np.array([0.0 if plan is None else _bytes(plan, layer, shape) for plan in plans]),
            shared_EC,
            np.array([size_of[bases] for bases, _ in things]),
            np.array([sets.index(bases) for bases, _ in things]),
            gone_C,
            spare(layer) if layer.num_groups == 1 else 0,
        )
        return Layer(found, choices, share)

    def _compared(self, shape: ModelShape, cost_L: list[np.ndarray]) -> list[np.ndarray]:
        """The costs, or for comparison those of other experts, or of chance; experts of layers of one size change places."""
        if self.costs == "measured":
            return cost_L
        draw, made = np.random.default_rng(self.draw), list(cost_L)
        if self.costs == "random":
            return [np.where(np.isfinite(cost_EC), draw.random(cost_EC.shape), np.inf) for cost_EC in cost_L]
        sizes = [(layer.hidden_size, layer.expert_width, layer.num_experts) for layer in shape.layers]
        for size in dict.fromkeys(sizes):
            places = [i for i, other in enumerate(sizes) if other == size]
            mixed = draw.permutation(np.concatenate([cost_L[i] for i in places]))
            for i, part_EC in zip(places, np.split(mixed, len(places)), strict=True):
                made[i] = part_EC
        return made

    def plan(self, scored: tuple[Layer, ...], shape: ModelShape, amount: float) -> list[LayerPlan]:
        """`amount` goes from the bytes of all experts to the fewest that there can be."""
        least = self._choose(scored, shape, -float("inf")).bytes
        most = max(float(shape.bytes_of_experts), least)
        return self._plans(scored, shape, self._choose(scored, shape, most + amount * (least - most)))

    def plan_for(self, scored: tuple[Layer, ...], shape: ModelShape, target: Target) -> list[LayerPlan]:
        budget = shape.bytes_of_experts - target.saving(shape)
        return self._plans(scored, shape, self._choose(scored, shape, budget))

    def _choose(self, scored: tuple[Layer, ...], shape: ModelShape, budget: float) -> Chosen:
        beside = (shape.aside.left_bytes, shape.aside.expert_bytes) if self.serves == "any" else (0.0, 0.0)

        def pick(layers: Sequence[Choices]) -> Chosen:
            if self._serving.is_alike:
                return choose_alike(layers, budget, most_alike(shape), beside)
            return choose(layers, budget)

        if self.protect:
            nothing = [candidate.kind for candidate in scored[0].candidates].index("nothing")
            pick = without_dead_ends(pick, nothing, [layer.top_k - 1 for layer in shape.layers])
        pick = with_floors(pick, [layer.share for layer in scored], self._protected)
        return pick([layer.choices for layer in scored])

    def _plans(self, scored: tuple[Layer, ...], shape: ModelShape, chosen: Chosen) -> list[LayerPlan]:
        plans = []
        for layer, scores, choice in zip(shape.layers, scored, chosen.layers, strict=True):
            found = [scores.candidates[c].plan for c in choice.candidate_E]
            slots = [_named(plan.slots[e], plan.bases) for e, plan in enumerate(found)]
            used = tuple(dict.fromkeys(base for _, base in slots if base is not None))
            of_base = [slot if base is None else slot.on_base(used.index(base)) for slot, base in slots]
            plans.append(LayerPlan(layer.name, tuple(of_base), used))
        return plans

    def predicted(self, scored: tuple[Layer, ...], layers: Sequence[LayerPlan]) -> float:
        return sum(self.predicted_by_layer(scored, layers))

    def predicted_by_layer(self, scored: tuple[Layer, ...], layers: Sequence[LayerPlan]) -> list[float]:
        return [float(cost_of(x.choices, _chosen(x, plan)).sum()) for x, plan in zip(scored, layers, strict=True)]

    def corrected(self, scored: tuple[Layer, ...], factor_L: Sequence[float]) -> tuple[Layer, ...]:
        pairs = zip(scored, factor_L, strict=True)
        return tuple(replace(x, choices=replace(x.choices, cost_EC=x.choices.cost_EC * f)) for x, f in pairs)

    def explain(self, scored: tuple[Layer, ...], layers: Sequence[LayerPlan]) -> dict[str, Any]:
        """For a plan's provenance: what it is to cost, and of every expert what it became and what was next to it."""
        said, of_domains = {}, dict.fromkeys(scored[0].share, 0.0)
        for scores, plan in zip(scored, layers, strict=True):
            candidate_E = _chosen(scores, plan)
            cost_E = cost_of(scores.choices, candidate_E)
            of_domains = {name: of_domains[name] + float((cost_E * scores.share[name]).sum()) for name in of_domains}
            said[plan.layer] = [_reasons(scores, e, c) for e, c in enumerate(candidate_E.tolist())]
        return {
            "predicted_kl": self.predicted(scored, layers),
            "predicted_kl_by_domain": of_domains,
            "experts": said,
        }


def _costs(layer: LayerShape, found: LayerStatistics, prior: float) -> np.ndarray:
    """[E, C] in nats per token: the price of each error, where an expert gives what it gave in all of calibration.

    A share `prior` of all errors and of all that is given is that of the layer's mean expert: calibration saw few tokens of a rare expert, and
    other text may need it more. One that the sample never selects, without a prior, loses the share that the layer's experts lose on average.
    """
    kinds = [candidate.kind for candidate in candidates(layer, found)]
    error_EC = _mixed(found["candidate_error"].numpy()[:, : len(kinds)], prior)
    sample_E = error_EC[:, kinds.index("nothing")]
    given_E = _mixed(found["gated_norm_product"].diagonal().numpy(), prior)
    whole = max(float(sample_E.sum()), 1e-300)
    mean_C = error_EC.sum(0) / whole
    lost_EC = np.where((sample_E > 0)[:, None], error_EC / np.where(sample_E > 0, sample_E, 1)[:, None], mean_C)
    scale_E = whole * given_E / max(float(given_E.sum()), 1e-300)
    is_known_EC = np.isfinite(lost_EC)
    return np.where(is_known_EC, np.where(is_known_EC, lost_EC, 0) * scale_E[:, None] * _prices(found, kinds), np.inf)


def _mixed(of_E: np.ndarray, prior: float) -> np.ndarray:
    """What each expert has, a share of it that of the mean expert."""
    return of_E if prior == 0 else (1 - prior) * of_E + prior * of_E.mean(0)


def _prices(found: LayerStatistics, kinds: Sequence[str]) -> np.ndarray:
    """[C] in nats per token and unit of error: what a layer that becomes all of a candidate costs, or noise where that was not
    measured. Of dropping it is the price of nothing: both take away what an expert gives."""
    noise, loss_C = float(found["error_price"]), found["candidate_loss"].numpy()
    total_C = found["candidate_error"].numpy().sum(0)
    is_known_C = np.isfinite(loss_C) & np.isfinite(total_C) & (total_C > 0)
    price_C = np.where(is_known_C, np.where(is_known_C, loss_C, 0) / np.where(is_known_C, total_C, 1), noise)
    price_C = np.maximum(price_C, LEAST * noise)
    price_C[kinds.index("drop")] = price_C[kinds.index("nothing")]
    return price_C[: len(kinds)]


def _shares(statistics: Statistics, layer: LayerShape) -> dict[str, np.ndarray]:
    """By domain [E]: what an expert gives a token of it, beside what it gives a token of all text."""
    given_ZE = statistics.layers[layer.name]["gated_norm_product"].diagonal(dim1=1, dim2=2).numpy()
    tokens_Z1 = np.maximum(statistics.layers[layer.name]["count"].sum(1, keepdim=True).numpy() / layer.top_k, 1)
    mean_E = given_ZE.sum(0) / tokens_Z1.sum()
    return dict(zip(statistics.domains, given_ZE / tokens_Z1 / np.where(mean_E > 0, mean_E, 1), strict=True))


def _errors(explorer: Explorer, layer: LayerShape, is_tried: Callable[[Candidate], bool], with_losses: bool) -> Tensor:
    """[E, C] of one layer, infinite for what is not tried; in one row more what the model loses where all experts are that, infinite
    where it is not measured."""
    found_XC = torch.full((layer.num_experts + 1, CANDIDATES), torch.inf, dtype=torch.float64)
    error_EC, built = found_XC[:-1], []
    for c, candidate in enumerate(candidates(layer, explorer.statistics.layer(layer.name))):
        if candidate.plan is None or not (is_tried(candidate) or candidate.kind == "nothing"):  # what an expert gives
            continue
        if candidate.kind == "keep":
            error_EC[:, c] = 0
        elif candidate.kind != "drop":
            built.append((c, candidate.plan))
        elif spare(layer):
            alone_CE = removed_mask([(e,) for e in range(layer.num_experts)], layer.num_experts)
            error_EC[:, c] = explorer.output_error(layer.name, alone_CE).square()
    for some in (built[i : i + explorer.together] for i in range(0, len(built), explorer.together)):
        error_CE, loss_C = explorer.stand_ins([plan for _, plan in some], with_losses)
        found_XC[:, [c for c, _ in some]] = torch.cat([error_CE, loss_C[:, None]], dim=1).T
    if bool(error_EC.isnan().any()):
        raise StatisticsError(
            f"the outputs of layer {layer.name} are not finite numbers; search in bfloat16 or float32 instead of float16"
        )
    return found_XC


def _keeps_weights(slot: Slot) -> bool:
    return slot.is_kept and all(part.format in PROTECTED_BITS for part in slot.parts)


def _bytes(plan: LayerPlan, layer: LayerShape, shape: ModelShape) -> int:
    """Of one expert, without its base; of a dropped one what its router row gives back."""
    slot = plan.slots[0]
    if not slot.survives:
        return -layer.router_bytes
    one = LayerPlan(layer.name, (slot,), plan.bases)
    return one.bytes(layer, shape) - (_base_bytes(plan, layer, shape) if plan.bases else 0)


def _base_bytes(plan: LayerPlan, layer: LayerShape, shape: ModelShape) -> int:
    base = next(part for part in plan.slots[0].parts if isinstance(part, SharedBase))
    return LayerPlan(layer.name, (Slot((base,)),), plan.bases).bytes(layer, shape)


def _named(slot: Slot, bases: tuple[Base, ...]) -> tuple[Slot, Base | None]:
    """A slot as it is whatever its base's number is, and that base."""
    return (slot, None) if slot.base is None else (slot.on_base(0), bases[slot.base])


def _chosen(scores: Layer, plan: LayerPlan) -> np.ndarray:
    """[E] which candidate each expert of a plan became."""
    found = [(c, x.plan) for c, x in enumerate(scores.candidates) if x.plan is not None]
    slots = [_named(slot, plan.bases) for slot in plan.slots]
    return np.array([next(c for c, x in found if _named(x.slots[e], x.bases) == slot) for e, slot in enumerate(slots)])


def _reasons(scores: Layer, e: int, chosen: int) -> str:
    """What an expert became, and the next smaller and larger candidates that cost more and less."""
    cost_C, bytes_C = scores.choices.cost_EC[e], scores.choices.bytes_C
    smaller = [c for c in range(len(cost_C)) if bytes_C[c] < bytes_C[chosen] and np.isfinite(cost_C[c])]
    larger = [c for c in range(len(cost_C)) if bytes_C[c] > bytes_C[chosen] and cost_C[c] < cost_C[chosen]]

    def words(c: int) -> str:
        return f"{scores.candidates[c].plan.slots[e]}: {cost_C[c]:.2e} nats, {bytes_C[c]:,.0f} bytes"

    said = [words(chosen)]
    said += [f"smaller {words(min(smaller, key=lambda c: cost_C[c]))}"] if smaller else []
    said += [f"larger {words(min(larger, key=lambda c: bytes_C[c]))}"] if larger else []
    return "; ".join(said)
