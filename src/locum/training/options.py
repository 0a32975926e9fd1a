"""Options of recovery, and the learning rate that follows from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..options import option
from .layer import ANNEALING

PRECISIONS = {"fp32": "no", "bf16": "bf16"}  # to accelerate's names


def constant(progress: float) -> float:
    return 1.0


def cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "cosine": cosine}


@dataclass(frozen=True)
class Recovery:
    """Options of recovery training. Learning rate and annealing are those of LightMoE (arXiv 2603.12645)."""

    how: str = option("annealed", "annealed, lora, vectors or full: what is trained, and how")
    steps: int = option(300, "optimizer steps", at_least=1)
    learning_rate: float = option(1e-4, "highest learning rate", above=0)
    schedule: str = option("constant", "course of the learning rate after warm-up", choices=SCHEDULES)
    warmup_fraction: float = option(
        0.03, "fraction of the steps in which the learning rate rises", at_least=0, at_most=1
    )
    batch_size: int = option(8, "blocks in a batch", at_least=1)
    length: int = option(256, "tokens in a block", at_least=2)
    accumulate: int = option(1, "batches per optimizer step", at_least=1)
    weight_decay: float = option(0.0, "AdamW's weight decay", at_least=0)
    clip: float = option(1.0, "largest norm of the gradient; 0 does not clip", at_least=0)
    rank: int = option(0, "rank of the adapters of kept experts; 0: that of the plan's stand-ins, else 16", at_least=0)
    train_bases: bool = option(True, "train shared bases and constants too, not adapters alone")
    end_fraction: float = option(
        0.2, "fraction of the steps after which the old weights are gone", at_least=0, at_most=1
    )
    annealing: str = option("linear", "how the old weights fade out", choices=ANNEALING)
    steepness: float = option(3.0, "of exponential annealing; the paper tried 1, 3 and 5", above=0)
    balance: float = option(0.0, "weight of the routers' load-balance loss (Switch); 0 adds none", at_least=0)
    precision: str = option("fp32", "fp32, or bf16: autocast, trained parameters stay float32", choices=PRECISIONS)
    seed: int = option(0, "seed of new adapters and of the order of the data", at_least=0, at_most=2**31 - 1)
    checkpoint_every: int = option(100, "steps between states to resume from; 0 keeps none", at_least=0)
    validate_every: int = option(50, "steps between validation losses; 0 validates at both ends only", at_least=0)


UNTRACKED = ("checkpoint_every", "validate_every")  # options that a resumed run may change


def learning_rate_at(step: int, options: Recovery) -> float:
    """The learning rate of step `step` (from 0): linear warm-up, then the schedule over the steps that are left."""
    warmup = math.ceil(options.warmup_fraction * options.steps)
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(options.steps - warmup, 1)
    return options.learning_rate * SCHEDULES[options.schedule](progress)
