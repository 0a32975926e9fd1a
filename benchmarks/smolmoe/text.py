"""Text for SmolMoE: domains of corpora.py as token windows to train on, and held-out files for Locum's `--data`.

The experts train on the train split of a domain. `write_files` gives the rest, which nothing was trained on, as one
file of JSON lines per domain, for Locum to split in its own way.

Shapes: W windows, S tokens of a window.
"""

from __future__ import annotations

import itertools
import json
import zlib
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from benchmarks.corpora.corpora import CLEANING, DOMAINS, load
from locum.files import whole

WINDOW = 256
PIECE = 4096  # most characters taken from one document in a row, so that many documents are seen
LEAST, MOST = 300_000, 1_500_000  # characters of a held-out file
CAPS = (2_000, 4_000, 8_000, 16_000, 10**9)  # characters of one document in it
TRAINED = ("code", "docs", "dictionary", "math", "wiki", "news", "speeches", "plays")
END = "<|endoftext|>"  # what SmolLM2 was pretrained with between documents; its eos ends a turn of a chat


def source_of(domain: str) -> str:
    """What the text of a domain depends on, for fingerprints."""
    return f"{domain} {DOMAINS[domain].sha256} {CLEANING}"


def part_of(documents: list[str], part: int, parts: int) -> list[str]:
    """One of `parts` runs of neighbouring documents: neighbours in a source are alike, so parts differ in subject."""
    ends = [round(len(documents) * i / parts) for i in range(parts + 1)]
    return documents[ends[part] : ends[part + 1]]


def generator_of(*key: Any) -> numpy.random.Generator:
    """A generator for these words and numbers, the same in every process."""
    return numpy.random.default_rng(zlib.crc32(repr(key).encode()))


def windows(tokenizer: Any, documents: list[str], count: int, key: tuple[Any, ...]) -> Tensor:
    """`count` windows [W, S] of pieces of shuffled documents; documents come again, cut elsewhere, when they run out.

    The result depends on the arguments alone. Raises ValueError for documents without text.
    """
    if not any(documents):
        raise ValueError(f"no text for {key}")
    random = generator_of(*key)
    end = tokenizer.get_vocab().get(END, tokenizer.eos_token_id)
    tokens: list[int] = []
    while len(tokens) < count * WINDOW:
        for place in random.permutation(len(documents)):
            tokens += tokenizer(_piece(documents[place], random), add_special_tokens=False)["input_ids"]
            tokens.append(end)
            if len(tokens) >= count * WINDOW:
                break
    rows_WS = torch.tensor(tokens[: count * WINDOW]).view(count, WINDOW)
    return rows_WS[torch.from_numpy(random.permutation(count))]


def _piece(document: str, random: numpy.random.Generator, most: int = PIECE) -> str:
    """At most `most` characters of a document, if possible from the start of a line on."""
    if len(document) <= most:
        return document
    start = int(random.integers(len(document) - most + 1))
    start = document.find("\n", start, start + most // 2) + 1 or start
    return document[start : start + most]


def write_files(folder: Path, domains: list[str]) -> list[str]:
    """Write held-out documents of domains, if not there yet; return them as Locum's `--data` takes them.

    Raises CorpusUnavailable.
    """
    specs = []
    for domain in domains:
        file = folder / f"{domain}-{zlib.crc32(source_of(domain).encode()):08x}.jsonl"
        if not file.exists():
            parts = load(domain)
            with whole(file) as scratch, scratch.open("w", encoding="utf-8") as stream:
                for piece in held_out(parts["validation"] + parts["test"], domain):
                    stream.write(json.dumps({"text": piece}) + "\n")
        specs.append(f"{domain}={file}")
    return specs


def held_out(documents: list[str], domain: str) -> list[str]:
    """A piece of each of the documents, shuffled: short ones, so that many documents fit, unless there are too few."""
    for cap in CAPS:
        random = generator_of("held out", domain)
        pieces = [_piece(documents[place], random, cap) for place in random.permutation(len(documents))]
        if sum(map(len, pieces)) >= LEAST:
            break
    ends = itertools.accumulate(map(len, pieces))
    return [piece for piece, end in zip(pieces, ends, strict=True) if end <= MOST]
