"""What a way to recover works on: the live model, its plan, and the original where the way needs it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..containers.container import StandInExperts
from ..containers.layout import Layout
from ..errors import OptionError, PlanError
from ..experts.weights import ExpertWeights
from ..files import fingerprint
from ..measure.use import Use
from ..models.families import MoeLayer, find_layers, read_expert
from ..plans.plan import LayerPlan, Plan
from .kept_logits import KeptLogits
from .layer import OpenLayer
from .states import sample

Read = Callable[[int], ExpertWeights]


@dataclass(frozen=True)
class Original:
    """The model that a compressed one was made from."""

    read: Mapping[str, Read]  # by the name of a layer: a function that reads one of its experts
    model: nn.Module | None = None  # the whole model, where it is in memory
    logits: KeptLogits | None = None  # what it predicts for the blocks of the run, where that is all there is of it

    @classmethod
    def of(cls, model: nn.Module) -> Original:
        """A live model as an original. It stays in memory as long as the result does."""
        layers = find_layers(model)
        return cls({layer.shape.name: functools.partial(read_expert, layer.experts) for layer in layers}, model)


def mark_of(original: Original) -> str:
    """What tells one original from others: a run resumes only with the same."""
    if original.logits is not None:
        return original.logits.mark
    return fingerprint(*map(sample, original.model.parameters()))


@dataclass
class Context:
    """One run of a way: what it trains, and what it has opened. `steps` and `seed` are those of the run."""

    model: nn.Module
    plan: Plan | None  # None for a model that was never compressed
    steps: int
    seed: int
    original: Original | None = None
    workdir: Path | None = None  # beside it, what memory need not hold may lie on the disk
    layers: list[OpenLayer] = field(default_factory=list)  # what `prepare` opened and `finish` has to close
    uses: Mapping[str, Use] | None = None  # of experts by text, by layer: for ways that read it
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # of the result's tensors, by name
    said: dict[str, Any] = field(
        default_factory=dict
    )  # what the way has to say of the run, for its log and its summary

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def layer_plan(self, name: str) -> LayerPlan | None:
        return None if self.plan is None else self.plan.layer(name)


def check_whole_original(context: Context, how: str) -> nn.Module:
    """The original model. Raises OptionError where there is less of it."""
    if context.original is None or context.original.model is None:
        raise OptionError(f"--how {how} needs the whole original model, not its experts alone; give it with --original")
    return context.original.model


def check_layers(context: Context) -> None:
    """Refuse a plan that is not the one by which the model's layers became what they are. Raises PlanError."""
    for layer in find_layers(context.model):
        _check_layer(layer, context.layer_plan(layer.shape.name))


def _check_layer(layer: MoeLayer, plan: LayerPlan | None) -> None:
    name = layer.shape.name
    if isinstance(layer.experts, StandInExperts):
        if plan is None:
            raise PlanError(f"{name} is compressed, but there is no plan for it; the checkpoint's plan.json is needed")
        if Layout.of(plan, layer.shape) != layer.experts.layout:
            raise PlanError(f"{name} was not made by this plan; use the plan.json of the checkpoint's own folder")
    elif plan is not None:
        if len(plan.survivors) != layer.shape.num_experts:
            raise PlanError(
                f"{name} has {layer.shape.num_experts} experts, the plan leaves {len(plan.survivors)}; apply the plan "
                f"first (locum apply), or use the plan.json of the checkpoint's own folder"
            )
        if not plan.is_dense:
            raise PlanError(f"{name} still has its original experts; apply the plan first (locum apply)")
