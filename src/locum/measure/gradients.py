"""Backward passes of calibration: the loss of predicting the next token, back to experts' hidden states and weights.

Letters: P pairs (token, expert), F expert width.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.tokens import Batch
from ..errors import UnsupportedModel
from ..models.families import MoeLayer, read_expert
from ..models.layer_major import is_streamed
from ..models.next_token_loss import loss_sum
from ..models.output_head import check_predicts
from ..stats.events import Event, HiddenGradientEvent, RoutedEvent, WeightGradientEvent

Add = Callable[[str, Event], None]


class Gradients:
    """Runs batches forward and backward, and hands out events of what came back. Only what events ask for has gradients.

    Raises UnsupportedModel for a streamed model and one that predicts no tokens.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[MoeLayer], events: set[type[Event]]) -> None:
        self.model, self.layers, self.events = model, layers, events
        self.seen: list[tuple[str, RoutedEvent, Tensor | None]] = []  # pairs of every layer, and which tokens are text
        if is_streamed(model):
            raise UnsupportedModel(
                "gradients need the whole model in memory; give --no-stream, or leave out what asks for them"
            )
        check_predicts(model, "it has no loss to go back from")

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """For as long as the block runs, no parameter has a gradient but those of experts where they are asked for."""
        before = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        # What flows back begins at the embeddings' output, so that no weight needs a gradient for it.
        hook = self.model.get_input_embeddings().register_forward_hook(
            lambda _module, _inputs, output: output.detach().requires_grad_().clone()
        )
        try:
            for parameter, _ in before:
                parameter.requires_grad_(False)
            if WeightGradientEvent in self.events:
                for layer in self.layers:
                    layer.experts.requires_grad_(True)
            yield
        finally:
            hook.remove()
            for parameter, required in before:
                parameter.requires_grad_(required)
            for layer in self.layers:
                layer.experts.zero_grad(set_to_none=True)
            self.seen.clear()

    def watch(self, name: str, event: RoutedEvent, keep_T: Tensor | None) -> None:
        """Note what a layer's experts do, for the way back."""
        if HiddenGradientEvent in self.events and event.hidden_PF.requires_grad:
            event.hidden_PF.retain_grad()
            self.seen.append((name, event, keep_T))

    def run(self, batch: Batch, add: Add) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            loss, _ = loss_sum(self.model, batch, self.model.device)
            if loss.requires_grad:
                loss.backward()
        for name, event, keep_T in self.seen:
            grad_PF = event.hidden_PF.grad
            back = replace(
                event.detached(), hidden_PF=torch.zeros_like(event.hidden_PF) if grad_PF is None else grad_PF
            )
            back = back if keep_T is None else back.of_tokens(keep_T)
            add(name, HiddenGradientEvent(back.counts, back.hidden_PF))
        self.seen.clear()
        if WeightGradientEvent in self.events:
            for layer in self.layers:
                add(layer.shape.name, WeightGradientEvent(_gradients(layer.experts)))
                layer.experts.zero_grad(set_to_none=True)


def _gradients(experts: nn.Module) -> tuple[tuple[Tensor, ...], ...]:
    """The gradients of every expert's matrices, in the one orientation that experts are read in."""
    holding = copy.copy(experts)
    holding._parameters = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in experts._parameters.items()
        if parameter is not None
    }
    return tuple(read_expert(holding, e).matrices for e in range(experts.num_experts))
