"""One pass over calibration data that adds up what every router and expert does, at the experts interface.

    calibrate --observed--> watchers --events--> Sums --> Statistics

For the time of the pass, transformers' experts interface gets one more implementation, which computes the layer's true
output and looks at it on the way; afterwards the model and the interface are exactly as before, however the pass ended.
Every event that calibration makes has a watcher (`WATCHERS`), which puts its hooks in place and removes them. A new one
is a class in stats/events.py, a watcher, and the statistics that read it.

Blocks are taken domain by domain, so a batch belongs to one domain. `order_B` is that order; `next_block` counts in it.

Letters: B blocks, S tokens of a block, T tokens of a batch, K top-k, P pairs (token, expert), Q pairs of a few experts,
E experts, D model width, F expert width, G 2F with a gate and F without.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import ranks
from ..data.tokens import check_vocabulary, cut, take
from ..errors import DataError, OptionError, StatisticsError, UnsupportedModel
from ..files import provenance as make_provenance
from ..models.decoder_layers import decoder_stack, place_in
from ..models.families import MoeLayer, read_expert
from ..models.layer_major import passes, together
from ..models.routers import router_logits
from ..models.sizes import shape_of
from ..models.watch import evaluating, experts_implementation, observable_layers, run_experts
from ..shapes import LayerShape
from ..stats.definitions import STATISTICS
from ..stats.events import (
    DecoderLayerEvent,
    Event,
    EveryExpertEvent,
    HiddenGradientEvent,
    RoutedEvent,
    RouterEvent,
    WeightGradientEvent,
    WeightsEvent,
)
from ..stats.merging import over_ranks
from ..stats.origin import Origin
from ..stats.sums import Pooled, Statistics, Sums, axis_sizes, check_needs, is_pooled, taken_up
from .every_output import outputs_of_all
from .gradients import Gradients
from .residuals import Residuals

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data.tokens import Tokens


def calibrate(
    model: PreTrainedModel,
    tokens: Tokens,
    *,
    batch_size: int = 8,
    needs: tuple[str, ...] | None = None,
    origin: Origin | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
    on_batch: Callable[[Statistics], None] | None = None,
    save_every: int = 50,
    start: Statistics | None = None,
    scratch: Path | None = None,
    dtype: torch.dtype | None = None,
) -> Statistics:
    """Statistics of every MoE layer of a model over these tokens, per domain. Padding is left out; prompts count.

    `needs` names the statistics to collect (by default all but those on demand only). `origin` is for what only
    the caller knows (the shape in the files, fingerprints), `provenance` for words: the seed, the sources.
    `progress(done, total)` is called after every batch, in blocks, `on_layer` of a streamed model after every layer.
    `on_batch(statistics_so_far)` is called after every `save_every` batches, and must not keep them: the next batch adds to
    them. To go on from there, pass what it saved as `start`. With a folder as `scratch`, Gram matrices lie in files without a
    name there, and not in memory. `dtype` is that of the model, where the checkpoint has another. A streamed model takes many
    batches at once, layer by layer (models/layer_major.py); numbers are the same. Ranks that have met (ranks.py) share the
    batches, and each gets the statistics of all.
    Afterwards, also after an error or Ctrl-C, the model is as it was.

    Raises UnsupportedModel for a model that cannot be observed, DataError for tokens that do not fit it, OptionError
    for a bad option and StatisticsError for a `start` that belongs to something else.
    """
    needs = check_needs(needs)
    asked = question(needs, batch_size, dtype)
    for name, value in (("batch_size", batch_size), ("save_every", save_every)):
        if value < 1:
            raise OptionError(f"{name} is {value!r}; allowed: whole numbers from 1")
    if not bool((tokens.attention_BS != 0).any()):
        raise DataError("no calibration tokens: every block is empty or padding; give more text")
    check_vocabulary(tokens, model.get_input_embeddings().weight.shape[0])
    observer = Observer(model, needs)
    origin = origin or Origin(shape_of(model), data_fingerprints=(tokens.fingerprint,))
    if start is not None:
        check_start(start, origin, asked, len(tokens.domain_B))
    words = make_provenance(**{"seed": None, **(provenance or {})})
    order_B = _order(tokens, batch_size)
    so_far, next_block = _SoFar(needs, asked, origin, words, scratch), 0
    if start is not None:
        next_block = start.next_block
        first = tokens.domains[int(tokens.domain_B[order_B[next_block]])] if next_block < len(order_B) else None
        so_far.take_up(start, first)
    told = progress or (lambda done, total: None)

    with observed(observer), evaluating(model):
        batches = _batches(tokens, order_B[next_block:], batch_size)
        for number, some in enumerate(together(model, batches, batch_size * tokens.length), start=1):
            before, count = next_block, sum(len(blocks_B) for _, blocks_B in some)

            def streamed(layer: int, layers: int, before: int = before, count: int = count) -> None:
                told(before + count * layer // (layers + 1), len(order_B))
                on_layer(layer, layers)

            _run_batches(model, tokens, [(so_far.sums_of(domain), b) for domain, b in some], observer, streamed)
            next_block += count
            told(next_block, len(order_B))
            is_time = on_batch is not None and (number % save_every == 0 or len(some) > 1)
            if is_time and (now := so_far.statistics()) is not None:
                on_batch(replace(now, next_block=next_block))
    return so_far.statistics() if ranks.count() == 1 else so_far.of_all_ranks(tokens)


def _order(tokens: Tokens, batch_size: int) -> Tensor:
    """The blocks that this rank takes, one domain after the other: whole batches, so that all ranks see those of one."""
    order_B = torch.argsort(tokens.domain_B, stable=True)
    if ranks.count() == 1:
        return order_B
    mine = [blocks_B for _, blocks_B in ranks.share(_batches(tokens, order_B, batch_size))]
    return torch.cat(mine) if mine else order_B[:0]


class _SoFar:
    """What is added up: statistics of the domains that are done, and running sums of those that are not."""

    def __init__(
        self,
        needs: tuple[str, ...],
        asked: Mapping[str, Any],
        origin: Origin,
        words: Mapping[str, Any],
        scratch: Path | None,
    ) -> None:
        self.needs, self.asked, self.origin, self.words, self.scratch = needs, asked, origin, words, scratch
        self.done: Statistics | None = None
        self.running: dict[str, Sums] = {}
        self.pooled = Pooled(scratch)

    def take_up(self, start: Statistics, domain: str | None) -> None:
        """Go on from statistics that were saved, with the next blocks of this domain."""
        start = replace(start, next_block=None, provenance=self.words)
        self.done, sums, self.pooled = taken_up(start, domain, self.needs, self.scratch)
        if sums is not None:
            self.running[domain] = sums

    def sums_of(self, domain: str) -> Sums:
        return self.running.setdefault(domain, Sums(domain, self.needs, self.pooled))

    def statistics(self) -> Statistics | None:
        """All of it. Only the last domain may go on; sums of one without tokens add nothing."""
        *ended, last = self.running.values() or (None,)
        for sums in ended:
            self.done = self._with(sums)
            del self.running[sums.domain]
        found = self._with(last)
        return None if found is None else self.pooled.joined_to(found)

    def of_all_ranks(self, tokens: Tokens) -> Statistics:
        """All of it, of every rank, with the domains in the order in which one rank would meet them."""
        has_text_B = (tokens.attention_BS != 0).any(dim=1)
        domains = tuple(tokens.domains[i] for i in tokens.domain_B[has_text_B].unique().tolist())
        mine = self.statistics()
        layers: dict[str, dict[str, Tensor]] = {}
        for layer in self.origin.shape.layers:
            layers[layer.name] = {}
            for name in (name for name in self.needs if not is_pooled(name)):
                total = torch.zeros(len(domains), *self._sizes(layer, name), dtype=torch.float64)
                if mine is not None:
                    rows = torch.tensor([domains.index(domain) for domain in mine.domains])
                    total.index_add_(0, rows, mine.layers[layer.name][name])
                layers[layer.name][name] = over_ranks(total, STATISTICS[name].merge)
            for name in filter(is_pooled, self.needs):
                self.pooled.merge_ranks(layer.name, name, self._sizes(layer, name))
        seen = int(ranks.add_up(torch.tensor(0 if mine is None else mine.tokens)))
        whole = Statistics(domains, layers, self.origin, seen, dict(self.words), asked=self.asked)
        return self.pooled.joined_to(whole)

    def _sizes(self, layer: LayerShape, name: str) -> tuple[int, ...]:
        return axis_sizes(layer, STATISTICS[name].axes, self.origin.shape.vocab_size)

    def _with(self, sums: Sums | None) -> Statistics | None:
        if sums is None or sums.num_tokens == 0:
            return self.done
        more = sums.statistics(self.origin, self.words)
        return replace(more if self.done is None else self.done + more, asked=self.asked)


def _run_batches(
    model: PreTrainedModel,
    tokens: Tokens,
    batches: list[tuple[Sums, Tensor]],
    observer: Observer,
    progress: Callable[[int, int], None],
) -> None:
    """Forward passes of blocks, each for the sums of their domain."""
    jobs, current = [], []
    for sums, blocks_B in batches:
        blocks_B = blocks_B[(tokens.attention_BS[blocks_B] != 0).any(dim=1)]
        if not len(blocks_B):
            continue
        # Cut to what is not padding: whole blocks and, at the end, whole columns.
        width = int((tokens.attention_BS[blocks_B] != 0).any(dim=0).nonzero().max()) + 1
        attention_BS = tokens.attention_BS[blocks_B, :width] != 0
        ids_BS = tokens.ids_BS[blocks_B, :width]
        current.append(CurrentBatch.of(sums, ids_BS, attention_BS, model.device))
        sums.num_tokens += int(attention_BS.sum())
        if observer.gradients is None:
            jobs.append(functools.partial(_run_batch, model, ids_BS, attention_BS))
        else:
            jobs.append(functools.partial(observer.gradients.run, cut(take(tokens, blocks_B), width), sums.add))

    def turn(job: int) -> None:
        observer.batch = current[job]

    for _ in passes(model, jobs, turn, progress):
        pass


def _run_batch(model: PreTrainedModel, ids_BS: Tensor, attention_BS: Tensor) -> None:
    mask_BS = None if bool(attention_BS.all()) else attention_BS.to(model.device, torch.int64)
    with torch.inference_mode():
        # The body without the language-modelling head: nobody reads the logits over the vocabulary.
        model.base_model(ids_BS.to(model.device), attention_mask=mask_BS, use_cache=False)


def _batches(tokens: Tokens, order_B: Tensor, batch_size: int) -> Iterator[tuple[str, Tensor]]:
    """Domain and blocks of batches that hold one domain each."""
    domains, lengths = torch.unique_consecutive(tokens.domain_B[order_B], return_counts=True)
    for domain, blocks_B in zip(domains.tolist(), order_B.split(lengths.tolist()), strict=True):
        for part_B in blocks_B.split(batch_size):
            yield tokens.domains[domain], part_B


# --- where it comes from ----------------------------------------------------------------------------------------


def question(needs: tuple[str, ...], batch_size: int, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """What the numbers of a pass depend on, beside its origin; the last bits depend on the batches. `dtype` is that in which a
    model computes that has another."""
    asked = {"needs": sorted(needs), "batch_size": batch_size}
    return asked if dtype is None else {**asked, "dtype": str(dtype).removeprefix("torch.")}


def check_start(start: Statistics, origin: Origin, asked: Mapping[str, Any], num_blocks: int) -> None:
    """Raise StatisticsError unless a pass that was interrupted goes on to what is asked for now."""
    if differ := start.unlike(origin, asked):
        raise StatisticsError(
            f"the partial statistics answer something else: {differ}; go on with what was asked then, or start afresh"
        )
    if not set(asked["needs"]) <= set(start.names):
        raise StatisticsError(f"the partial statistics lack some of {', '.join(asked['needs'])}; start afresh")
    if start.next_block is None or not 0 <= start.next_block <= num_blocks:
        raise StatisticsError(f"next_block is {start.next_block!r}; allowed: 0 to {num_blocks}, the number of blocks")


# --- observing --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CurrentBatch:
    """What is known of the batch that is in the model."""

    sums: Sums  # of its domain
    num_rows: int  # tokens, padding included
    sample_lengths: tuple[int, ...]
    keep_T: Tensor | None  # which tokens are text; None: all are
    ids_T: Tensor  # their numbers in the vocabulary

    @classmethod
    def of(cls, sums: Sums, ids_BS: Tensor, attention_BS: Tensor, device: torch.device) -> CurrentBatch:
        keep_T = None if bool(attention_BS.all()) else attention_BS.flatten().to(device)
        lengths = tuple(attention_BS.sum(dim=1).tolist())
        return cls(sums, attention_BS.numel(), lengths, keep_T, ids_BS.flatten().to(device))

    def text(self, x_TI: Tensor) -> Tensor:
        """The rows that are no padding."""
        return x_TI if self.keep_T is None else x_TI[self.keep_T.to(x_TI.device)]


class Observer:
    """Turns what layers do in one batch into events, without padding, for the sums of its domain."""

    def __init__(self, model: PreTrainedModel, needs: tuple[str, ...]) -> None:
        definitions = [STATISTICS[name] for name in needs]
        self.model, self.layers = model, observable_layers(model)
        self.vocab_size = model.get_input_embeddings().weight.shape[0]
        self.name_of = {id(layer.experts): layer.shape.name for layer in self.layers}
        self.events = {definition.event for definition in definitions}
        self.inside = any(definition.inside for definition in definitions) or HiddenGradientEvent in self.events
        self.residuals = Residuals(model, self.layers) if any(d.turns for d in definitions) else None
        back = self.events & {HiddenGradientEvent, WeightGradientEvent}
        self.gradients = Gradients(model, self.layers, back) if back else None
        self.weighed: set[str] = set()  # layers whose weights were looked at
        self.batch: CurrentBatch | None = None  # set by the pass before the model runs

    def saw_router(self, layer: MoeLayer, output: Any) -> None:
        logits, batch = router_logits(output, layer.family.router), self.batch
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        num_experts = layer.shape.num_experts
        if (
            not isinstance(logits, Tensor)
            or shape[-1:] != (num_experts,)
            or logits.numel() != batch.num_rows * num_experts
        ):
            raise UnsupportedModel(
                f"router {layer.shape.router} gave {shape} first; expected logits of {batch.num_rows} tokens for "
                f"{num_experts} experts; statistics of the router cannot be collected for this model"
            )
        logits_TE = batch.text(logits.detach().reshape(-1, num_experts))
        batch.sums.add(layer.shape.name, RouterEvent(logits_TE, batch.sample_lengths))

    def saw_decoder_layer(self, name: str, before: Any, after: Any) -> None:
        states, batch = [x[0] if isinstance(x, tuple) else x for x in (before, after)], self.batch
        if (
            any(not isinstance(x, Tensor) or x.numel() % batch.num_rows for x in states)
            or states[0].shape != states[1].shape
        ):
            raise UnsupportedModel(
                f"{name}: its decoder layer does not give one hidden state for each that it is given, so how far it turns a token is "
                f"not known; leave out what asks for it (method block-drop)"
            )
        before_TD, after_TD = (batch.text(x.detach().reshape(batch.num_rows, -1)) for x in states)
        batch.sums.add(name, DecoderLayerEvent(before_TD, after_TD))

    def experts_forward(self, experts: nn.Module, x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """An implementation of transformers' experts interface that also looks."""
        y_TD, event = run_experts(experts, x_TD, index_TK, gate_TK, self.inside)
        name, batch = self.name_of[id(experts)], self.batch
        if len(x_TD) != batch.num_rows:
            raise UnsupportedModel(
                f"{name} was called with {len(x_TD)} tokens, the batch has {batch.num_rows}; padding cannot be told from "
                f"text, so this model cannot be calibrated"
            )
        if self.gradients is not None:
            self.gradients.watch(name, event, batch.keep_T)
        with torch.no_grad():
            self._count(name, experts, x_TD.detach(), y_TD.detach(), event.detached())
        return y_TD

    def _count(self, name: str, experts: nn.Module, x_TD: Tensor, y_TD: Tensor, event: RoutedEvent) -> None:
        batch = self.batch
        if WeightsEvent in self.events and name not in self.weighed:
            self.weighed.add(name)
            batch.sums.add(name, weights_event(next(x for x in self.layers if x.experts is experts)))
        if EveryExpertEvent in self.events:
            for out_TED in outputs_of_all(experts, batch.text(x_TD)):
                batch.sums.add(name, EveryExpertEvent(out_TED))
        if RoutedEvent not in self.events:
            return
        ids_T = batch.ids_T.to(event.token_P.device)
        event = replace(event, id_P=ids_T[event.token_P], vocab_size=self.vocab_size)
        if self.residuals is not None:
            before_TD = self.residuals.of(name, y_TD).double()
            turn_T = (1 - functional.cosine_similarity(before_TD, before_TD + y_TD, dim=-1)).clamp(min=0)
            event = replace(event, turn_P=turn_T[event.token_P])
        batch.sums.add(name, event if batch.keep_T is None else event.of_tokens(batch.keep_T))


def weights_event(layer: MoeLayer) -> WeightsEvent:
    """The weights of a live layer."""
    rows = [part.tensor.detach().movedim(part.axis, 0) for part in layer.per_expert if part.tensor.ndim == 2]
    if not rows:
        raise UnsupportedModel(f"router {layer.shape.router} has no matrix with a row for each expert")
    count = layer.shape.num_experts
    return WeightsEvent(tuple(read_expert(layer.experts, e).matrices for e in range(count)), rows[0][:count])


# --- leaving everything as it was -------------------------------------------------------------------------------


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Look at every layer for as long as the block runs; nothing stays behind in any case."""
    with contextlib.ExitStack() as stack:
        for watch in WATCHERS.values():
            stack.enter_context(watch(observer))
        yield


@contextlib.contextmanager
def watch_routers(observer: Observer) -> Iterator[None]:
    """A hook on every router, where a statistic reads it."""

    def hook_of(layer: MoeLayer) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _router, _inputs, output: observer.saw_router(layer, output)

    watched = observer.layers if RouterEvent in observer.events else ()
    hooks = [layer.router.register_forward_hook(hook_of(layer)) for layer in watched]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def watch_experts(observer: Observer) -> Iterator[None]:
    """The experts run through the observer, whatever is collected: so all passes compute the same numbers."""
    residuals = observer.residuals.watched() if observer.residuals is not None else contextlib.nullcontext()
    with residuals, experts_implementation(observer.model, observer.layers, observer.experts_forward):
        yield


@contextlib.contextmanager
def watch_decoder_layers(observer: Observer) -> Iterator[None]:
    """A hook on every decoder layer with experts, where a statistic reads what it makes of a hidden state."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            observer.saw_decoder_layer(name, given or named.get("hidden_states"), output)

        return hook

    hooks = []
    if DecoderLayerEvent in observer.events:
        names = [layer.shape.name for layer in observer.layers]
        prefix, stack = decoder_stack(observer.model, names)
        hooks = [stack[place_in(prefix, n)].register_forward_hook(hook_of(n), with_kwargs=True) for n in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def watch_gradients(observer: Observer) -> contextlib.AbstractContextManager[None]:
    """Gradients go where they are asked for, and nowhere else."""
    return contextlib.nullcontext() if observer.gradients is None else observer.gradients.ready()


def watched_with_experts(_observer: Observer) -> contextlib.AbstractContextManager[None]:
    """Nothing: what runs the experts makes these events."""
    return contextlib.nullcontext()


WATCHERS: dict[type[Event], Callable[[Observer], contextlib.AbstractContextManager[None]]] = {
    RouterEvent: watch_routers,
    RoutedEvent: watch_experts,
    DecoderLayerEvent: watch_decoder_layers,
    WeightsEvent: watched_with_experts,
    EveryExpertEvent: watched_with_experts,
    HiddenGradientEvent: watch_gradients,
    WeightGradientEvent: watched_with_experts,
}
