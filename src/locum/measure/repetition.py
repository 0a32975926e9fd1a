"""How often a model falls into repeating itself: the failure of compressed models that perplexity does not show.

A generation ends in a loop when its last tokens are one n-gram again and again: the last max(4 n, 16) tokens have period
n, for some n up to 32. Text that the model ended itself does not end in a loop.

Letters: B blocks (here generations), S tokens of a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

TIMES, LEAST, LONGEST = 4, 16, 32  # repetitions, tokens, and period of a loop
TEMPERATURE = 0.7


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether the last max(4 n, 16) tokens have period n, for some n from 1 to 32."""
    for n in range(1, LONGEST + 1):
        span = max(TIMES * n, LEAST)
        if len(tokens) < span:
            continue
        tail = list(tokens[-span:])
        if tail[n:] == tail[:-n]:
            return True
    return False


def sample(model: Any, ids_BS: Tensor, *, new_tokens: int, seed: int) -> list[list[int]]:
    """Sampled continuations (temperature 0.7, nothing cut off), each up to the model's own end of text."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    settings = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0, "max_new_tokens": new_tokens}
    kept, model.generation_config = model.generation_config, GenerationConfig(eos_token_id=ends or None, pad_token_id=0)
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(seed)
            ids_BS = ids_BS.to(model.device)
            out_BS = model.generate(ids_BS, attention_mask=torch.ones_like(ids_BS), **settings)
    finally:
        model.generation_config = kept
    rows = out_BS[:, ids_BS.shape[1] :].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def loops(model: Any, ids_BS: Tensor, *, new_tokens: int, seed: int) -> int:
    """How many of the generations end in a loop."""
    return sum(map(ends_in_loop, sample(model, ids_BS, new_tokens=new_tokens, seed=seed)))


def more_than_chance(ours: int, theirs: int, count: int) -> float:
    """One-sided p-value (Fisher's exact test) of `ours` of `count` generations looping against `theirs` of as many."""
    total = ours + theirs
    ways = [math.comb(count, k) * math.comb(count, total - k) for k in range(ours, min(total, count) + 1)]
    return sum(ways) / math.comb(2 * count, total)
