"""How well a model predicts text: loss, perplexity and bits per byte per domain, and how far it is from the original.

- One pass: model and original see the same batches in the same run, and the original's own numbers come along.
- Sums are kept per block, in float64. A value is a ratio of sums; its 95% interval resamples whole blocks, since
  tokens of one block are not independent. All metrics of a domain share their resamples, so differences are paired.
- The transformer body runs on a whole batch, the output head on a stretch of positions at a time: float32 logits of
  one stretch stay below LOGIT_BYTES whatever the batch, block and vocabulary.

Letters: B blocks, S tokens of a block, W positions of a stretch, V vocabulary, M predicted tokens, Y sums per block.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice, repeat
from typing import Any

import numpy as np
import torch

from .. import ranks
from ..data.tokens import Batch, Tokens, batches, check_vocabulary
from ..errors import LocumError, OptionError
from ..models.layer_major import is_streamed, passes, together
from ..models.output_head import check_predicts, run_body, run_head, vocabulary
from .memory import peak_bytes
from .rows import Row

LOGIT_BYTES = 128 * 1024**2
KEPT_BYTES = 1024**3  # most of the original's hidden states that are kept for further models
INTERVAL = (2.5, 97.5)  # percentiles
MOST_RESAMPLES = 1_000_000  # whose sums are in memory
SUMS = ("nats", "tokens", "bytes", "original_nats", "kl", "agreed")
Output = tuple[Any, Any]  # a model inside any adapters, and its body's output on a batch


def evaluate(
    model: Any,
    tokens: Tokens,
    *,
    against: Any = None,
    batch_size: int = 8,
    seed: int = 0,
    resamples: int = 1000,
    model_name: str = "model",
    against_name: str = "original",
    plan: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Measure a causal language model, and with `against` its distance from the original; rows per domain and "all".

    loss         nats per predicted token            perplexity      exp(loss)
    bits_per_byte  nats / ln 2 / UTF-8 bytes of the predicted tokens
    kl           mean of KL(original || model), nats per predicted token
    top1_agreement  fraction of predicted tokens whose likeliest token is the same (ties: the lower id)
    loss_delta   loss minus the original's loss

    `progress(done, total)` is called after every batch, in blocks, `on_layer` of streamed models after every layer.
    The original's own loss, perplexity and bits_per_byte are rows named `against_name` without a plan.
    Raises OptionError before any work if the tokens or the two models do not fit together.
    """
    if resamples < 1:
        raise OptionError(f"resamples is {resamples}; it must be 1 or more")
    start = time.perf_counter()
    sums_BY = block_sums(model, tokens, against=against, batch_size=batch_size, progress=progress, on_layer=on_layer)
    _check_finite(sums_BY, model_name, against_name)
    return rows_of(
        sums_BY,
        tokens,
        compared=against is not None,
        batch_size=batch_size,
        seed=seed,
        resamples=resamples,
        model_name=model_name,
        against_name=against_name,
        plan=plan,
        provenance=provenance,
        seconds=time.perf_counter() - start,
        peak=peak_bytes(model.device),
    )


def block_sums(
    model: Any,
    tokens: Tokens,
    *,
    against: Any = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
    of_original: list[Output] | None = None,
) -> np.ndarray:
    """[B, Y] float64: what every block of text adds to SUMS. The ranks share the batches.

    Many models beside one original share a list `of_original`, with the same tokens and batches: it gets the original's outputs the
    first time, up to KEPT_BYTES, and the original need not run again.
    """
    _check(model, against, tokens, batch_size)
    if against is not None and _hidden_bytes(against, tokens) > KEPT_BYTES:
        of_original = None
    mine = ranks.share(batches(tokens, batch_size))
    places_B = ranks.share(torch.arange(len(tokens)).split(batch_size))
    sums_BY, done = torch.zeros(len(tokens), len(SUMS), dtype=torch.float64), 0
    known = iter(list(of_original or ()))
    with _evaluating(model), _evaluating(against), torch.no_grad():
        for some in _together([model, against], mine, batch_size * tokens.length):
            theirs = list(islice(known, len(some))) or _outputs(against, some, on_layer, of_original)
            for made in _sums_of(model, theirs, some, on_layer):
                sums_BY[next(places_B)] = made
                done += len(made)
                progress(min(done * ranks.count(), len(tokens)), len(tokens))
    return ranks.add_up(sums_BY).numpy()


def rows_of(
    sums_BY: np.ndarray,
    tokens: Tokens,
    *,
    compared: bool,
    batch_size: int,
    seed: int,
    resamples: int,
    model_name: str,
    against_name: str,
    plan: str | None,
    provenance: Mapping[str, Any] | None,
    seconds: float,
    peak: int,
) -> list[Row]:
    """The rows that follow from sums, per domain and "all"; those of the original too where it was `compared` with."""
    shared = {
        "seed": seed,
        "seconds": seconds,
        "peak_bytes": peak,
        "provenance": {**(provenance or {}), "evaluation": _settings(tokens, batch_size, resamples)},
    }
    rows = []
    for domain, chosen_B in domains_of(tokens):
        measured = _measure(sums_BY[chosen_B], f"{seed}:{domain}", resamples, compared)
        n = int(sums_BY[chosen_B, SUMS.index("tokens")].sum())
        for (whose, metric), (value, low, high) in measured.items():
            name, of_plan = (model_name, plan) if whose == "model" else (against_name, None)
            rows.append(Row(name, of_plan, metric, domain, value, low, high, n, **shared))
    return rows


def domains_of(tokens: Tokens) -> Iterator[tuple[str, np.ndarray]]:
    """Every domain and "all", with which blocks are of it."""
    domain_B = tokens.domain_B.numpy()
    for i, domain in enumerate(tokens.domains):
        yield domain, domain_B == i
    yield "all", np.ones_like(domain_B, dtype=bool)


def _settings(tokens: Tokens, batch_size: int, resamples: int) -> dict[str, Any]:
    data = {"fingerprint": tokens.fingerprint, "split": tokens.split, "length": tokens.length}
    return {"data": {**data, "sources": list(tokens.sources)}, "batch_size": batch_size, "resamples": resamples}


def _check(model: Any, against: Any, tokens: Tokens, batch_size: int) -> None:
    if batch_size < 1:
        raise OptionError(f"batch_size is {batch_size}; it must be 1 or more")
    check_predicts(model, "it has no loss to evaluate")
    size = vocabulary(model)
    check_vocabulary(tokens, size)
    if against is not None and vocabulary(against) != size:
        raise OptionError(
            f"the model has a vocabulary of {size} and the original one of {vocabulary(against)}; "
            "compare a model with the checkpoint it was made from"
        )


def _check_finite(sums_BY: np.ndarray, model_name: str, against_name: str) -> None:
    for column, name in (("original_nats", against_name), ("nats", model_name), ("kl", model_name)):
        bad = np.flatnonzero(~np.isfinite(sums_BY[:, SUMS.index(column)]))
        if len(bad):
            raise LocumError(
                f"{name} gives {column} that are not finite in {len(bad)} of {len(sums_BY)} blocks (first: {bad[0]}); "
                "its weights hold NaN or overflow in this dtype: try float32, or check how it was made"
            )


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode, and every module's own mode again afterwards."""
    modes = [] if model is None else [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# logits and sums


def _hidden_bytes(model: Any, tokens: Tokens) -> int:
    return tokens.ids_BS.numel() * model.config.get_text_config().hidden_size * model.dtype.itemsize


def body_output(model: Any, batch: Batch) -> Output:
    """The model inside any adapters, and its body's output on a batch."""
    with torch.no_grad():  # a streamed model runs in threads of its own
        return run_body(model, batch.ids_BS, batch.attention_BS)


def _together(models: list[Any], given: Iterable[Batch], tokens: int) -> Iterator[list[Batch]]:
    """Batches in lists that every model takes at once."""
    return together(next((m for m in models if is_streamed(m)), models[0]), given, tokens)


def _outputs(
    model: Any, some: list[Batch], on_layer: Callable[[int, int], None], kept: list[Output] | None = None
) -> Iterable[Output]:
    """What a model gives on each of these batches, each when it is asked for; a streamed one has seen all of them then."""
    if model is None:
        return repeat((None, None))
    made = passes(model, [functools.partial(body_output, model, batch) for batch in some], progress=on_layer)
    if kept is None:
        return made
    kept.extend((inner, type(output)(last_hidden_state=output.last_hidden_state)) for inner, output in made)
    return kept[-len(some) :]


def _sums_of(
    model: Any, theirs: Iterable[Output], some: list[Batch], on_layer: Callable[[int, int], None]
) -> Iterator[torch.Tensor]:
    """The sums of each of these batches."""
    for batch, ours, original in zip(some, _outputs(model, some, on_layer), theirs, strict=False):
        yield batch_sums(*ours, *original, batch)


def batch_sums(inner: Any, output: Any, original: Any, original_output: Any, batch: Batch) -> torch.Tensor:
    """Sums per block [B, Y] in float64 on the CPU, in the order of SUMS; the original's are 0 without one.

    A model inside its adapters and its body's output on the batch, then the same of the original, or None twice.
    """
    size, length = batch.ids_BS.shape
    step = max(1, LOGIT_BYTES // (4 * size * vocabulary(inner)))
    sums_BY = torch.zeros(size, len(SUMS), dtype=torch.float64)
    for first in range(0, length - 1, step):
        stretch = slice(first, min(first + step, length - 1))
        predicted = slice(stretch.start + 1, stretch.stop + 1)
        mask_BW = batch.loss_mask_BS[:, predicted]
        if not mask_BW.any():
            continue
        target_M = batch.ids_BS[:, predicted][mask_BW]
        log_p_MV = _log_probabilities(inner, output, batch, stretch, mask_BW)
        log_o_MV = None
        if original is not None:
            log_o_MV = _log_probabilities(original, original_output, batch, stretch, mask_BW).to(log_p_MV.device)
        values_MY = _token_values(log_p_MV, log_o_MV, target_M.to(log_p_MV.device)).double().cpu()
        values_MY[:, SUMS.index("bytes")] = batch.bytes_BS[:, predicted][mask_BW].double()
        block_M = torch.nonzero(mask_BW)[:, 0]
        sums_BY.index_add_(0, block_M, values_MY)
    return sums_BY


def _log_probabilities(model: Any, output: Any, batch: Batch, stretch: slice, mask_BW: torch.Tensor) -> torch.Tensor:
    logits_BWV = run_head(model, output, output.last_hidden_state[:, stretch], batch.ids_BS[:, stretch])
    return logits_BWV[mask_BW.to(logits_BWV.device)].log_softmax(-1)


def _token_values(log_p_MV: torch.Tensor, log_o_MV: torch.Tensor | None, target_M: torch.Tensor) -> torch.Tensor:
    """What each predicted token adds to the sums [M, 6]; bytes are left to the caller."""
    nats_M = -log_p_MV.gather(1, target_M[:, None])[:, 0]
    zeros_M = torch.zeros_like(nats_M)
    if log_o_MV is None:
        return torch.stack([nats_M, zeros_M + 1, zeros_M, zeros_M, zeros_M, zeros_M], 1)
    original_M = -log_o_MV.gather(1, target_M[:, None])[:, 0]
    # A token that both rule out (log 0 twice) adds nothing; one that the model alone rules out adds infinity.
    terms_MV = torch.where(log_o_MV == -math.inf, 0.0, log_o_MV.exp() * (log_o_MV - log_p_MV))
    agreed_M = (log_p_MV.argmax(-1) == log_o_MV.argmax(-1)).to(nats_M.dtype)
    return torch.stack([nats_M, zeros_M + 1, zeros_M, original_M, terms_MV.sum(-1).clamp_min(0), agreed_M], 1)


# values and intervals


def _metrics(sums_RY: np.ndarray, compare: bool) -> dict[tuple[str, str], np.ndarray]:
    """Every metric from sums over blocks, one value per row; keyed by whose it is and its name."""
    nats, tokens, bytes_, original, kl, agreed = sums_RY.T
    values = {}
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for whose, sum_R in (("model", nats), ("original", original)) if compare else (("model", nats),):
            values[whose, "loss"] = sum_R / tokens
            values[whose, "perplexity"] = np.exp(sum_R / tokens)
            values[whose, "bits_per_byte"] = sum_R / math.log(2) / bytes_
        if compare:
            values["model", "kl"] = kl / tokens
            values["model", "top1_agreement"] = agreed / tokens
            values["model", "loss_delta"] = (nats - original) / tokens
    return values


def _measure(
    sums_BY: np.ndarray, seed: str, resamples: int, compare: bool
) -> dict[tuple[str, str], tuple[float, float | None, float | None]]:
    """Value and 95% bootstrap interval of every metric. A metric without a value (no bytes at all) is left out."""
    values = _metrics(sums_BY.sum(0, keepdims=True), compare)
    drawn = _metrics(resample(sums_BY, seed, resamples), compare)
    measured = {}
    for key, value in values.items():
        known = drawn[key][np.isfinite(drawn[key])]  # a resample may hold no predicted token
        if math.isfinite(value[0]):
            spread = np.percentile(known, INTERVAL).tolist() if len(sums_BY) > 1 and len(known) else (None, None)
            measured[key] = (float(value[0]), *spread)
    return measured


def resample(sums_BY: np.ndarray, seed: str, resamples: int) -> np.ndarray:
    """Sums [R, Q] over `resamples` draws of B blocks with replacement; a function of the seed alone."""
    generator = np.random.default_rng(int(hashlib.sha256(seed.encode()).hexdigest(), 16))
    blocks = len(sums_BY)
    # Blockwise counts rather than indices, a few resamples at a time: a long evaluation has many blocks.
    group = max(1, 4_000_000 // blocks)
    sums = []
    for first in range(0, resamples, group):
        counts_RB = generator.multinomial(blocks, np.full(blocks, 1 / blocks), size=min(group, resamples - first))
        sums.append(counts_RB.astype(np.float64) @ sums_BY)
    return np.concatenate(sums)
