"""Running a live model while some of its MoE layers are changed: whole, or with one decoder layer in memory at a time.

A change is a function of a layer whose context is entered for as long as the change holds: masked routers, a container in the place of the
experts, noise. Of a streamed model, each layer is changed while it computes for the job, so that jobs with other changes go through the
layers side by side, and the weights are read once for as many jobs as have room (`together`). Of a whole model, the layers before the
first that is changed do not run again (models/known_layers.py).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import UnsupportedModel
from ..models.decoder_layers import decoder_stack, place_in
from ..models.families import MoeLayer
from ..models.known_layers import KnownLayers
from ..models.layer_major import Resident, is_streamed, passes, together
from ..models.watch import evaluating, observable_layers

Change = Callable[[MoeLayer], contextlib.AbstractContextManager[Any]]
Changes = Mapping[str, Change]  # by layer
Run = Callable[[], Any]  # what runs the model once


class ChangingModel:
    """A live model, those of its layers that are there, and what it gives while they are changed."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.resident = Resident(model)
        self.see()
        self._prefix, self._known = "", None
        with contextlib.suppress(UnsupportedModel):
            self._prefix, stack = decoder_stack(model, list(self.layers))
            self._known = KnownLayers(stack)

    def see(self) -> None:
        """Find the layers afresh: those of a streamed model have other tensors whenever they are read."""
        self.layers: dict[str, MoeLayer] = {layer.shape.name: layer for layer in observable_layers(self.model)}

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        with torch.no_grad(), evaluating(self.model):
            yield

    def results(self, changes: Sequence[Changes], runs: Sequence[Run], tokens: int) -> list[list[Any]]:
        """What every run gives under each of these changes, run by run. There is one run for each batch, of at most so many tokens."""
        if not is_streamed(self.model):
            return [[self._result(each, b, runs) for b in range(len(runs))] for each in changes]
        self.resident.let_go()
        prefix, _ = decoder_stack(self.model, list(self.layers))
        found: list[Any] = []
        for some in together(self.model, itertools.product(changes, runs), tokens):

            def during(
                index: int, job: int, some: list[tuple[Changes, Run]] = some
            ) -> contextlib.AbstractContextManager[Any]:
                return self.changed({n: x for n, x in some[job][0].items() if place_in(prefix, n) == index})

            jobs = [run for _, run in some]
            found += passes(self.model, jobs, before_layer=lambda *_: self.see(), during=during)
        return [found[first : first + len(runs)] for first in range(0, len(found), len(runs))]

    def _result(self, changes: Changes, batch: int, runs: Sequence[Run]) -> Any:
        known, first = self._known, 0
        if known is not None and not changes:
            return known.record(batch, runs[batch])
        if known is not None:
            first = min(place_in(self._prefix, name) for name in changes)
            known.try_beginning(0, runs[0], first)
        with self.changed(changes):
            return runs[batch]() if known is None else known.run(batch, runs[batch], first)

    @contextlib.contextmanager
    def changed(self, changes: Changes) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, change in changes.items():
                stack.enter_context(change(self.layers[name]))
            yield
