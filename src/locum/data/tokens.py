"""Text of any common kind into blocks of token ids, split by document, with what each token counts for.

- A block holds one domain. Documents are joined by the end-of-text token; a tokenizer that begins every text with
  a begin-of-text token (Gemma, Llama) gets one at the head of every block.
- `loss_mask_BS[b, s]` says that token s is predicted with loss (from the tokens before it), so column 0 is False.
- `bytes_BS` counts the UTF-8 bytes of text that a token stands for. They add up to the document's bytes exactly;
  where a character is spread over several tokens, its first token has all of it. Special tokens stand for 0 bytes.

Shapes: B blocks (or the blocks of one batch), S tokens of a block, T tokens of a document or stream, M samples.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from ..errors import DataError, OptionError, unknown
from ..files import fingerprint
from ..json_text import parse_json
from ..places import name_of
from .documents import Source, parse_sources, read_documents
from .rows import Document
from .text import MOST_CHARACTERS

SPLITS = ("train", "validation", "test", "all")
Spans = list[tuple[int, int]]  # character ranges of a text
TOGETHER = 2**20  # characters of documents that are tokenised together, at least
MOST_TOKENS = 2**60  # that can be asked for
CHARACTERS = 16  # of a token, more than nearly any text has: so many are held to begin with
ROUND_SAMPLES = 1_000  # least samples of one training round: domain weights are exact to 1 in so many


@dataclass(frozen=True, eq=False)
class Batch:
    """Blocks as a model takes them."""

    ids_BS: torch.Tensor  # int64
    loss_mask_BS: torch.Tensor  # bool
    attention_BS: torch.Tensor  # int64, 0 on padding
    bytes_BS: torch.Tensor  # int64
    domain_B: torch.Tensor  # int64, index into Tokens.domains


@dataclass(frozen=True, eq=False)
class Tokens(Batch):
    """Every block of a data set, with what it came from."""

    domains: tuple[str, ...]
    weights: tuple[float, ...]
    fingerprint: str
    sources: tuple[dict[str, Any], ...]  # JSON-able, one per domain: path, weight, documents, blocks, tokens
    split: str
    length: int

    def __len__(self) -> int:
        return len(self.ids_BS)


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """16 hex digits, equal for tokenizers that cut text into the same ids. Chat templates do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: Any = sorted(tokenizer.get_vocab().items())
    else:
        full = parse_json(backend.to_str())
        added = sorted((token["id"], token["content"]) for token in full["added_tokens"])
        state = [full["model"], full["normalizer"], full["pre_tokenizer"], added]
    return fingerprint(json.dumps(state, sort_keys=True))


def _render(tokenizer: Any, chat: Document, end: int | None = None, *, ask: bool = False) -> str:
    """The first messages of a conversation as the chat template has them. Templates are programs, and fail as they like."""
    tools = None if chat.tools is None else list(chat.tools)
    try:
        settings = {"tools": tools, "tokenize": False, "add_generation_prompt": ask}
        text = tokenizer.apply_chat_template(list(chat.messages[:end]), **settings, **chat.template_options)
        text.encode("utf-8")  # half a surrogate pair is no text
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{chat.where}: the tokenizer's chat template refuses these messages: {said[:300]}") from None
    if len(text) > MOST_CHARACTERS:
        raise DataError(
            f"{chat.where}: the tokenizer's chat template makes {len(text):,} characters of these messages; allowed: "
            f"{MOST_CHARACTERS:,}"
        )
    return text


def _answer(tokenizer: Any, full: str, chat: Document, i: int) -> Any:
    """The range of `full` that is the answer messages[i]; None if the template changes what went before."""
    asked, done = (_render(tokenizer, chat, end) for end in (i, i + 1))
    if not (full.startswith(asked) and full.startswith(done)):
        return None
    # Some templates open an answer with more than they keep of it (such as a tag for thoughts).
    opening = _render(tokenizer, chat, i, ask=True)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(opening, full, strict=False))
    return sum(1 for _ in same), len(done)


def _chat(tokenizer: Any, chat: Document) -> list[tuple[str, Spans]]:
    """The conversation as text with the ranges of its answers; one text per answer where the template edits history."""
    where = chat.where
    if not getattr(tokenizer, "chat_template", None):
        advice = "give 'text' or 'prompt' and 'completion', or use the tokenizer of the chat model"
        raise DataError(f"{where}: 'messages' need a chat template, and this tokenizer has none; {advice}")
    answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant" and i > 0]
    if not answers:
        roles = ", ".join(str(message["role"]) for message in chat.messages) or "(none)"
        raise DataError(f"{where}: no answer to learn from: no 'assistant' message after another; roles: {roles}")
    full = _render(tokenizer, chat)
    spans = [_answer(tokenizer, full, chat, i) for i in answers]
    if None not in spans:
        return [(full, spans)]
    texts = [_render(tokenizer, chat, i + 1) for i in answers]
    spans = [_answer(tokenizer, text, chat, i) for text, i in zip(texts, answers, strict=True)]
    if None in spans:
        number = answers[spans.index(None)] + 1
        raise DataError(f"{where}: the chat template rewrites the messages before message {number}, an answer")
    return [(text, [span]) for text, span in zip(texts, spans, strict=True)]


def _texts(document: Document, tokenizer: Any) -> list[tuple[str, Spans]]:
    """What to tokenise, with the character ranges that have loss."""
    if document.messages is None and document.prompt and getattr(tokenizer, "chat_template", None):
        turns = {"role": "user", "content": document.prompt}, {"role": "assistant", "content": document.text}
        document = replace(document, messages=turns)
    if document.messages is not None:
        return _chat(tokenizer, document)
    return [(document.prompt + document.text, [(len(document.prompt), len(document.prompt + document.text))])]


def _encode(tokenizer: Any, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Ids and first and last character of every token, for each text."""
    if getattr(tokenizer, "is_fast", False):
        coded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        pairs = [np.array(offsets, dtype=np.int64).reshape(-1, 2) for offsets in coded["offset_mapping"]]
        return [(np.array(i, dtype=np.int64), p[:, 0], p[:, 1]) for i, p in zip(coded["input_ids"], pairs, strict=True)]
    results = []
    for text in texts:  # no offsets: lengths of the decoded pieces, which agree in the total once clipped
        ids = np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
        ends = np.cumsum([0, *(len(tokenizer.decode([i])) for i in ids.tolist())]).clip(max=len(text))
        results.append((ids, ends[:-1], ends[1:]))
    return results


def _token_bytes(text: str, ends_T: np.ndarray, special_T: np.ndarray) -> np.ndarray:
    """UTF-8 bytes per token: those from the furthest character covered so far to the token's last."""
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (code_points >= 0x80).astype(np.int64) + (code_points >= 0x800) + (code_points >= 0x10000)
    reached = np.maximum.accumulate(ends_T)
    if len(ends_T) and not special_T[-1]:
        reached[-1] = len(text)  # white space at the end that the tokenizer strips
    total_T = np.concatenate([[0], np.cumsum(widths)])[reached]
    return np.where(special_T, 0, np.diff(total_T, prepend=0))


def _stream(documents: Sequence[Document], tokenizer: Any, wanted: float) -> tuple[np.ndarray, int, bool]:
    """Tokenise documents in order until there are `wanted` tokens: rows [ids, loss, bytes, attention], documents used,
    and whether there were enough."""
    eos = tokenizer.eos_token_id
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id} | {eos}  # unknown text is still text
    parts = [np.zeros((4, 0), dtype=np.int64)]
    count = used = 0
    while count < wanted and used < len(documents):
        some = documents[used : used + _some(documents, used)]
        marked = [
            (n, *t, t[0] == d.prompt + d.text) for n, d in enumerate(some, used + 1) for t in _texts(d, tokenizer)
        ]
        encoded = _encode(tokenizer, [text for _, text, _, _ in marked])
        for (n, text, spans, stop), (ids_T, starts_T, ends_T) in zip(marked, encoded, strict=True):
            loss_T = np.zeros(len(ids_T), dtype=bool)
            for start, end in spans:
                loss_T |= (ends_T > start) & (starts_T < end)
            bytes_T = _token_bytes(text, ends_T, np.isin(ids_T, sorted(special)))
            parts.append(np.stack([ids_T, loss_T, bytes_T, np.ones_like(ids_T)]))
            if len(ids_T) and ids_T[-1] != eos:  # chat templates end answers themselves: no loss on the joint
                parts.append(np.array([[eos], [stop], [0], [1]]))
            count, used = count + len(ids_T), n
            if count >= wanted:
                break
    return np.concatenate(parts, axis=1), used, count >= wanted


def _some(documents: Sequence[Document], start: int) -> int:
    """How many documents to tokenise together: 64, or fewer long ones."""
    sizes = itertools.accumulate(document.characters for document in documents[start : start + 64])
    return 1 + sum(size < TOGETHER for size in sizes)


def _cut(rows: np.ndarray, length: int, bos: int | None, limit: float, keep_partial: bool) -> list[np.ndarray]:
    """Blocks of the same four rows; at most `limit` real tokens in all."""
    blocks, start, taken = [], 0, 0
    while start < rows.shape[1] and taken < limit:
        head = np.array([[bos], [0], [0], [1]]) if bos is not None and rows[0, start] != bos else rows[:, :0]
        size = int(min(length, limit - taken)) - head.shape[1]
        block = np.concatenate([head, rows[:, start : start + size]], axis=1)
        real = block.shape[1]
        start, taken = start + size, taken + real
        if real == length or (keep_partial and real > 1):
            blocks.append(np.pad(block, ((0, 0), (0, length - real))))
            blocks[-1][1, 0] = 0  # nothing stands before the first token that could predict it
    return blocks


def _apportion(total: int, weights: tuple[float, ...]) -> list[int]:
    """Integers that add up to `total` in proportion to weights; largest remainders first, ties to the earlier."""
    shares = total * np.array(weights, dtype=np.float64) / sum(weights)
    counts = np.floor(shares).astype(int)
    for i in np.argsort(counts - shares, kind="stable")[: total - counts.sum()]:
        counts[i] += 1
    return counts.tolist()


def _begin_of_text(tokenizer: Any) -> int | None:
    """The begin-of-text token if the tokenizer puts one before every text by itself."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos if bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos] else None


def _select(source: Source, split: str) -> Iterator[Document]:
    """The documents of one split, in order."""
    counts: Counter[str] = Counter()
    for document in read_documents(source.path):
        counts[document.split] += 1
        if split in ("all", document.split):
            yield document
    if not (counts if split == "all" else counts[split]):
        found = ", ".join(f"{name} {counts[name]}" for name in sorted(counts))
        where = f"domain {source.domain!r}: no document of {source.path} falls into the split {split!r}"
        raise DataError(
            f"{where} (documents: {found}); give more or shorter documents, or another --split where there is one"
        )


def _draw(source: Source, split: str, seed: int, characters: float) -> tuple[list[Document], bool]:
    """The documents that come first in the order of a seed, with so many characters between them; whether more are left.

    Only these are held, however many are read.
    """
    held: list[tuple[int, int, Document]] = []  # the last of them first
    size, more = 0, False
    for i, document in enumerate(_select(source, split)):
        digest = hashlib.sha256(f"{seed}:{document.key}".encode()).digest()
        heapq.heappush(held, (-int.from_bytes(digest, "big"), -i, document))
        size += document.characters
        while len(held) > 1 and size - held[0][2].characters >= characters:
            size -= heapq.heappop(held)[2].characters
            more = True
    return [document for _, _, document in sorted(held, reverse=True)], more


def _tokenised(source: Source, split: str, tokenizer: Any, limit: float, seed: int | None) -> tuple[np.ndarray, int]:
    """The stream of one source up to a limit of tokens, and the documents used; drawn by a seed, or in order."""
    if seed is None:
        return _stream(list(_select(source, split)), tokenizer, limit)[:2]
    characters = CHARACTERS * limit
    while True:
        documents, more = _draw(source, split, seed, characters)
        stream, used, is_enough = _stream(documents, tokenizer, limit)
        if is_enough or not more:
            return stream, used
        characters *= 8


def load_tokens(
    specs: Any, tokenizer: Any, *, split: str, length: int, tokens: int | None = None, seed: int = 0, keep_partial=False
) -> Tokens:
    """Blocks of `length` tokens of one split; `tokens` limits the real tokens, shared over domains by weight.

    A limit draws documents by seed; without one they stay in order. `keep_partial` pads and keeps the last block of a
    domain (evaluation); otherwise it is dropped. Raises DataError or OptionError.
    """
    sources = parse_sources(specs)
    _check_options(split, length, tokens, tokenizer)
    unit, bos, weights = 1 if keep_partial else length, _begin_of_text(tokenizer), tuple(s.weight for s in sources)
    limits = [math.inf] * len(sources) if tokens is None else [unit * n for n in _apportion(tokens // unit, weights)]
    rows, domain, described = [], [], []
    for i, (source, limit) in enumerate(zip(sources, limits, strict=True)):
        stream, used = _tokenised(source, split, tokenizer, limit, None if tokens is None else seed)
        blocks = _cut(stream, length, bos, limit, keep_partial)
        _check_blocks(source, stream.shape[1], blocks, length, limit)
        rows += blocks
        domain += [i] * len(blocks)
        about = {"domain": source.domain, "path": name_of(source.path), "weight": source.weight, "documents": used}
        described.append({**about, "blocks": len(blocks), "tokens": int(sum(block[3].sum() for block in blocks))})
    ids, loss, bytes_, attention = (torch.from_numpy(row) for row in np.stack(rows, axis=1))
    batch = Batch(ids, loss.bool(), attention, bytes_, torch.tensor(domain))
    names = tuple(source.domain for source in sources)
    return Tokens(*vars(batch).values(), names, weights, _fingerprint(batch, names), tuple(described), split, length)


def _check_options(split: str, length: int, tokens: int | None, tokenizer: Any) -> None:
    if split not in SPLITS:
        raise OptionError(unknown("split", split, SPLITS))
    if length < 2:
        raise OptionError(f"length is {length}; a block needs 2 tokens or more, so that one can be predicted")
    if tokens is not None and tokens > MOST_TOKENS:
        raise OptionError(f"tokens is {tokens}; allowed: at most {MOST_TOKENS:,}")
    if tokens is not None and tokens < length:
        raise OptionError(f"tokens is {tokens}, less than one block of length {length}; raise tokens or lower length")
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token to put between documents; set tokenizer.eos_token")


def _check_blocks(source: Source, found: int, blocks: list[np.ndarray], length: int, limit: float) -> None:
    if not blocks:
        counts = f"{found} tokens in this split, {limit:.0f} its share of the limit, {length} needed for one block"
        advice = "give more text, raise tokens or its weight, or lower length"
        raise DataError(f"domain {source.domain!r}: {source.path} has too little text: {counts}; {advice}")
    if not any(block[1].any() for block in blocks):
        raise DataError(f"domain {source.domain!r}: no token of {source.path} has loss: all is prompt; give answers")


def _fingerprint(batch: Batch, domains: tuple[str, ...]) -> str:
    tensors = (batch.ids_BS, batch.loss_mask_BS, batch.attention_BS, batch.domain_B)
    return fingerprint(json.dumps([*domains, *batch.ids_BS.shape]), *(tensor.numpy().tobytes() for tensor in tensors))


def check_vocabulary(tokens: Batch, vocabulary: int) -> None:
    """Raise DataError for a token id that a model with so many does not embed."""
    largest = int(tokens.ids_BS.max())
    if largest >= vocabulary:
        raise DataError(
            f"the data has token id {largest}, but the model embeds ids 0 to {vocabulary - 1}; tokenise it with the model's "
            f"own tokenizer"
        )


def take(tokens: Batch, index_B: torch.Tensor) -> Batch:
    """The blocks with these indices."""
    return Batch(**{field.name: getattr(tokens, field.name)[index_B] for field in fields(Batch)})


def cut(tokens: Batch, width: int) -> Batch:
    """The first tokens of every block."""
    whole = {field.name: getattr(tokens, field.name) for field in fields(Batch)}
    return Batch(**{name: x if name == "domain_B" else x[:, :width] for name, x in whole.items()})


def permutation(size: int, *seed: Any) -> torch.Tensor:
    number = int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:8], "little") >> 1
    return torch.randperm(size, generator=torch.Generator().manual_seed(number))


def batches(tokens: Tokens, batch_size: int, *, seed: int | None = None, epochs: int = 1) -> Iterator[Batch]:
    """Every block once per epoch, in order or shuffled by seed; the last batch of an epoch may be smaller."""
    for epoch in range(epochs):
        order = torch.arange(len(tokens)) if seed is None else permutation(len(tokens), seed, epoch)
        yield from (take(tokens, index_B) for index_B in order.split(batch_size))


def training_batches(tokens: Tokens, batch_size: int, seed: int, start_step: int = 0) -> Iterator[Batch]:
    """Endless batches with domains in proportion to their weights; batch `step` depends on (seed, step) alone."""
    counts = [max(1, count) for count in _apportion(max(ROUND_SAMPLES, len(tokens)), tokens.weights)]
    first, skip = divmod(start_step * batch_size, sum(counts))
    rounds = (_round(tokens, seed, number, counts).tolist() for number in itertools.count(first))
    samples = itertools.islice(itertools.chain.from_iterable(rounds), skip, None)
    while True:
        yield take(tokens, torch.tensor(list(itertools.islice(samples, batch_size))))


def _round(tokens: Tokens, seed: int, number: int, counts: list[int]) -> torch.Tensor:
    """Block indices [M]: a fixed number per domain, shuffled; no block comes again before all of its domain have."""
    labels_M = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels_M = labels_M[permutation(len(labels_M), seed, "round", number)]
    order_M = torch.empty_like(labels_M)
    for domain, count in enumerate(counts):
        blocks = torch.nonzero(tokens.domain_B == domain).flatten()
        first, last = number * count, (number + 1) * count
        epochs = range(first // len(blocks), -(-last // len(blocks)))
        drawn = [blocks[permutation(len(blocks), seed, domain, epoch)] for epoch in epochs]
        offset = first - epochs.start * len(blocks)
        order_M[labels_M == domain] = torch.cat(drawn)[offset : offset + count]
    return order_M
