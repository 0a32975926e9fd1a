"""Recovery training: a compressed (or pruned, or stock) model is trained back to strength, in one of several ways.

A recipe says what is trained (`prepare`), what happens at each step (`at_step`) and how the model becomes a checkpoint
again (`finish`). The result has exactly the layout it came with: a stock model stays stock, a plan stays its plan.

    recipe      trained                                                        source
    annealed    shared bases, constants, adapters on every expert, while the   LightMoE, arXiv 2603.12645, section 3.3
                replaced experts' old weights fade out
    lora        the same without old weights                                   LoRA, arXiv 2106.09685, per expert
    vectors     routers and the vectors of auxiliary experts (routing.py)      IA3's way, arXiv 2205.05638
    full        every parameter                                                Compressed Experts, arXiv 2503.00634

Vectors of auxiliary experts are trained by every recipe, where a layer has them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoints.patch import vectors_and_routers
from ..containers.container import StandInExperts
from ..containers.layout import Layout
from ..data.tokens import Tokens
from ..errors import OptionError, PlanError, UnsupportedModel
from ..experts.parts.low_rank import LowRank
from ..experts.weights import ExpertWeights
from ..files import fingerprint, provenance
from ..models.families import MoeLayer, find_layers
from ..options import check_options
from ..plans.plan import LayerPlan, Plan
from ..registry import Registry
from .layer import OpenLayer, beta_at, close_layer, keep_old, open_layer, set_beta
from .loop import Hooks, train
from .options import UNTRACKED, Recovery
from .states import load_state

DEFAULT_RANK = 16
Read = Callable[[int], ExpertWeights]


@dataclass
class Work:
    """What a recipe works on. `original_read` maps a layer's name to a function that reads its original experts."""

    model: nn.Module
    plan: Plan | None
    options: Recovery
    original_read: Mapping[str, Read] = field(default_factory=dict)
    layers: list[OpenLayer] = field(default_factory=list)

    def layer_plan(self, name: str) -> LayerPlan | None:
        return None if self.plan is None else self.plan.layer(name)


class Full:
    """Train every parameter; nothing is added."""

    changes_weights = True  # False: the result is its base with other routers and vectors (an adapter can hold it)

    def check(self, work: Work) -> None:
        """Refuse what cannot be done, before anything is changed."""

    def identity(self, work: Work) -> dict[str, str]:
        """What the run depends on beside options, data, model and plan."""
        return {}

    def prepare(self, work: Work, start: int) -> None:
        """Make the model trainable, to go on with step `start`."""
        _require_gradients(work.model)

    def at_step(self, work: Work, step: int) -> dict[str, float]:
        """Called before every step, and once after the last; returns what the log should say."""
        return {}

    def finish(self, work: Work) -> None:
        """Give the model back in its checkpoint's layout."""


class Lora(Full):
    """Train an adapter on every expert, shared bases and constants; kept experts' adapters are merged at the end."""

    def check(self, work: Work) -> None:
        for layer in find_layers(work.model):
            check_plan(layer, work.layer_plan(layer.shape.name))
            adapter_rank(work, layer)

    def prepare(self, work: Work, start: int) -> None:
        work.model.requires_grad_(False)
        options = work.options
        for index, layer in enumerate(find_layers(work.model)):
            plan, rank = work.layer_plan(layer.shape.name), adapter_rank(work, layer)
            # Far from the seeds that `apply` draws the stand-ins' adapters from.
            seed = (1 << 40) + options.seed * 1_000_003 + index
            opened = open_layer(work.model, layer, plan, rank, options.train_bases, seed)
            for parameter in opened.container.trainable(options.train_bases):
                parameter.requires_grad_(True)
            work.layers.append(opened)

    def finish(self, work: Work) -> None:
        while work.layers:
            close_layer(work.model, work.layers.pop())


class Annealed(Lora):
    """As lora, while the replaced experts' old weights fade out in the first `end_fraction` of the steps."""

    def check(self, work: Work) -> None:
        super().check(work)
        replaced = [layer for layer in (work.plan.layers if work.plan else ()) if layer.replaced]
        if not replaced:
            what = f"the plan ({work.plan.method})" if work.plan else "a model without a plan"
            raise OptionError(
                f"--how annealed fades out the old weights of replaced experts, but {what} replaces none; "
                f"use --how lora or --how full"
            )
        missing = [layer.layer for layer in replaced if layer.layer not in work.original_read]
        if missing and work.options.end_fraction > 0:
            raise OptionError(
                f"--how annealed needs the original experts, and those of {len(missing)} layers are not there (first: "
                f"{missing[0]}); give the original model with --original, or set --end-fraction 0 to do without"
            )

    def identity(self, work: Work) -> dict[str, str]:
        if work.options.end_fraction == 0:
            return {}
        parts = []
        for layer in work.plan.layers:
            if layer.replaced:
                expert = work.original_read[layer.layer](layer.replaced[0])
                parts += [_sample(t) for t in vars(expert).values() if t is not None]
        return {"original": fingerprint(*parts)}

    def prepare(self, work: Work, start: int) -> None:
        super().prepare(work, start)
        if self._beta(work, start) > 0:
            for layer in work.layers:
                if layer.plan.replaced:
                    keep_old(layer, work.original_read[layer.name])

    def at_step(self, work: Work, step: int) -> dict[str, float]:
        beta = self._beta(work, step)
        for layer in work.layers:
            set_beta(layer, beta)
        return {"beta": beta}

    def _beta(self, work: Work, step: int) -> float:
        options = work.options
        return beta_at(step, options.steps, options.end_fraction, options.annealing, options.steepness)


class Vectors(Full):
    """Train the routers and what auxiliary experts leave behind; every weight stays as it is."""

    changes_weights = False

    def check(self, work: Work) -> None:
        for layer in find_layers(work.model):
            check_plan(layer, work.layer_plan(layer.shape.name))
        if not any(layer.routing for layer in (work.plan.layers if work.plan else ())):
            raise OptionError(
                "--how vectors trains the vectors and routers of layers with a routing policy, and no layer has one; "
                "compress with --method compressed-experts, or use --how lora or --how full"
            )

    def prepare(self, work: Work, start: int) -> None:
        work.model.requires_grad_(False)
        for tensor in vectors_and_routers(work.model).values():
            tensor.requires_grad_(True)


RECIPES: Registry[Full] = Registry("way to recover")
RECIPES.add("annealed", Annealed())
RECIPES.add("lora", Lora())
RECIPES.add("vectors", Vectors())
RECIPES.add("full", Full())


def check_recovery(options: Recovery) -> None:
    """Everything that can be said about options without a model. Raises OptionError."""
    check_options(options)
    RECIPES[options.how]


def check_plan(layer: MoeLayer, plan: LayerPlan | None) -> None:
    """Refuse a plan that is not the one by which this layer became what it is."""
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


def adapter_rank(work: Work, layer: MoeLayer) -> int:
    """The rank of new adapters: as asked for, else the one most stand-ins of the plan have, else 16 (or what fits)."""
    limit = min(layer.shape.hidden_size, layer.shape.expert_width)
    if work.options.rank > limit:
        raise OptionError(
            f"--rank is {work.options.rank}; allowed: at most {limit}, the smaller side of the experts' weights in "
            f"{layer.shape.name}"
        )
    slots = [slot for plan in (work.plan.layers if work.plan else ()) for slot in plan.slots]
    ranks = Counter(part.rank for slot in slots for part in slot.parts if isinstance(part, LowRank))
    usual = max(ranks, key=lambda rank: (ranks[rank], rank), default=DEFAULT_RANK)
    return work.options.rank or min(usual, limit)


def _require_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def count_trainable(model: nn.Module, plan: Plan | None, options: Recovery) -> int:
    """How many parameters recovery would train. `model` is used up; it may be on the meta device (skeleton)."""
    check_recovery(options)
    work = Work(model, plan, options)
    RECIPES[options.how].prepare(work, options.steps)  # the end of training, when no old weights are needed
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def recover_model(
    model: PreTrainedModel,
    plan: Plan | None,
    tokens: Tokens,
    validation: Tokens | None,
    options: Recovery,
    original_read: Mapping[str, Read] | None = None,
    workdir: Path | None = None,
    log: Path | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    restart: bool = False,
    about: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Train a live model back to strength, in place, on the device where it is.

    `plan` is the one the checkpoint was made by; None for a model that was never compressed. `original_read` maps
    layer names to functions that read the original's experts (annealed only). With a `workdir`, an interrupted run
    goes on where its last state was when it is called again with the same arguments; the last state stays there until
    the caller, having saved the result, calls `train.forget(workdir)`. `about` is added to the log's provenance.

    Returns the model, in the layout and dtype it came with, and a summary. If it raises after training has begun, the
    live model is left as it was in training: load it again. Raises OptionError, PlanError, DataError, UnsupportedModel.
    """
    check_recovery(options)
    if model.get_output_embeddings() is None:
        raise UnsupportedModel(
            f"{type(model).__name__} does not predict tokens, so next-token recovery cannot train it"
        )
    recipe, work = RECIPES[options.how], Work(model, plan, options, original_read or {})
    recipe.check(work)
    identity = _identity(work, tokens) | recipe.identity(work)
    state = load_state(workdir, identity, restart)
    dtypes = {name: tensor.dtype for name, tensor in _floats(model)}
    recipe.prepare(work, state.step)
    _set_precision(model, options.precision)
    made = provenance(data_fingerprint=tokens.fingerprint, identity=identity, **(about or {}))
    header = {"options": dataclasses.asdict(options), "provenance": made}
    hooks = Hooks(lambda step: recipe.at_step(work, step), workdir, identity, log, header, progress)
    summary = train(model, tokens, validation, options, state, hooks)
    recipe.finish(work)
    for name, tensor in _floats(model):
        tensor.data = tensor.data.to(dtypes[name])
    _require_gradients(model)
    return model.eval(), summary


def _identity(work: Work, tokens: Tokens) -> dict[str, Any]:
    """What a run's course depends on; a state is resumed only by a run with the same."""
    options = {k: v for k, v in dataclasses.asdict(work.options).items() if k not in UNTRACKED}
    samples = [part for name, tensor in work.model.state_dict().items() for part in (name, _sample(tensor))]
    plan = None if work.plan is None else work.plan.id
    return {**options, "data": tokens.fingerprint, "model": fingerprint(*samples), "plan": plan}


def _sample(tensor: Tensor) -> bytes:
    """Shape, dtype and some 64 values from all over a tensor."""
    values = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // 64)].double().cpu()
    return f"{list(tensor.shape)} {tensor.dtype}".encode() + values.numpy().tobytes()


def _floats(model: nn.Module) -> list[tuple[str, Tensor]]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]


def _set_precision(model: nn.Module, precision: str) -> None:
    """Trained parameters in float32 always; frozen ones too for fp32, as they are for bf16 (autocast casts both)."""
    for _, tensor in _floats(model):
        if tensor.requires_grad or precision == "fp32":
            tensor.data = tensor.data.float()
