"""Options of recovery: those of every run, beside the way and its own; and the learning rate that follows from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError
from ..options import check_names, check_options, option, option_fields
from .ways import WAYS, Way

DEFAULT_WAY = "lora"
CHECKPOINTING = ("auto", "on", "off")  # decoder.py
PRECISIONS = {"fp32": "no", "bf16": "bf16"}  # to accelerate's names


def constant(progress: float) -> float:
    return 1.0


def cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "cosine": cosine}


@dataclass(frozen=True)
class Recovery:
    """A way to recover, and the options of a run of any way. `make_recovery` makes one from names and values.

    Rates and schedule were chosen on validation text (docs/results.md, "What choosing nothing gives"). LightMoE (arXiv
    2603.12645) has 1e-4, constant after a warm-up of 3% of the steps.
    """

    way: Way
    steps: int = option(300, "optimizer steps", at_least=1)
    learning_rate: float = option(None, "highest learning rate; default: the way's own", above=0, kind=float)
    schedule: str = option("constant", "course of the learning rate after warm-up", choices=SCHEDULES)
    warmup_fraction: float = option(
        0.03, "fraction of the steps in which the learning rate rises", at_least=0, at_most=1
    )
    batch_size: int = option(8, "blocks in a batch", at_least=1)
    length: int = option(256, "tokens in a block", at_least=2)
    accumulate: int = option(1, "batches per optimizer step", at_least=1)
    weight_decay: float = option(0.0, "AdamW's weight decay", at_least=0)
    clip: float = option(1.0, "largest norm of the gradient; 0 does not clip", at_least=0)
    balance: float = option(0.0, "weight of the routers' load-balance loss (Switch); 0 adds none", at_least=0)
    running_balance: float = option(
        0.0, "weight of the same loss of the experts that run (dynamic top-p); 0 adds none", at_least=0
    )
    p_penalty: float = option(
        0.0, "weight of the same times the experts' widths (HMoE), for narrower experts; 0 adds none", at_least=0
    )
    alignment: float = option(
        0.0, "weight of the loss of choosing in groups what is not best of all (SAM); 0 adds none", at_least=0
    )
    entropy: float = option(
        0.0,
        "weight of the routers' entropy (SEER-MoE, dynamic top-p, HMoE), for fewer experts; 0 adds none",
        at_least=0,
    )
    precision: str = option("fp32", "fp32, or bf16: autocast, trained parameters stay float32", choices=PRECISIONS)
    checkpointing: str = option(
        "auto",
        "compute layers again in backward, to the same bits: where memory is short, always, never",
        choices=CHECKPOINTING,
    )
    seed: int = option(0, "seed of what the way draws and of the order of the data", at_least=0)
    checkpoint_every: int = option(100, "steps between states to resume from; 0 keeps none", at_least=0)
    validate_every: int = option(50, "steps between validation losses; 0 validates at both ends only", at_least=0)
    patience: int = option(0, "validations in a row without a lower loss that end a run; 0: none do", at_least=0)

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", self.way.learning_rate)

    def to_json(self) -> dict[str, Any]:
        """All options by name, those of the way beside those of the run: what `make_recovery` takes."""
        own = {item.name: getattr(self.way, item.name) for item in option_fields(self.way)}
        return {"how": self.way.name, **{item.name: getattr(self, item.name) for item in option_fields(self)}, **own}


UNTRACKED = ("checkpoint_every", "validate_every", "checkpointing")  # options that a resumed run may change


def make_recovery(given: Mapping[str, Any], prefix: str = "") -> Recovery:
    """Recovery from names and values, `how` being the name of the way. What is not given has its default.

    Raises OptionError for an unknown way, an unknown option (which says what other way has it) and a value that is not
    allowed. `prefix` stands before the names of options in messages.
    """
    values = {name: value for name, value in given.items() if name != "how"}
    cls = WAYS[str(given.get("how", DEFAULT_WAY))]
    shared, own = _names(Recovery), _names(cls)
    if both := sorted({"how", *shared} & {*own}):
        raise OptionError(
            f"the way to recover {cls.name!r} has an option {both[0]!r}, as every run has; rename it there"
        )
    for name in values.keys() - {*shared, *own}:
        if having := [other for other, kind in WAYS.items() if name in _names(kind)]:
            flag = f"--{prefix}{name}".replace("_", "-")
            raise OptionError(
                f"way to recover {cls.name!r} has no option {flag}; ways that have it: {', '.join(having)}"
            )
    check_names(values, [*shared, *own], f"way to recover {cls.name!r}", prefix)
    chosen = cls(**{name: value for name, value in values.items() if name in own})
    recovery = Recovery(chosen, **{name: value for name, value in values.items() if name in shared})
    check_recovery(recovery, prefix)
    return recovery


def _names(cls: type) -> list[str]:
    return [item.name for item in option_fields(cls)]


def check_recovery(options: Recovery, prefix: str = "") -> None:
    """Everything that can be said about options without a model. Raises OptionError."""
    check_options(options, prefix)
    check_options(options.way, prefix)
    if options.patience and not options.validate_every:
        patience, every = (f"--{prefix}{name}".replace("_", "-") for name in ("patience", "validate_every"))
        raise OptionError(
            f"{patience} is {options.patience} and {every} 0, so there are no validations to end by; leave one of them out"
        )


def learning_rate_at(step: int, options: Recovery) -> float:
    """The learning rate of step `step` (from 0): linear warm-up, then the schedule over the steps that are left."""
    warmup = math.ceil(options.warmup_fraction * options.steps)
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(options.steps - warmup, 1)
    return options.learning_rate * SCHEDULES[options.schedule](progress)
