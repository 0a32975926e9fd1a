"""Carrying out a plan: layer by layer, then one checkpoint. Nothing is decided here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..containers.build import build_layers, check_statistics, rewritten, stack_dense
from ..containers.container import StandInExperts
from ..containers.layout import Layout
from ..containers.rows import tensors_of
from ..errors import UnsupportedModel
from ..experts.policies.in_turn import InTurn
from ..experts.policies.policy import Policy
from ..experts.weights import ExpertWeights
from ..files import NOTES, whole
from ..models.choosing import check_choosing, choose_by
from ..models.families import (
    EXPERT_COUNTS,
    MoeLayer,
    canonical_activation,
    find_layers,
    leave_router_logits,
    places_of_top_k,
    read_expert,
    set_expert_count,
    slice_experts,
    slice_router,
    write_expert,
)
from ..models.sizes import shape_of
from ..places import bare
from ..plans.plan import KEPT, LayerPlan, Plan
from ..plans.plan_file import save_plan
from ..shapes import LayerShape
from ..stats.sums import LayerStatistics, Statistics
from .announced import settle_config
from .fewer_layers import drop_layers, without_layers
from .placing import LocumConfig
from .side_files import copy_side_files


def make_container(
    plan: LayerPlan,
    shape: LayerShape,
    read: Callable[[int], ExpertWeights],
    activate: Callable[[Tensor], Tensor],
    statistics: LayerStatistics | None,
    seed: int,
) -> StandInExperts:
    """The container of one layer, filled. It does not matter where `read` takes the experts from."""
    return next(make_containers([plan], shape, read, activate, statistics, seed))


def make_containers(
    plans: Sequence[LayerPlan],
    shape: LayerShape,
    read: Callable[[int], ExpertWeights],
    activate: Callable[[Tensor], Tensor],
    statistics: LayerStatistics | None,
    seed: int,
    workers: int = 1,
) -> Iterator[StandInExperts]:
    """The containers of several plans of one layer; what they share is made once, by so many threads (`build_layers`)."""
    like = read(0).down_DF
    for layout, tensors in build_layers(plans, shape, read, statistics, seed, activate, workers):
        container = StandInExperts(layout, activate, like.dtype, "meta")
        container.load_state_dict(tensors, assign=True, strict=True)
        yield container.to(like.device)


def apply_plan(
    model: PreTrainedModel,
    plan: Plan,
    statistics: Statistics | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda layer: None,
) -> PreTrainedModel:
    """Change a live stock model into what the plan says, in place. Layers the plan keeps whole are left as they are.

    `statistics` are read only where the plan has parts made from them (`plan.needs` says which).
    Raises PlanError before anything is changed when the plan does not fit or they are missing.
    """
    shape = shape_of(model)
    plan.validate(shape)
    layers = {layer.shape.name: layer for layer in find_layers(model)}
    if any(isinstance(layer.experts, StandInExperts) for layer in layers.values()):
        raise UnsupportedModel("the model is compressed already; apply the plan to the original checkpoint")
    check_choosing(layers.values(), plan)
    for layer_plan in plan.layers:
        check_statistics(layer_plan, _read_by(layer_plan, statistics))
    stock, numbering = plan.is_stock(shape), plan.numbering
    if numbering.gone:
        without_layers(model.config, numbering)  # whether it can be
    experts = [layer.experts for layer in layers.values()]
    selecting, top_k = _top_k_after(model, plan, [*layers.values()])
    layouts = {}
    places = {layer_plan.layer: index for index, layer_plan in enumerate(plan.layers)}
    for name, layer in list(layers.items()):
        layer_plan = plan.layer(name) or LayerPlan(name, (KEPT,) * layer.shape.num_experts)
        if layer_plan.dropped:
            del layers[name]
        elif not layer_plan.is_identity or (not stock and _is_uneven(layer)):
            if stock:
                _rewrite(layer, layer_plan, statistics, seed * 1_000_003 + places.get(name, 0))
                slice_experts(layer.experts, layer_plan.survivors)
            else:
                layouts[name] = _replace(model, layer, layer_plan, statistics, seed * 1_000_003 + places.get(name, 0))
            if len(layer_plan.survivors) < layer.shape.num_experts:
                slice_router(layer, layer_plan.survivors)
        if name in places:
            progress(name)
    if stock and plan.staying:
        above = [m for m in model.modules() if isinstance(m, PreTrainedModel) and set(m.modules()) & {*experts}]
        for holder in (
            model.config,
            *(module.config for module in experts),
            *above,
        ):  # models keep the number to balance by
            set_expert_count(holder, len(plan.staying[0].survivors))
    for holder, said in selecting:
        setattr(holder, said, top_k)
    if numbering.gone:
        drop_layers(model, numbering)
    if layouts:
        named = {numbering.name_after(name): layout.to_json() for name, layout in layouts.items()}
        model.config.quantization_config = LocumConfig(named)
    if not stock and any(_counts_differ(plan.layer(name), layer) for name, layer in layers.items()):
        leave_router_logits(model)
    return model


def _top_k_after(
    model: PreTrainedModel, plan: Plan, layers: Sequence[MoeLayer]
) -> tuple[list[tuple[object, str]], int | None]:
    """Where a model says how many experts its routers select, and how many they do afterwards, where the plan says so."""
    said = next((each.top_k for each in plan.layers if each.top_k is not None), None)
    if said is None:
        return [], None
    configs = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    configs |= {
        id(config): config for layer in layers if (config := getattr(layer.experts, "config", None)) is not None
    }
    parts = [part for layer in layers for part in (layer.block, *layer.router.modules())]
    modules = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return places_of_top_k(layers, configs.values(), [*parts, *modules], said), said


def _is_uneven(layer: MoeLayer) -> bool:
    """Whether a stock layer has another number of experts than its config says, as one opened from a container may."""
    return _counts_differ(None, layer)


def _counts_differ(plan: LayerPlan | None, layer: MoeLayer) -> bool:
    """Whether a layer has, or after its plan will have, another number of experts than its config says."""
    counts = (getattr(layer.experts.config, name, None) for name in EXPERT_COUNTS)
    return (layer.shape.num_experts if plan is None else len(plan.survivors)) not in counts


def _read_by(plan: LayerPlan, statistics: Statistics | None) -> LayerStatistics | None:
    return statistics.layer(plan.layer) if statistics is not None and plan.needs else None


def _rewrite(layer: MoeLayer, plan: LayerPlan, statistics: Statistics | None, seed: int) -> None:
    """Give experts of a stock layer the weights that the plan makes of their own."""
    become = rewritten(plan, lambda e: read_expert(layer.experts, e), _read_by(plan, statistics), seed)
    for e in plan.rewritten:
        write_expert(layer.experts, e, become(e))


def add_policy(model: nn.Module, layer: MoeLayer, policy: Policy) -> Layout:
    """Give one layer of a live model, stock or a container, a routing policy on top of those that it has; what the policy stores is
    zero. Returns the layout of its container, which the model's config does not say yet (placing.note_containers)."""
    experts, shape = layer.experts, layer.shape
    if isinstance(experts, StandInExperts):
        layout, tensors = experts.layout, tensors_of(experts)
    else:
        layout = Layout.of(LayerPlan(shape.name, (KEPT,) * shape.num_experts), shape)
        tensors = stack_dense([read_expert(experts, e) for e in range(shape.num_experts)])
    layout = replace(layout, routing=InTurn.of(layout.routing, policy))
    like = next(tensor for tensor in (*experts.parameters(), *model.parameters()) if tensor.is_floating_point())
    container = StandInExperts(layout, canonical_activation(experts), like.dtype, "meta")
    for name, size in layout.routing.tensors(layout).items():
        tensors.setdefault(name, torch.zeros(size, dtype=like.dtype, device=like.device))
    container.load_state_dict(tensors, strict=True, assign=True)
    container.post_expert_norm = getattr(experts, "post_expert_norm", None)
    model.set_submodule(shape.name, container)
    return layout


def _replace(model: nn.Module, layer: MoeLayer, plan: LayerPlan, statistics: Statistics | None, seed: int) -> Layout:
    experts = layer.experts
    container = make_container(
        plan,
        layer.shape,
        lambda e: read_expert(experts, e),
        canonical_activation(experts),
        _read_by(plan, statistics),
        seed,
    )
    container.post_expert_norm = getattr(experts, "post_expert_norm", None)
    model.set_submodule(plan.layer, container)
    choose_by(layer, container.layout.routing)
    return container.layout


def save_checkpoint(
    write: Callable[[Path], None],
    tokenizer: Any,
    out: Path,
    plan: Plan | None,
    card: str,
    source: Path,
    notes: dict[str, Any],
    extra: Iterable[Path] = (),
) -> None:
    """Write a whole checkpoint folder or nothing: weights, config, tokenizer, plan, notes and model card.

    `write` puts weights and config into the folder. From `source` comes what is not weights and not written anew; `extra`
    files are copied in under their names.
    """
    with whole(out, "folder") as folder:
        write(folder)
        complete_checkpoint(folder, tokenizer, plan, card, source, notes, extra)


def complete_checkpoint(
    folder: Path,
    tokenizer: Any,
    plan: Plan | None,
    card: str,
    source: Path,
    notes: dict[str, Any],
    extra: Iterable[Path] = (),
) -> None:
    """Put into a folder that has weights and config whatever else makes it a checkpoint by Locum."""
    settle_config(folder)
    tokenizer.save_pretrained(folder)
    copy_side_files(source, folder)
    if plan is not None:
        save_plan(plan, folder / "plan.json")
    for file in extra:
        shutil.copyfile(file, folder / file.name)
    (folder / NOTES).write_text(json.dumps(bare(notes), indent=1), encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
