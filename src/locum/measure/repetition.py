"""How often a model falls into repeating itself: the failure of compressed models that perplexity does not show.

A generation ends in a loop when its last tokens are one n-gram again and again: the last max(4 n, 16) tokens have period
n, for some n up to 32. Text that the model ended itself does not end in a loop. Greedy text that was in a loop for 256 tokens
is not gone on with: it never comes back.

Letters: B blocks (here generations), S tokens of a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

TIMES, LEAST, LONGEST = 4, 16, 32  # repetitions, tokens, and period of a loop
TEMPERATURE = 0.7
FOR_GOOD, EVERY = 256, 32  # tokens of a loop that a greedy generation stays in, looked at after every so many


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether the last max(4 n, 16) tokens have period n, for some n from 1 to 32."""
    return any(_repeats(tokens, n, max(TIMES * n, LEAST)) for n in range(1, LONGEST + 1))


def _repeats(tokens: Sequence[int], n: int, span: int) -> bool:
    """Whether so many tokens at the end have period n."""
    tail = list(tokens[-span:])
    return len(tail) == span and tail[n:] == tail[:-n]


class _InLoop(StoppingCriteria):
    """Ends generations that are in a loop for good, and notes how long they were."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        length = input_ids.shape[1] - self.prompt
        if length >= FOR_GOOD and length % EVERY == 0:
            for b, row in enumerate(input_ids[:, -FOR_GOOD:].tolist()):
                if b not in self.lengths and any(_repeats(row, n, FOR_GOOD) for n in range(1, LONGEST + 1)):
                    self.lengths[b] = length
        return torch.tensor([b in self.lengths for b in range(len(input_ids))], device=input_ids.device)


def continuations(model: Any, ids_BS: Tensor, *, new_tokens: int, seed: int | None = None) -> list[list[int]]:
    """Continuations, each up to the model's own end of text: sampled by this seed (temperature 0.7, nothing cut off), or greedy
    without one. No longer than the model's context."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    settings: dict[str, Any] = {"do_sample": False} if seed is None else {"do_sample": True, "temperature": TEMPERATURE}
    settings |= {} if seed is None else {"top_k": 0, "top_p": 1.0}
    prompt, in_loop = ids_BS.shape[1], _InLoop(ids_BS.shape[1])
    if seed is None:
        settings["stopping_criteria"] = StoppingCriteriaList([in_loop])
    settings["max_new_tokens"] = min(new_tokens, room_after(model, prompt))
    kept, model.generation_config = model.generation_config, GenerationConfig(eos_token_id=ends or None, pad_token_id=0)
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(seed or 0)
            ids_BS = ids_BS.to(model.device)
            out_BS = model.generate(ids_BS, attention_mask=torch.ones_like(ids_BS), **settings)
    finally:
        model.generation_config = kept
    rows = [row[: in_loop.lengths.get(b, len(row))] for b, row in enumerate(out_BS[:, prompt:].tolist())]
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def room_after(model: Any, prompt: int) -> int:
    """The tokens that a model's context has after a prompt, at least one."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return max(context - prompt, 1) if isinstance(context, int) else 1 << 30


def loops(model: Any, ids_BS: Tensor, *, new_tokens: int, seed: int | None = None) -> int:
    """How many of the generations end in a loop: sampled ones, or greedy ones without a seed."""
    return sum(map(ends_in_loop, continuations(model, ids_BS, new_tokens=new_tokens, seed=seed)))


def more_than_chance(ours: int, theirs: int, count: int) -> float:
    """One-sided p-value (Fisher's exact test) of `ours` of `count` generations looping against `theirs` of as many."""
    total = ours + theirs
    ways = [math.comb(count, k) * math.comb(count, total - k) for k in range(ours, min(total, count) + 1)]
    return sum(ways) / math.comb(2 * count, total)
