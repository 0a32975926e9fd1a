"""Train the experts that the text uses most, and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...containers.container import StandInExperts
from ...errors import OptionError
from ...files import fingerprint
from ...measure.use import Use
from ...models.families import MoeLayer, find_layers
from ...options import option
from ...plans.plan import Plan
from ..context import Context, check_layers
from ..layer import open_rows
from . import Way, way


def token_ratio(use: Use) -> Tensor:
    """[E] the token selection ratio: the share of a layer's selections that an expert has. It sums to 1."""
    return use.count_E / max(use.tokens * use.top_k, 1)


def mean_gate(use: Use) -> Tensor:
    """[E] the average gate score: the mean weight over all tokens, as the model uses it, but divided by the sum over the layer
    where that is above 1, as in families that scale their gates."""
    mean_E = use.gate_E / max(use.tokens, 1)
    return mean_E / max(float(mean_E.sum()), 1.0)


SCORES: dict[str, Callable[[Use], Tensor]] = {"token": token_ratio, "gate": mean_gate}


def relevant(score_E: Tensor, threshold: float) -> tuple[int, ...]:
    """The experts with the highest scores until their sum reaches the threshold, the one that crosses it included, in their order.

    Equal scores: the lower index first. Experts with no score are never among them; at a threshold of 1 all others are.
    """
    order_E = torch.sort(score_E, descending=True, stable=True).indices
    before_E = torch.cat([score_E.new_zeros(1), score_E[order_E].cumsum(0)[:-1]])
    needed_E = (before_E < threshold) | (threshold >= 1)
    return tuple(sorted(order_E[needed_E & (score_E[order_E] > 0)].tolist()))


@way("esft", source="arXiv 2407.01906 (ESFT)", learning_rate=3e-4)
@dataclass(frozen=True)
class SpecialisedTuning(Way):
    """Train the few experts of every layer that the text uses most; all else is frozen.

        R_e   = n_e / (K T) (token), or  1/T sum_t g_t,e (gate)
        E_s   = the experts with the highest R until their sum reaches p, the one that crosses it included

    T tokens, n_e of them selected e, g_t,e the weight of its output, K top-k, p the threshold.

    Trained:  what the experts in E_s have for themselves: whole weights, and of stand-ins adapters and constants. A base is
              trained if all of its members are in E_s. No other weight has a gradient or a moment.
    Loss:     cross entropy of the next token.
    Needs:    counts and gates: of `--statistics`, else of the first 131,072 tokens of the training text.
    Edges:    at p = 1 every expert that was selected is trained, one that never was at no p. The result is its base with a
              few other experts, so `--adapter-only` can write these alone.
    Raises:   OptionError where no expert was selected, and where one in E_s has anything in few bits, which stays as it is.
    Source:   ESFT, arXiv 2407.01906, whose p is 0.2 for token and 0.1 for gate. Differs: scores are means over all tokens, not
              of means over samples (its samples have one length); gates that sum to more than 1 are divided by their sum.
    """

    across_ranks: ClassVar[bool] = True
    fits_adapter: ClassVar[bool] = True
    reads_use: ClassVar[bool] = True
    score: str = option(
        "token", "what makes an expert relevant: how often it is selected, or its gates", choices=SCORES
    )
    threshold: float = option(0.2, "sum of scores up to which a layer's experts are trained (p)", above=0, at_most=1)

    def objection(self, plan: Plan | None) -> str | None:
        slots = [slot for layer in (plan.layers if plan else ()) for slot in layer.slots if slot.survives]
        if not slots or not all(any(part.format for part in slot.parts) for slot in slots):
            return None
        return f"trains whole experts, and all are in few bits ({', '.join(plan.formats)}), which stay as they are"

    def check(self, context: Context) -> None:
        check_layers(context)
        if not any(self._chosen(context).values()):
            raise OptionError("--how esft trains the experts that text selects, and it selected none; give more text")
        for layer in find_layers(context.model):
            _check_numbers(layer, self._chosen(context)[layer.shape.name])

    def identity(self, context: Context) -> dict[str, str]:
        return {"experts": fingerprint(json.dumps(self._chosen(context)))}

    def prepare(self, context: Context, start: int) -> None:
        context.model.requires_grad_(False)
        chosen = self._chosen(context)
        context.said["trained_experts"] = {name: list(experts) for name, experts in chosen.items()}
        for layer in find_layers(context.model):
            name = layer.shape.name
            opened = open_rows(context.model, layer, context.layer_plan(name), frozenset(chosen[name]))
            for path in opened.container.apart:
                opened.container.stack_apart(path).requires_grad_(True)
            context.layers.append(opened)

    def choose(self, uses: Mapping[str, Use] | None, num_experts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """The experts of every layer by how text uses them; where that is not known, as many as there can be."""
        if uses is not None:
            return {name: relevant(SCORES[self.score](use), self.threshold) for name, use in uses.items()}
        # Of shares that sum to 1, the highest are no less than the mean. Gates may sum to less.
        share = self.threshold if self.score == "token" else 1.0
        return {name: tuple(range(math.ceil(share * count))) for name, count in num_experts.items()}

    def _chosen(self, context: Context) -> dict[str, tuple[int, ...]]:
        shapes = [layer.shape for layer in find_layers(context.model)]
        return self.choose(context.uses, {shape.name: shape.num_experts for shape in shapes})


def _check_numbers(layer: MoeLayer, chosen: tuple[int, ...]) -> None:
    """Refuse chosen experts that have anything in few bits. Raises OptionError."""
    stacks = layer.experts.layout.stacks if isinstance(layer.experts, StandInExperts) else ()
    packed = [e for e in chosen if any(stack.format and stack.rows[e] >= 0 for stack in stacks)]
    if packed:
        raise OptionError(
            f"--how esft trains whole experts, and of the {len(chosen)} that it chose in {layer.shape.name} {len(packed)} are in few "
            f"bits (first: {packed[0]}), which stay as they are; use --how lora or --how router"
        )
