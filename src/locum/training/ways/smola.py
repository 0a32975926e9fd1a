"""Train a soft mixture of low-rank experts beside every MoE layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ...checkpoints.application import add_policy
from ...checkpoints.placing import LocumConfig, containers_of, note_containers
from ...errors import OptionError
from ...experts.policies.in_turn import InTurn, each_of
from ...experts.policies.soft_lora import SoftLora, name_fault
from ...models.families import MoeLayer, find_layers
from ...options import option
from ...plans.plan import KEPT, LayerPlan, Plan
from ...shapes import LayerShape
from ..context import Context, check_layers
from . import Way, way


@way("smola", source="arXiv 2312.00968 (Omni-SMoLA)")
@dataclass(frozen=True)
class SoftMixture(Way):
    """Train a soft mixture of low-rank experts beside the experts of every MoE layer; all else is frozen.

        y(x) = experts(x) + sum_n softmax(Phi x)_n B_n A_n x,   A, Phi ~ N(0, 1 / columns), B = 0 at the start

    Trained:  Phi, A and B of every layer, which stay beside it as a routing policy of the plan (soft_lora).
    Loss:     cross entropy of the next token.
    Edges:    before the first step the model computes what it did. Sets of other names stay there to the bit and add up with this one;
              a set of the same name goes on. What a set adds, it adds to all text, so tasks disturb each other in one model (docs/log.md,
              2026-11-28); `--adapter-only` makes files of sets, to be attached for their task. Layers without experts get no set. A
              stock model becomes one that Locum loads.
    Raises:   OptionError for a rank above the model's width, for a set of the same name and another size, and for a quantised stock
              checkpoint.
    Cost:     every token computes all sets: 2 N R + N numbers of each for each of the model's width, in time and in bytes.
    Source:   Omni-SMoLA, arXiv 2312.00968, whose formulas are those of Soft MoE. Differs: no token is mixed with others, and
              every set serves all tokens (experts/policies/soft_lora.py).
    """

    changes_weights: ClassVar[bool] = False
    experts: int = option(8, "low-rank experts in a layer", at_least=1)
    rank: int = option(4, "rank of each of them", at_least=1)
    set: str = option("", "name of the set; those of other names stay as they are")

    def __post_init__(self) -> None:
        if isinstance(self.set, str) and (reason := name_fault(self.set)):  # check_options says what else it must be
            raise OptionError(f"--how {self.name} trains no {reason}")

    def becomes(self, plan: Plan | None, layers: Iterable[LayerShape]) -> Plan | None:
        if plan is None:
            return None
        kept = {shape.name: LayerPlan(shape.name, (KEPT,) * shape.num_experts) for shape in layers}
        planned = kept | {layer.layer: layer for layer in plan.layers}
        made = [replace(layer, routing=InTurn.of(layer.routing, self._policy)) for layer in planned.values()]
        return plan if tuple(made) == plan.layers else replace(plan, layers=tuple(made))

    def check(self, context: Context) -> None:
        check_layers(context)
        said = getattr(context.model.config, "quantization_config", None)
        if said is not None and not isinstance(said, LocumConfig):
            raise OptionError(
                "--how smola puts a mixture beside the layers of a quantised checkpoint that no plan was applied to; apply one first "
                "(locum apply), or use --how router"
            )
        for layer in find_layers(context.model):
            if self.rank > layer.shape.hidden_size:
                raise OptionError(
                    f"--rank is {self.rank}; allowed: at most {layer.shape.hidden_size}, the model's width"
                )
            other = self._there(layer)
            if other not in (None, self._policy):
                raise OptionError(
                    f"{layer.shape.name} has a mixture already: {other}; give --experts {other.experts} --rank {other.rank}, or "
                    f"another --set"
                )

    def prepare(self, context: Context, start: int) -> None:
        context.model.requires_grad_(False)
        for index, layer in enumerate(find_layers(context.model)):
            name = layer.shape.name
            if self._there(layer) is None:
                add_policy(context.model, layer, self._policy)
                self._draw(context, name, index)
            container = context.model.get_submodule(name).requires_grad_(False)
            for leaf in self._policy.leaves:
                tensor = container.get_parameter(leaf).requires_grad_(True)
                context.dtypes.setdefault(f"{name}.{leaf}", tensor.dtype)

    def finish(self, context: Context) -> None:
        note_containers(context.model)

    @property
    def _policy(self) -> SoftLora:
        return SoftLora(self.experts, self.rank, self.set)

    def _there(self, layer: MoeLayer) -> SoftLora | None:
        """The set of this name that a layer has, of any size."""
        policy = getattr(getattr(layer.experts, "layout", None), "routing", None)
        return next((each for each in each_of(policy) if isinstance(each, SoftLora) and each.set == self.set), None)

    def _draw(self, context: Context, name: str, index: int) -> None:
        """Give a new mixture what it starts from; one without weights has none."""
        generator = torch.Generator().manual_seed((1 << 41) + context.seed * 1_000_003 + index)
        container = dict(containers_of(context.model))[name]
        phi, down, _ = self._policy.leaves
        for leaf in (phi, down):
            tensor = container.get_parameter(leaf).data
            if tensor.device.type != "meta":
                drawn = torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5
                tensor.copy_(drawn)
