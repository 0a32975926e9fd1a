"""Train every layer's stand-ins to give what the original's layer gives, on the compressed model's own hidden states."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...data.tokens import Batch
from ...errors import OptionError
from ...models.families import find_layers
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
from ..context import Context, check_whole_original, mark_of
from ..imitation import learning
from ..routers import router_parameters
from . import Way, way


@way("layerwise", source="arXiv 2411.19146 (Puzzle), its blockwise local distillation")
@dataclass(frozen=True)
class Layerwise(Way):
    """Train adapters, shared bases and constants so that every MoE layer gives what the original's gives.

        loss = sum_l sum_t |y_l(h_t) - y*_l(h_t)|^2 / mean_t |y*_l(h_t)|^2

    y_l is MoE layer l, y*_l that of the original, h_t its inputs in the compressed model, which training does not reach
    through: a layer learns from its own error alone, however deep the model. `recover` trains one layer after the other, each for
    all steps on what the layers that have learnt give it (training/one_by_one.py), in the memory of one where models are streamed.
    It begins with least squares: constants and the second factors of down's adapters are where a layer's error is least
    (training/closed_form.py), as told by other batches than those that are fitted.

    Trained:  as by `lora`; with `routers` the routers too.
    Loss:     above. Validation is the cross entropy of the next token, as for every way; of `recover` at both ends.
    Needs:    the whole original.
    Edges:    a layer that the plan leaves as it was does not change.
    Raises:   OptionError where the plan changes no layer, without the original model, or for one that lacks layers.
    Cost:     a forward pass of the compressed model and of the original's MoE layers; gradients of one layer at a time. Hidden
              states of all batches; on the disk where they take more than 1 GiB.
    Source:   Puzzle, arXiv 2411.19146. Differs: inputs are those that the compressed layers before make, where blocks there are
              trained apart, on the original's. A live model given to `recover_model` learns in all layers at once, by AdamW alone.
    """

    across_ranks: ClassVar[bool] = (
        False  # gradients do not come through the model's outputs, where weights are gathered
    )
    layer_by_layer: ClassVar[bool] = True
    rank: int = rank_option()
    train_bases: bool = train_bases_option()
    keep_size: bool = keep_size_option()
    routers: bool = option(False, "train the routers of the layers too")
    closed_form: bool = option(True, "begin with least squares, in what a layer's output is linear in")

    def objection(self, plan: Plan | None) -> str | None:
        if changed_layers(plan):
            return None
        what = "a model without a plan has none" if plan is None else f"the plan ({plan.method}) changes none"
        return f"learns from the error of layers that the plan changed, and {what}"

    def needs_original(self, plan: Plan | None) -> bool:
        return True

    def becomes(self, plan: Plan | None, layers: Iterable[LayerShape]) -> Plan | None:
        return with_adapters(plan, layers, self)

    def check(self, context: Context) -> None:
        check_adapters(context, self)
        known = {layer.shape.name for layer in find_layers(check_whole_original(context, self.name))}
        missing = [layer.shape.name for layer in find_layers(context.model) if layer.shape.name not in known]
        if missing:
            raise OptionError(
                f"the original lacks {len(missing)} of the model's layers (first: {missing[0]}); give the model that this one "
                f"was compressed from with --original"
            )

    def identity(self, context: Context) -> dict[str, str]:
        return {"original": mark_of(context.original)}

    def prepare(self, context: Context, start: int) -> None:
        open_adapters(context, self)
        if self.routers:
            for tensor in router_parameters(context.model):
                tensor.requires_grad_(True)

    def loss(self, context: Context, batch: Batch) -> tuple[Tensor, int]:
        mask_BS = torch.nn.functional.pad(batch.loss_mask_BS[:, 1:], (0, 1)).to(context.device)
        losses: list[Tensor] = []
        teachers = {layer.shape.name: layer.block for layer in find_layers(context.original.model)}
        changed = changed_layers(context.plan)
        layers = [layer for layer in find_layers(context.model) if layer.shape.name in changed]
        pairs = [(layer.block, teachers[layer.shape.name]) for layer in layers]
        with learning(pairs, mask_BS, losses), torch.no_grad():
            ids_BS, attention_BS = batch.ids_BS.to(context.device), batch.attention_BS.to(context.device)
            context.model.base_model(input_ids=ids_BS, attention_mask=attention_BS, use_cache=False)
        return torch.stack(losses).sum(), int(mask_BS.sum())


def changed_layers(plan: Plan | None) -> set[str]:
    """Layers with an error. The others have rounding alone, which AdamW would take for something to learn from."""
    return {layer.layer for layer in (plan.layers if plan else ()) if not layer.is_identity}
