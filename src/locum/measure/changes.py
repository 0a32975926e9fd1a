"""Running a live model while some of its MoE layers are changed: whole, or with one decoder layer in memory at a time.

A change is a function of a layer whose context is entered for as long as the change holds: masked routers, a container in the place of the
experts, noise. Of a streamed model, each layer is changed while it computes for the job, so that jobs with other changes go through the
layers side by side, and the weights are read once for as many jobs as have room (`together`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..models.decoder_layers import decoder_stack, place_in
from ..models.families import MoeLayer
from ..models.layer_major import Resident, is_streamed, passes, together
from ..models.watch import evaluating, observable_layers

Change = Callable[[MoeLayer], contextlib.AbstractContextManager[Any]]
Job = tuple[Mapping[str, Change], Callable[[], Any]]  # changes by layer, and what runs the model once


class ChangingModel:
    """A live model, those of its layers that are there, and what it gives while they are changed."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.resident = Resident(model)
        self.see()

    def see(self) -> None:
        """Find the layers afresh: those of a streamed model have other tensors whenever they are read."""
        self.layers: dict[str, MoeLayer] = {layer.shape.name: layer for layer in observable_layers(self.model)}

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        with torch.no_grad(), evaluating(self.model):
            yield

    def results(self, jobs: Sequence[Job], tokens: int) -> list[Any]:
        """What every job gives, in their order, of batches of at most so many tokens."""
        if not is_streamed(self.model):
            return [self._result(*job) for job in jobs]
        self.resident.let_go()
        prefix, _ = decoder_stack(self.model, list(self.layers))
        found: list[Any] = []
        for some in together(self.model, jobs, tokens):

            def during(index: int, job: int, some: list[Job] = some) -> contextlib.AbstractContextManager[Any]:
                return self.changed({n: x for n, x in some[job][0].items() if place_in(prefix, n) == index})

            runs = [run for _, run in some]
            found += passes(self.model, runs, before_layer=lambda *_: self.see(), during=during)
        return found

    def _result(self, changes: Mapping[str, Change], run: Callable[[], Any]) -> Any:
        with self.changed(changes):
            return run()

    @contextlib.contextmanager
    def changed(self, changes: Mapping[str, Change]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, change in changes.items():
                stack.enter_context(change(self.layers[name]))
            yield
