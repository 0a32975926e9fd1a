"""Running many batches through a model layer by layer, with the weights of one decoder layer in memory at a time.

The model's own forward runs for every batch, each in a thread of its own. Where it calls a decoder layer, the thread waits
and this one computes the layer's output: first that of all batches at layer 0, then at layer 1, and so on. Whatever a model
does around its layers (masks, rotary embeddings, arguments of a layer) thus stays its own code, of any family, and only one
thread computes at a time.

    together(model, batches)   lists of batches that go through the model in one run: one each, or many where it is streamed
    passes(model, jobs)        the results of jobs that run a model: one after the other, or layer by layer where it is streamed

A job is any function that runs the model's forward once.
"""

from __future__ import annotations

import contextlib
import contextvars
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModel
from .waiting import Away, WaitingStates

NOTE = "_locum_layers"  # the attribute of a live model that is streamed
HELD, COPIES = (
    2**30,
    4,
)  # bytes of hidden states between two layers; a layer's input and output, and what lies beside them
DEVICES = ("cpu", "cuda")
Result = TypeVar("Result")
Batch = TypeVar("Batch")
Job = Callable[[], Result]


class Layers(Protocol):
    """The decoder layers of a model that is run layer by layer."""

    @property
    def modules(self) -> Sequence[nn.Module]: ...

    def bring(self, index: int) -> None:
        """Give layer `index` its weights."""
        ...

    def drop(self, index: int) -> None:
        """Take them away."""
        ...

    def change(self, index: int, change: Callable[[], None]) -> None:
        """Have a layer changed by this whenever it is brought."""
        ...


class WholeLayers:
    """The decoder layers of a model that is in memory, to be run layer by layer: all are there, and none is changed."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules

    def bring(self, index: int) -> None:
        pass

    def drop(self, index: int) -> None:
        pass


def layers_of(model: Any) -> Layers | None:
    """The layers of a streamed model; None for one that is whole."""
    return getattr(model, NOTE, None)


def is_streamed(model: Any) -> bool:
    return layers_of(model) is not None


class Resident:
    """Those of a streamed model's layers that have weights between its runs: as few as are asked for at a time."""

    def __init__(self, model: Any) -> None:
        self._layers, self._there = layers_of(model), range(0)

    def hold(self, first: int, last: int) -> bool:
        """Bring these layers and no others. False where they are there already, or the model is whole."""
        wanted = range(first, last + 1)
        if self._layers is None or wanted == self._there:
            return False
        self.let_go(but=wanted)
        for index in wanted:
            if index not in self._there:
                self._layers.bring(index)
        self._there = wanted
        return True

    def let_go(self, but: range = range(0)) -> None:
        """Drop the layers that are there."""
        for index in self._there:
            if index not in but:
                self._layers.drop(index)
        self._there = range(0) if not but else range(max(but.start, self._there.start), min(but.stop, self._there.stop))

    def change(self, index: int, change: Callable[[], None]) -> None:
        """Have a layer, which is not there, changed by this whenever it comes."""
        self._layers.change(index, change)


def together(model: PreTrainedModel, batches: Iterable[Batch], tokens: int) -> Iterator[list[Batch]]:
    """Batches of at most so many tokens, in lists that `passes` can take at once. A streamed model reads its weights once for
    each list, and holds the hidden states of all of it: at most HELD bytes of them, or one batch."""
    count = max(1, HELD // held_bytes(model, tokens)) if is_streamed(model) else 1
    rest = iter(batches)
    while some := list(islice(rest, count)):
        yield some


def held_bytes(model: PreTrainedModel, tokens: int) -> int:
    """What the hidden states of a batch of so many tokens take between two layers."""
    return tokens * _width(model) * model.dtype.itemsize * COPIES


def _width(model: PreTrainedModel) -> int:
    return model.config.get_text_config().hidden_size


def passes(
    model: PreTrainedModel,
    jobs: Sequence[Job[Result]],
    turn: Callable[[int], None] = lambda job: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    before_layer: BeforeLayer | None = None,
    during: During | None = None,
    scratch: Path | None = None,
) -> Iterator[Result]:
    """The results of the jobs, in order. `turn(i)` is called whenever it is job i that computes from now on.

    Of a streamed model alone: `before_layer(index, calls)` may change a layer, which is there, before any job gets its output;
    `calls[i]` is how job i calls it, or None. `during(index, i)` is entered while the layer computes for job i. With `scratch`, a
    folder, hidden states of jobs that wait lie in a file there.

    One after the other, each when its result is asked for; or, on a streamed model, all of them layer by layer before the first
    result is there, `progress(done, total)` in layers. Raises what a job raises.
    """
    layers = layers_of(model)
    if layers is None:
        for index, job in enumerate(jobs):
            turn(index)
            yield job()
    else:
        states = None if scratch is None else WaitingStates(scratch, model, _width(model))
        yield from _LayerMajor(layers, jobs, turn, during, states).run(progress, before_layer)


class _Stopped(BaseException):
    """Raised in the threads of a run that is given up."""


@dataclass(frozen=True)
class TorchState:
    """What of torch is a thread's own."""

    inference: bool
    gradients: bool
    autocast: tuple[tuple[str, torch.dtype], ...]  # by kind of device

    @classmethod
    def now(cls) -> TorchState:
        casts = [(kind, torch.get_autocast_dtype(kind)) for kind in DEVICES if torch.is_autocast_enabled(kind)]
        return cls(torch.is_inference_mode_enabled(), torch.is_grad_enabled(), tuple(casts))

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.gradients))
            for kind, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype))
            yield


@dataclass(frozen=True)
class LayerCall:
    """A decoder layer called by a job, with what the thread's state was."""

    layer: int
    given: tuple[Any, ...]
    named: dict[str, Any]
    context: contextvars.Context
    torch: TorchState
    away: Away | None = None  # its hidden states, where they are not in memory

    def there(self) -> contextlib.AbstractContextManager[None]:
        """While it is entered, what the layer is called with is in memory."""
        return contextlib.nullcontext() if self.away is None else self.away.there()


BeforeLayer = Callable[[int, "list[LayerCall | None]"], None]
During = Callable[[int, int], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class _End:
    """How a job ended."""

    result: Any = None
    error: BaseException | None = None


class _LayerMajor:
    """One run. Of the threads, at most one is not waiting."""

    def __init__(
        self,
        layers: Layers,
        jobs: Sequence[Job[Any]],
        turn: Callable[[int], None],
        during: During | None,
        states: WaitingStates | None,
    ) -> None:
        self.layers, self.jobs, self.turn, self.states = layers, jobs, turn, states
        self.during: During = during or (lambda layer, job: contextlib.nullcontext())
        self.from_jobs: queue.SimpleQueue[LayerCall | _End] = queue.SimpleQueue()
        self.to_jobs: list[queue.SimpleQueue[_End]] = [queue.SimpleQueue() for _ in jobs]
        self.now: list[LayerCall | _End | None] = [None] * len(jobs)
        self.forwards = [module.forward for module in layers.modules]
        self.job = threading.local()

    def run(self, progress: Callable[[int, int], None], before_layer: BeforeLayer | None = None) -> Iterator[Any]:
        threads = [threading.Thread(target=self._work, args=(index,), daemon=True) for index in range(len(self.jobs))]
        started = 0
        try:
            for index, module in enumerate(self.layers.modules):
                module.forward = self._asking(index)
            for index, thread in enumerate(threads):
                self.turn(index)
                thread.start()
                started += 1
                self._listen(index)
            for layer in range(len(self.forwards)):
                self.layers.bring(layer)
                if before_layer is not None:
                    calls = [now if isinstance(now, LayerCall) and now.layer == layer else None for now in self.now]
                    before_layer(layer, calls)
                for index in range(len(self.jobs)):
                    self._compute(index, layer)
                self.layers.drop(layer)
                progress(layer + 1, len(self.forwards))
            if any(isinstance(now, LayerCall) for now in self.now):
                raise UnsupportedModel(
                    "the model does not call its decoder layers in their order, so it cannot be streamed"
                )
        finally:
            for index in range(started):
                if isinstance(self.now[index], LayerCall):
                    self.to_jobs[index].put(_End(error=_Stopped()))
            for thread in threads[:started]:
                thread.join()
            for module in self.layers.modules:
                module.__dict__.pop("forward", None)
        for end in self.now:
            yield end.result

    def _work(self, index: int) -> None:
        """A job's thread."""
        self.job.index = index
        try:
            end = _End(self.jobs[index]())
        except BaseException as error:
            end = _End(error=error)
        self.from_jobs.put(end)

    def _asking(self, layer: int) -> Callable[..., Any]:
        """What stands in for a layer's forward: ask the run for its output, and wait."""

        def forward(*given: Any, **named: Any) -> Any:
            self.from_jobs.put(LayerCall(layer, given, named, contextvars.copy_context(), TorchState.now()))
            end = self.to_jobs[self.job.index].get()
            if end.error is not None:
                raise end.error
            return end.result

        return forward

    def _listen(self, index: int) -> None:
        """Wait until job `index` calls a layer or ends."""
        self.now[index] = now = self.from_jobs.get()
        if isinstance(now, _End) and now.error is not None:
            raise now.error
        if isinstance(now, LayerCall) and self.states is not None:
            self.now[index] = replace(now, away=self.states.put(index, (now.given, now.named)))

    def _compute(self, index: int, layer: int) -> None:
        """Answer a job for as long as it calls this layer."""
        while isinstance(call := self.now[index], LayerCall) and call.layer == layer:
            self.turn(index)
            self.now[index] = None
            if call.away is not None:
                call.away.bring()
            try:
                with call.torch.entered(), self.during(layer, index):
                    end = _End(call.context.run(self.forwards[layer], *call.given, **call.named))
            except BaseException as error:  # the job unwinds, and ends with it
                end = _End(error=error)
            self.to_jobs[index].put(end)
            self._listen(index)
