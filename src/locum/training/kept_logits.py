"""What the original predicts for the blocks of a training, kept on the disk, so that it need not be in memory while another learns.

Of every position with loss the X largest log-probabilities and the log of what all others have together, at the temperature of the
run, in float32. They are made once, in files of some blocks each that are whole or not there: a run that was interrupted makes what
is missing. A file says what it answers, and one that answers something else is made anew.

Letters: B blocks, S tokens of a block, M positions with loss, X logits kept of each, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..data.tokens import Batch, take
from ..errors import OptionError
from ..files import fingerprint, read_tensors, versions, write_tensors
from ..models.next_token_loss import summed

TOGETHER = 64  # blocks of a file
NOTES = "locum-logits"  # the entry of a file's metadata


@dataclass(frozen=True)
class KeptLogits:
    """The logits that were kept, by the block that they are of."""

    folder: Path
    mark: str  # tells what they answer from anything else
    vocabulary: int
    places: dict[bytes, tuple[int, int, int]]  # of every block: its file, and where its positions begin and end there
    seconds: float  # that making them took

    def of(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens [M, X], their log-probabilities [M, X] and the log of what others have [M], for the positions with loss."""
        found: list[dict[str, Tensor]] = []
        for key in _keys(batch):
            number, begin, end = self.places[key]
            with safe_open(_file(self.folder, number), "pt") as file:
                found.append({name: file.get_slice(name)[begin:end] for name in ("index", "log", "rest")})
        index_MX, log_MX, rest_M = (torch.cat([one[name] for one in found]) for name in ("index", "log", "rest"))
        return index_MX.long(), log_MX, rest_M


def largest(logits_MV: Tensor, top: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """What is kept of logits: tokens [M, X] and log-probabilities [M, X], and the log [M] of what all others have, -inf where there
    are none."""
    log_MV = (logits_MV.float() / temperature).log_softmax(-1)
    log_MX, index_MX = log_MV.topk(top, dim=-1)
    return index_MX, log_MX, rest_of(log_MV, index_MX)


def rest_of(log_MV: Tensor, index_MX: Tensor) -> Tensor:
    """[M] the log of the probability that all but these tokens have together."""
    return log_MV.scatter(1, index_MX, -torch.inf).logsumexp(dim=-1)


def kept_bytes(positions: int, top: int) -> int:
    """What is kept of so many positions takes on the disk."""
    return positions * (8 * top + 4) if top else 0


def keep_logits(
    folder: Path,
    batches: Iterable[Batch],
    top: int,
    temperature: float,
    mark: str,
    vocabulary: int,
    load: Callable[[], nn.Module],
) -> KeptLogits:
    """Keep what the original, which `load` gives where anything is missing, predicts for every block of a run's batches.

    `mark` tells the original from others, `vocabulary` is the number of its tokens. Raises OptionError where that is less than what
    is to be kept.
    """
    begin, together = time.perf_counter(), 1
    if top > vocabulary:
        raise OptionError(f"--top-logits is {top}; allowed: at most {vocabulary}, the original's vocabulary")
    blocks: dict[bytes, Batch] = {}
    for batch in batches:
        together = max(together, len(batch.ids_BS))
        for b, key in enumerate(_keys(batch)):
            blocks.setdefault(key, take(batch, torch.tensor([b])))
    keys, model, places = list(blocks), None, {}
    asked = fingerprint(mark, json.dumps([top, temperature, versions()]), *keys)
    folder.mkdir(parents=True, exist_ok=True)
    for number, first in enumerate(range(0, len(keys), TOGETHER)):
        some = keys[first : first + TOGETHER]
        ends = torch.tensor([int(blocks[key].loss_mask_BS[:, 1:].sum()) for key in some]).cumsum(0).tolist()
        places |= {key: (number, begin, end) for key, begin, end in zip(some, [0, *ends], ends, strict=False)}
        if not _is_there(_file(folder, number), asked):
            model = load() if model is None else model
            made = _predicted(model, [blocks[key] for key in some], top, temperature, together)
            write_tensors(_file(folder, number), made, {NOTES: asked})
    return KeptLogits(folder, asked, vocabulary, places, time.perf_counter() - begin)


@torch.no_grad()
def _predicted(model: Any, blocks: list[Batch], top: int, temperature: float, together: int) -> dict[str, Tensor]:
    """What is kept of what a model predicts for blocks, one after the other."""
    found: list[tuple[Tensor, ...]] = []

    def keep(logits_MV: Tensor, labels_M: Tensor) -> Tensor:
        found.append(tuple(x.cpu() for x in largest(logits_MV, top, temperature)))
        return logits_MV.new_zeros(())

    for first in range(0, len(blocks), together):
        some = blocks[first : first + together]
        joined = {name: torch.cat([getattr(block, name) for block in some]) for name in vars(some[0])}
        summed([model], Batch(**joined), model.device, keep)
    index_MX, log_MX, rest_M = (torch.cat(x) for x in zip(*found, strict=True))
    return {"index": index_MX.int(), "log": log_MX.contiguous(), "rest": rest_M}


def _keys(batch: Batch) -> list[bytes]:
    """What tells blocks apart: their tokens, which of them are looked at, and which have loss."""
    parts = (batch.ids_BS, batch.attention_BS, batch.loss_mask_BS)
    rows = zip(*(part.numpy() for part in parts), strict=True)
    return [hashlib.sha256(b"".join(x.tobytes() for x in row)).digest()[:16] for row in rows]


def _file(folder: Path, number: int) -> Path:
    return folder / f"logits-{number:05d}.safetensors"


def _is_there(path: Path, asked: str) -> bool:
    """Whether a file is whole and answers what is asked."""
    if not path.is_file():
        return False
    try:
        return read_tensors(path)[1].get(NOTES) == asked
    except SafetensorError:
        return False
