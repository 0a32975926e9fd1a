"""Whether a plan fits a model: everything that can be known without weights. What a part asks for, it checks itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import OptionError, PlanError, unknown
from ..experts.parts.part import Part, Place
from ..experts.parts.shared_base import SharedBase
from ..experts.quantisers import QUANTISERS
from ..formats.rows import row_format, stored_shape
from ..shapes import LayerShape, ModelShape
from .layer_plan import DROPPED, MERGES, Base, LayerPlan, Slot


def check_layers(model_type: str, fingerprint: str, layers: Sequence[LayerPlan], shape: ModelShape) -> None:
    """Raise PlanError for layers that were planned for another model, and for anything that does not fit this one."""
    if fingerprint != shape.fingerprint:
        ours = ", ".join(f"{p.layer} with {len(p.slots)} experts" for p in layers[:1]) or "no layers"
        theirs = ", ".join(f"{s.name} with {s.num_experts}" for s in shape.layers[:1])
        raise PlanError(
            f"the plan was made for another model: {model_type} ({len(layers)} layers: {ours} ...), but "
            f"this one is {shape.model_type} ({len(shape.layers)} layers: {theirs} ...); make a plan from "
            f"statistics of this model or of one with the same MoE layers"
        )
    names = [layer.name for layer in shape.layers]
    seen = set()
    for plan in layers:
        if plan.layer not in names:
            raise PlanError(unknown("layer in the plan", plan.layer, names))
        if plan.layer in seen:
            raise PlanError(f"layer {plan.layer} is in the plan twice; keep one of the two entries")
        seen.add(plan.layer)
        _check_layer(plan, shape.layer(plan.layer))
    if sum(layer.dropped for layer in layers) == len(shape.layers):
        raise PlanError("the plan drops the decoder layers of all experts; keep one, or what is left is no MoE model")
    _check_top_k(layers, shape)


def _check_layer(plan: LayerPlan, shape: LayerShape) -> None:
    where = f"plan for layer {plan.layer}"
    if len(plan.slots) != shape.num_experts:
        raise PlanError(
            f"{where} lists {len(plan.slots)} experts, the model has {shape.num_experts} (0 to {shape.num_experts - 1})"
        )
    if plan.dropped:
        _check_dropped(where, plan, shape)
        return
    for e, slot in enumerate(plan.slots):
        _check_slot(f"{where}, expert {e}", slot, plan, shape)
    for b, base in enumerate(plan.bases):
        _check_base(f"{where}, base {b}", base, b, plan)
    shape = _selecting(where, plan, shape)
    if plan.routing is not None:
        plan.routing.check(f"{where}, routing", shape)
    _check_survivors(where, plan, shape)
    if plan.routing is not None and len(plan.survivors) < shape.num_experts:
        left = replace(shape, num_experts=len(plan.survivors))
        plan.routing.among(plan.survivors).check(f"{where}, routing among the experts that are left", left)


def _check_dropped(where: str, plan: LayerPlan, shape: LayerShape) -> None:
    """Refuse a layer that goes and has something left, and one that cannot go."""
    if plan.slots != (DROPPED,) * shape.num_experts or plan.bases or plan.routing is not None or plan.top_k is not None:
        raise PlanError(
            f"{where} drops its decoder layer and has something left; let every expert of it be dropped, without bases, policy "
            f'and top_k, or take "dropped" from the layer'
        )
    if shape.expert_bytes:
        raise PlanError(
            f"{where} drops its decoder layer, and the checkpoint is quantised; plan for the one that it was made from"
        )
    if not shape.around_numel:
        raise PlanError(
            f"{where} drops its decoder layer, and what that has beside experts is not known: it shares tensors with others, or "
            f"the statistics are from before such layers could go; then collect them anew"
        )


def _selecting(where: str, plan: LayerPlan, shape: LayerShape) -> LayerShape:
    """The layer with as many experts selected as the plan says."""
    if plan.top_k is None:
        return shape
    if type(plan.top_k) is not int or not 1 <= plan.top_k <= shape.top_k:
        raise PlanError(
            f"{where} has top_k {plan.top_k!r}; allowed: 1 to {shape.top_k}, the experts that its router selects"
        )
    if shape.num_groups > 1:
        raise PlanError(
            f"{where} has top_k {plan.top_k}, and its router ranks {shape.num_groups} groups by their best experts; leave top_k out"
        )
    return replace(shape, top_k=plan.top_k)


def _check_top_k(layers: Sequence[LayerPlan], shape: ModelShape) -> None:
    """Refuse routers that select different numbers of experts: a config has one number for all."""
    said = {plan.layer: plan.top_k for plan in layers if plan.top_k is not None}
    dropped = {plan.layer for plan in layers if plan.dropped}
    staying = [layer for layer in shape.layers if layer.name not in dropped]
    if said and len(left := {said.get(layer.name, layer.top_k) for layer in staying}) > 1:
        raise PlanError(
            f"the plan lets layers select {' or '.join(map(str, sorted(left)))} experts, and the config has one number for all; give every "
            f"layer the same top_k"
        )


def _check_survivors(where: str, plan: LayerPlan, shape: LayerShape) -> None:
    dropped = [e for e, slot in enumerate(plan.slots) if not slot.survives]
    if dropped and shape.refuse_dropping:
        raise PlanError(
            f"{where} drops expert {dropped[0]}, which this model does not allow: {shape.refuse_dropping}. Give it parts, "
            f"or an empty list of them: both leave the router as it is"
        )
    if len(plan.survivors) < shape.top_k:
        raise PlanError(
            f"{where} leaves {len(plan.survivors)} experts, but the router selects top_k={shape.top_k} for every token; "
            f"keep at least {shape.top_k}, or let it select fewer (top_k)"
        )
    if shape.num_groups > 1:
        size = shape.num_experts // shape.num_groups
        counts = [sum(e // size == g for e in plan.survivors) for g in range(shape.num_groups)]
        if len(set(counts)) > 1:
            raise PlanError(
                f"{where} leaves {counts} experts in the router's {shape.num_groups} groups; a group-limited router "
                f"needs equally many in each"
            )
        if counts[0] < shape.min_per_group:
            raise PlanError(
                f"{where} leaves {counts[0]} experts in each of the router's {shape.num_groups} groups; keep at least "
                f"{shape.min_per_group}, or the router cannot rank its groups and select top_k={shape.top_k} experts"
            )


def _check_slot(where: str, slot: Slot, plan: LayerPlan, shape: LayerShape) -> None:
    if slot.parts and not slot.survives:
        raise PlanError(
            f"{where} is dropped but has {' + '.join(map(str, slot.parts))}; only an expert that stays has parts"
        )
    kinds = [type(part) for part in slot.parts]
    if twice := [kind for kind in kinds if kinds.count(kind) > 1]:
        raise PlanError(
            f"{where} has two parts of the kind {twice[0].name!r}; an expert has one part of a kind at most"
        )
    for part in slot.parts:
        if part.follows:
            raise PlanError(f"{where} has the part {part.name!r}, which comes by itself with other parts; leave it out")
        part.check(Place(where, slot.parts, len(plan.bases), shape))
        _check_format(where, part, shape)


def _check_format(where: str, part: Part, shape: LayerShape) -> None:
    """Refuse a number format that is not known, does not fit the part's matrices, or that the quantiser does not know."""
    if part.quantiser not in QUANTISERS:
        raise PlanError(f"{where}: {unknown('quantiser', str(part.quantiser), QUANTISERS)}")
    if not part.format:
        if part.quantiser != Part.quantiser:
            raise PlanError(f"{where}: {part} has a quantiser, {part.quantiser!r}, but no format; give it one")
        return
    if not part.stack.has_products:
        raise PlanError(f"{where}: {part} has no matrices that could be in {part.format}; leave its format out")
    if shape.expert_bytes:
        raise PlanError(
            f"{where}: {part} is to be in {part.format}, but the checkpoint is quantised already; plan for the one that it was "
            f"made from, or leave the format out"
        )
    try:
        only = QUANTISERS[part.quantiser].only
        if only is not None and not isinstance(row_format(part.format), only):
            raise PlanError(
                f"{where}: quantiser {part.quantiser!r} knows whole numbers in groups (int4-g32) alone, and {part} is to be in "
                f"{part.format}; take the quantiser nearest"
            )
        for size in part.stack.tensors(part.variant(), shape).values():
            stored_shape(part.format, size)
    except OptionError as error:
        raise PlanError(f"{where}: {part}: {error}") from error


def _check_base(where: str, base: Base, index: int, plan: LayerPlan) -> None:
    if not base.experts or len(base.experts) != len(base.weights):
        raise PlanError(
            f"{where} has {len(base.experts)} experts and {len(base.weights)} weights; give one weight for each expert, "
            f"and at least one"
        )
    for e in base.experts:
        if not _is_whole(e) or not 0 <= e < len(plan.slots):
            raise PlanError(f"{where} averages unknown expert {e!r}; allowed: 0 to {len(plan.slots) - 1}")
    if len(set(base.experts)) < len(base.experts):
        raise PlanError(f"{where} names an expert twice: {list(base.experts)}")
    if base.merge not in MERGES:
        raise PlanError(f"{where}: {unknown('merge', base.merge, MERGES)}")
    numbers = all(type(w) in (int, float) and 0 <= w <= 1 for w in base.weights)
    if not numbers or abs(sum(base.weights) - 1) > 1e-6:
        raise PlanError(f"{where} has weights {list(base.weights)}; they must be at least 0 and sum to 1")
    used = {part for slot in plan.slots for part in slot.parts if isinstance(part, SharedBase) and part.base == index}
    if not used:
        raise PlanError(f"{where} is used by no expert; remove it or give it a member")
    if len(used) > 1:
        raise PlanError(
            f"{where} is in several number formats ({', '.join(sorted(part.words() for part in used))}); experts that share "
            f"it have it in one"
        )


def _is_whole(value: Any) -> bool:
    return type(value) is int
