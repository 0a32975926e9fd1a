"""An explorer that remembers what it was asked, in memory and in a file, so that a search cut short goes on.

A search asks the same questions in the same order whenever its options are the same. What was answered before the
interruption then comes from the file, at once and to the bit.

Letters: C candidates, E experts, A answers.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..files import read_tensors, write_tensors
from ..json_text import parse_json
from ..methods import Explorer
from ..plans.layer_plan import LayerPlan
from ..plans.plan_json import layer_to_json
from ..runs import differences, set_aside
from ..shapes import ModelShape
from ..stats.sums import Statistics

SAVE_EVERY = 30.0  # seconds
KEY_BYTES = 16
VERSION = 2  # of the questions: what a key is made of


class RememberedAnswers:
    """Caches an explorer's results. `identity` says what they depend on.

    With a `path`, answers found there are used if they were given under the same identity, and new ones are written
    there every `SAVE_EVERY` seconds and by `save`.
    """

    def __init__(self, explorer: Explorer, path: Path | None = None, identity: Mapping[str, Any] | None = None) -> None:
        self.explorer, self.path = explorer, path
        self.identity = json.dumps({"version": VERSION, **(identity or {})}, sort_keys=True, default=str)
        self.known: dict[bytes, float] = _load(path, self.identity)
        self.saved, self.saved_at = len(self.known), time.monotonic()
        self.pruned = b""  # a digest of what was pruned so far

    @property
    def shape(self) -> ModelShape:
        return self.explorer.shape

    def output_error(self, layer: str, removed_CE: Tensor) -> Tensor:
        return self._of_layer("output_error", self.explorer.output_error, layer, removed_CE)

    def loss_increase(self, layer: str, removed_CE: Tensor) -> Tensor:
        return self._of_layer("loss_increase", self.explorer.loss_increase, layer, removed_CE)

    def loss_without(self, candidates: Sequence[Mapping[str, Tensor]]) -> Tensor:
        return self._of_layers("loss_without", self.explorer.loss_without, candidates)

    def loss_merged(self, candidates: Sequence[Mapping[str, Tensor]]) -> Tensor:
        return self._of_layers("loss_merged", self.explorer.loss_merged, candidates)

    def block_error(self, candidates: Sequence[Mapping[str, Tensor]]) -> Tensor:
        return self._of_layers("block_error", self.explorer.block_error, candidates)

    @property
    def statistics(self) -> Statistics | None:
        return self.explorer.statistics

    @property
    def together(self) -> int:
        return self.explorer.together

    def stand_ins(self, plans: Sequence[LayerPlan], with_losses: bool) -> tuple[Tensor, Tensor]:
        columns = [str(e).encode() for e in range(len(plans[0].slots))] + [b"loss"] * with_losses
        keys = [self._key("stand_ins", _plan_said(plan), column) for plan in plans for column in columns]

        def ask(missing: list[int]) -> Tensor:
            wanted = sorted({i // len(columns) for i in missing})
            error_CE, loss_C = self.explorer.stand_ins([plans[c] for c in wanted], with_losses)
            found_CX = torch.cat([error_CE, loss_C[:, None]], dim=1)
            return torch.stack([found_CX[wanted.index(i // len(columns)), i % len(columns)] for i in missing])

        found_CX = self._answers(keys, ask).view(len(plans), len(columns))
        none_C = torch.full((len(plans),), torch.inf, dtype=torch.float64)
        return (found_CX[:, :-1], found_CX[:, -1]) if with_losses else (found_CX, none_C)

    def divergences(self, variants: Sequence[Mapping[str, LayerPlan]]) -> Tensor:
        keys = [self._key("divergences", *(_plan_said(each[name]) for name in sorted(each))) for each in variants]
        return self._answers(keys, lambda missing: self.explorer.divergences([variants[i] for i in missing]))

    def output_square(self, layer: str) -> Tensor:
        return self._answers(
            [self._key("output_square", layer.encode())], lambda _: self.explorer.output_square(layer)[None]
        )[0]

    def noise_price(self, size: float) -> Tensor:
        keys = [self._key("noise_price", repr(size).encode(), layer.name.encode()) for layer in self.shape.layers]
        return self._answers(keys, lambda missing: self.explorer.noise_price(size)[missing])

    def prune(self, removed: Mapping[str, Tensor]) -> None:
        self.explorer.prune(removed)
        self.pruned = self._key("prune", *(_said(name, removed[name]) for name in sorted(removed)))

    def save(self) -> None:
        """Write what is known, if there is something new and a place for it."""
        if self.path is not None and len(self.known) > self.saved:
            keys = torch.frombuffer(bytearray(b"".join(self.known)), dtype=torch.uint8).view(-1, KEY_BYTES)
            values_A = torch.tensor(list(self.known.values()), dtype=torch.float64)
            write_tensors(self.path, {"keys": keys, "values": values_A}, {"identity": self.identity})
            self.saved = len(self.known)
        self.saved_at = time.monotonic()

    def _of_layer(self, question: str, ask: Callable[[str, Tensor], Tensor], layer: str, removed_CE: Tensor) -> Tensor:
        keys = [self._key(question, _said(layer, removed_E)) for removed_E in removed_CE]
        return self._answers(keys, lambda missing: ask(layer, removed_CE[missing]))

    def _of_layers(
        self,
        question: str,
        ask: Callable[[Sequence[Mapping[str, Tensor]]], Tensor],
        candidates: Sequence[Mapping[str, Tensor]],
    ) -> Tensor:
        keys = [self._key(question, *(_said(n, c[n]) for n in sorted(c))) for c in candidates]
        return self._answers(keys, lambda missing: ask([candidates[i] for i in missing]))

    def _answers(self, keys: list[bytes], ask: Callable[[list[int]], Tensor]) -> Tensor:
        first = {key: i for i, key in reversed(list(enumerate(keys))) if key not in self.known}
        if missing := sorted(first.values()):
            self.known |= zip((keys[i] for i in missing), ask(missing).tolist(), strict=True)
            if time.monotonic() - self.saved_at > SAVE_EVERY:
                self.save()
        return torch.tensor([self.known[key] for key in keys], dtype=torch.float64)

    def _key(self, question: str, *about: bytes) -> bytes:
        digest = hashlib.blake2b(self.pruned + question.encode(), digest_size=KEY_BYTES)
        for said in about:
            digest.update(said)
        return digest.digest()


def _said(layer: str, asked: Tensor) -> bytes:
    """What is asked of a layer: which experts go, or the weights of mixtures."""
    plain = asked.to(torch.uint8) if asked.dtype == torch.bool else asked.double()
    return layer.encode() + b"\0" + plain.contiguous().numpy().tobytes()


def _plan_said(plan: LayerPlan) -> bytes:
    return json.dumps(layer_to_json(plan), sort_keys=True).encode()


def _load(path: Path | None, identity: str) -> dict[bytes, float]:
    """Answers given under this identity; a file of something else, or a damaged one, is set aside."""
    if path is None or not path.exists():
        return {}
    try:
        tensors, header = read_tensors(path)
        theirs, keys_A, values_A = parse_json(header["identity"]), tensors["keys"], tensors["values"]
        differ = differences(theirs, parse_json(identity))
        fits = keys_A.dtype == torch.uint8 and values_A.dtype == torch.float64 and values_A.ndim == 1
        if not fits or keys_A.shape != (len(values_A), KEY_BYTES):
            differ = "it does not hold answers"
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        differ = f"it is damaged ({error!r})"
    if differ:
        set_aside(path, f"answers of a search in {path} cannot be used again: {differ}")
        return {}
    return dict(zip((bytes(row) for row in keys_A.tolist()), values_A.tolist(), strict=True))
