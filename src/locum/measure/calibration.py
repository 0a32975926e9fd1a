"""One pass over calibration data that adds up what every router and expert does, at the experts interface.

    calibrate --observing--> router hooks and an experts function --RouterEvent, RoutedEvent--> Sums --> Statistics

For the time of the pass, transformers' experts interface gets one more implementation, which computes the layer's true
output and looks at it on the way; afterwards the model and the interface are exactly as before, however the pass ended.

Blocks are taken domain by domain, so a batch belongs to one domain. `order_B` is that order; `next_block` counts in it.

Letters: B blocks, S tokens of a block, T = B*S tokens of a batch, K top-k, P = T*K selected (token, expert) pairs, C those
of a few experts, E experts, D model width, F expert width, G 2F with a gate and F without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import DataError, OptionError, StatisticsError, UnsupportedModel
from ..files import provenance as make_provenance
from ..models.families import MoeLayer
from ..models.routers import router_logits
from ..models.sizes import shape_of
from ..stats.sums import RoutedEvent, RouterEvent, Statistics, Sums, check_needs, check_same_origin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data.tokens import Tokens
from ..models.watch import evaluating, experts_implementation, observable_layers, run_experts


def calibrate(
    model: PreTrainedModel,
    tokens: Tokens,
    *,
    batch_size: int = 8,
    needs: tuple[str, ...] | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_batch: Callable[[Statistics, int], None] | None = None,
    save_every: int = 50,
    start: tuple[Statistics, int] | None = None,
) -> Statistics:
    """Statistics of every MoE layer of a model over these tokens, per domain. Padding is left out; prompts count.

    `needs` names the statistics to collect (by default all but those on demand only). `provenance` adds what only the
    caller knows: the fingerprints of model and tokenizer, the seed. `progress(done, total)` is called after every batch,
    in blocks.
    `on_batch(statistics_so_far, next_block)` is called after every `save_every` batches; to go on from there, pass the
    pair as `start`. Afterwards, also after an error or Ctrl-C, the model is as it was.

    Raises UnsupportedModel for a model that cannot be observed, DataError for tokens that do not fit it, OptionError
    for a bad option and StatisticsError for a `start` that belongs to something else.
    """
    needs = check_needs(needs)
    for name, value in (("batch_size", batch_size), ("save_every", save_every)):
        if value < 1:
            raise OptionError(f"{name} is {value!r}; allowed: whole numbers from 1")
    _check_tokens(model, tokens)
    layers = observable_layers(model)
    origin = _origin(model, tokens, provenance or {})
    done, next_block = (None, 0) if start is None else _checked_start(start, origin, needs, tokens)
    order_B = torch.argsort(tokens.domain_B, stable=True)
    sums = Sums("", needs)
    with observed(model, layers, needs) as observer, evaluating(model):
        for number, (domain, blocks_B) in enumerate(_batches(tokens, order_B[next_block:], batch_size), start=1):
            if domain != sums.domain:
                done, sums = _plus(done, sums, origin), Sums(domain, needs)
            _run_batch(model, tokens, blocks_B, observer, sums)
            next_block += len(blocks_B)
            if progress is not None:
                progress(next_block, len(order_B))
            if on_batch is not None and number % save_every == 0:
                on_batch(_plus(done, sums, origin), next_block)
    return _plus(done, sums, origin)


def _run_batch(model: PreTrainedModel, tokens: Tokens, blocks_B: Tensor, observer: Observer, sums: Sums) -> None:
    """One forward pass, cut to what is not padding: whole blocks and, at the end, whole columns."""
    blocks_B = blocks_B[(tokens.attention_BS[blocks_B] != 0).any(dim=1)]
    if not len(blocks_B):
        return
    width = int((tokens.attention_BS[blocks_B] != 0).any(dim=0).nonzero().max()) + 1
    attention_BS = tokens.attention_BS[blocks_B, :width] != 0
    observer.begin_batch(sums, attention_BS, model.device)
    sums.num_tokens += int(attention_BS.sum())
    mask_BS = None if bool(attention_BS.all()) else attention_BS.to(model.device, torch.int64)
    with torch.inference_mode():
        # The body without the language-modelling head: nobody reads the logits over the vocabulary.
        model.base_model(tokens.ids_BS[blocks_B, :width].to(model.device), attention_mask=mask_BS, use_cache=False)


def _batches(tokens: Tokens, order_B: Tensor, batch_size: int) -> Iterator[tuple[str, Tensor]]:
    """Domain and blocks of batches that hold one domain each."""
    domains, lengths = torch.unique_consecutive(tokens.domain_B[order_B], return_counts=True)
    for domain, blocks_B in zip(domains.tolist(), order_B.split(lengths.tolist()), strict=True):
        for part_B in blocks_B.split(batch_size):
            yield tokens.domains[domain], part_B


# --- checks and provenance --------------------------------------------------------------------------------------


def _check_tokens(model: PreTrainedModel, tokens: Tokens) -> None:
    if not bool((tokens.attention_BS != 0).any()):
        raise DataError("no calibration tokens: every block is empty or padding; give more text")
    largest, vocabulary = int(tokens.ids_BS.max()), model.get_input_embeddings().weight.shape[0]
    if largest >= vocabulary:
        raise DataError(
            f"the calibration tokens contain id {largest}, but the model embeds ids 0 to {vocabulary - 1}; tokenise the "
            f"data with the model's own tokenizer"
        )


def _origin(model: PreTrainedModel, tokens: Tokens, known: Mapping[str, Any]) -> dict[str, Any]:
    unknown = {
        "model_fingerprint": None,
        "tokenizer_fingerprint": None,
        "seed": None,
        "shape": shape_of(model).to_json(),
    }
    return make_provenance(**{**unknown, **known, "data_fingerprint": tokens.fingerprint, "tokens": 0})


def _checked_start(
    start: tuple[Statistics, int], origin: dict[str, Any], needs: tuple[str, ...], tokens: Tokens
) -> tuple[Statistics, int]:
    done, next_block = start
    check_same_origin(done.provenance, origin)
    if done.provenance["data_fingerprint"] != tokens.fingerprint:
        raise StatisticsError(
            f"the partial statistics are of data {done.provenance['data_fingerprint']!r}, but these tokens are "
            f"{tokens.fingerprint!r}; go on with the same data, length and seed, or start afresh"
        )
    if set(done.names) != set(needs):
        raise StatisticsError(
            f"the partial statistics hold {', '.join(done.names)}, but {', '.join(sorted(needs))} are to be collected; go "
            f"on with the same needs, or start afresh"
        )
    if not 0 <= next_block <= len(tokens.domain_B):
        raise StatisticsError(
            f"next_block is {next_block!r}; allowed: 0 to {len(tokens.domain_B)}, the number of blocks"
        )
    return done, next_block


def _plus(done: Statistics | None, sums: Sums, origin: dict[str, Any]) -> Statistics | None:
    """What is done with the running sums on top. Sums of a domain without tokens add nothing."""
    if sums.num_tokens == 0:
        return done
    more = sums.statistics(origin)
    return more if done is None else done + more


# --- observing --------------------------------------------------------------------------------------------------


class Observer:
    """Turns what routers and experts do in one batch into events, without padding, for the sums of its domain."""

    def __init__(self, layers: tuple[MoeLayer, ...]) -> None:
        self.name_of = {id(layer.experts): layer.shape.name for layer in layers}
        self.sums = Sums("", ())

    def begin_batch(self, sums: Sums, attention_BS: Tensor, device: torch.device) -> None:
        self.sums = sums
        self.num_rows = attention_BS.numel()
        self.sample_lengths = tuple(attention_BS.sum(dim=1).tolist())
        self.keep_T = None if bool(attention_BS.all()) else attention_BS.flatten().to(device)

    def saw_router(self, layer: MoeLayer, output: Any) -> None:
        logits = router_logits(output, layer.family.router)
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        num_experts = layer.shape.num_experts
        if (
            not isinstance(logits, Tensor)
            or shape[-1:] != (num_experts,)
            or logits.numel() != self.num_rows * num_experts
        ):
            raise UnsupportedModel(
                f"router {layer.shape.router} gave {shape} first; expected logits of {self.num_rows} tokens for "
                f"{num_experts} experts; statistics of the router cannot be collected for this model"
            )
        logits_TE = logits.reshape(-1, num_experts)
        logits_TE = logits_TE if self.keep_T is None else logits_TE[self.keep_T.to(logits.device)]
        self.sums.add(layer.shape.name, RouterEvent(logits_TE, self.sample_lengths))

    def experts_forward(self, experts: nn.Module, x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """An implementation of transformers' experts interface that also looks."""
        y_TD, event, token_P = run_experts(experts, x_TD, index_TK, gate_TK, self.sums.wants_inside)
        if len(x_TD) != self.num_rows:
            raise UnsupportedModel(
                f"{self.name_of[id(experts)]} was called with {len(x_TD)} tokens, the batch has {self.num_rows}; padding "
                f"cannot be told from text, so this model cannot be calibrated"
            )
        if self.sums.wants(RoutedEvent):
            if self.keep_T is not None:
                event = _select_pairs(event, self.keep_T.to(token_P.device)[token_P])
            self.sums.add(self.name_of[id(experts)], event)
        return y_TD


def _select_pairs(event: RoutedEvent, keep_P: Tensor) -> RoutedEvent:
    expert_P = event.expert_P[keep_P]
    counts = tuple(torch.bincount(expert_P, minlength=len(event.counts)).tolist())
    inside = (None if x_PI is None else x_PI[keep_P] for x_PI in (event.in_PD, event.hidden_PF))
    return RoutedEvent(expert_P, event.gate_P[keep_P], event.out_PD[keep_P], counts, *inside)


# --- leaving everything as it was -------------------------------------------------------------------------------


@contextlib.contextmanager
def observed(model: PreTrainedModel, layers: tuple[MoeLayer, ...], needs: tuple[str, ...]) -> Iterator[Observer]:
    """Look at every router and experts module for as long as the block runs; nothing stays behind in any case."""
    observer = Observer(layers)
    with contextlib.ExitStack() as stack:
        if Sums("", needs).wants(RouterEvent):
            for layer in layers:
                hook = layer.router.register_forward_hook(_router_hook(observer, layer))
                stack.callback(hook.remove)
        stack.enter_context(experts_implementation(model, layers, observer.experts_forward))
        yield observer


def _router_hook(observer: Observer, layer: MoeLayer) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_router: nn.Module, _inputs: Any, output: Any) -> None:
        observer.saw_router(layer, output)

    return hook
