"""Whether a model collapsed where its original did not: text that runs in circles, experts that nothing is routed to any more, tool
calls that have lost their form. Perplexity shows none of them.

Letters: B blocks (here prompts), S tokens of a block, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..bundled import sample_texts
from ..errors import CheckpointError
from ..measure.repetition import loops, more_than_chance
from ..measure.use import Use, in_short, uses_of
from .folder import Check, NotApplicable, run_check
from .tool_calls import ToolForm, tool_form, well_formed

SAMPLED, SAMPLES = 96, 4  # tokens and number of the sampled generations, per prompt
CHANCE = 0.01  # of calling a model worse that is not
TEXTS, LENGTH, BATCH = (
    8,
    128,
    8,
)  # texts per prompt that routers are looked at with, tokens of a block, blocks of a batch
LEFT = 0.5  # of the original's spread: with less, the routing of a layer has collapsed


@dataclass(frozen=True)
class Behaviour:
    """What a model does, as far as collapse would show in it."""

    sampled: int  # generations that end in a loop
    greedy: int
    uses: dict[str, Use]  # of experts, by layer
    calls: int  # tool calls in the right form


@dataclass(frozen=True)
class Questions:
    """What a model is asked."""

    ids_BS: Tensor  # prompts
    blocks_BS: Tensor  # text to look at routers with
    long_tokens: int  # of greedy generations; 0: there are none
    seed: int
    tokenizer: Any
    form: ToolForm | None

    @classmethod
    def of(cls, tokenizer: Any, ids_BS: Tensor, long_tokens: int, seed: int) -> Questions:
        texts = sample_texts(TEXTS * len(ids_BS))
        ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
        blocks_BS = torch.tensor(ids[: len(ids) - len(ids) % LENGTH] or ids).reshape(-1, min(LENGTH, len(ids)))
        return cls(ids_BS, blocks_BS, long_tokens, seed, tokenizer, tool_form(tokenizer))

    def ask(self, model: Any) -> Behaviour:
        many_BS = self.ids_BS.repeat_interleave(SAMPLES, dim=0)
        sampled = loops(model, many_BS, new_tokens=SAMPLED, seed=self.seed)
        greedy = loops(model, self.ids_BS, new_tokens=self.long_tokens) if self.long_tokens else 0
        calls = well_formed(model, self.tokenizer, self.form) if self.form else 0
        return Behaviour(sampled, greedy, self.uses(model), calls)

    def uses(self, model: Any) -> dict[str, Use]:
        """How a model uses its experts on the text."""
        return uses_of(model, ((ids_BS, torch.ones_like(ids_BS)) for ids_BS in self.blocks_BS.split(BATCH)))

    def checks(self, ours: Behaviour, theirs: Behaviour | None) -> list[Check]:
        """A line for each way to collapse; one fails where the original does not do the same."""
        prompts = len(self.ids_BS)
        sampled = ("sampled generations end in a loop", prompts * SAMPLES)
        greedy = (f"greedy generations of up to {self.long_tokens:,} tokens end in a loop", prompts)
        lines: dict[str, Callable[[], str]] = {
            "loops": lambda: compare_counts(ours.sampled, theirs and theirs.sampled, *sampled),
            "long loops": lambda: self._compare_greedy(ours, theirs, *greedy),
            "routing": lambda: compare_uses(ours.uses, theirs and theirs.uses),
            "tool calls": lambda: self._compare_calls(ours, theirs),
        }
        return [run_check(name, "", work) for name, work in lines.items()]

    def _compare_greedy(self, ours: Behaviour, theirs: Behaviour | None, *words: Any) -> str:
        if not self.long_tokens:
            raise NotApplicable("--long-tokens is 0")
        return compare_counts(ours.greedy, theirs and theirs.greedy, *words)

    def _compare_calls(self, ours: Behaviour, theirs: Behaviour | None) -> str:
        if self.form is None:
            raise NotApplicable("the chat template has no tools")
        count = len(self.form.prompts)
        missing = (count - ours.calls, theirs and count - theirs.calls)
        return compare_counts(*missing, "answers lack a tool call in the form of the chat template", count)


def compare_counts(ours: int, theirs: int | None, what: str, count: int) -> str:
    """Raises CheckpointError where a model fails more often than its original, by more than chance (Fisher's exact test)."""
    said = f"{ours} of {count} {what}"
    if theirs is None:
        raise NotApplicable(f"{said}; there is no original to compare with")
    said += f", {theirs} of the original's"
    if (chance := more_than_chance(ours, theirs, count)) < CHANCE:
        raise CheckpointError(f"{said} (by chance: p = {chance:.2g}); recover the model, or remove less")
    return said


def compare_uses(ours: dict[str, Use], theirs: dict[str, Use] | None) -> str:
    """How text is spread over experts. Raises CheckpointError for a layer whose spread is less than half of the original's."""
    said = _told(ours)
    if theirs is None:
        raise NotApplicable(f"{said}; there is no original to compare with")
    said = f"{said}; of the original {_told(theirs)}"
    for name, before in theirs.items():
        use = ours.get(name, before)
        if use.spread < LEFT * before.spread:
            counts = ", of the original's ".join(
                f"{x.spread:.0%} of its {len(x.count_E)} experts" for x in (use, before)
            )
            raise CheckpointError(
                f"the routing of {name} has collapsed: it spreads text over {counts}; recover the model with --balance 0.01, or "
                f"remove less"
            )
    return said


def _told(uses: dict[str, Use]) -> str:
    """Dead experts, the least spread of a layer, the mean entropy of routers, and what runs for a token, in words."""
    short = in_short(uses)
    return (
        f"{short['dead_experts']} of {short['experts']} experts see none of {short['tokens']:,} tokens, every layer spreads them over "
        f"at least {short['least_spread']:.0%} of its experts, routers have {short['router_entropy']:.0%} of the most entropy, and "
        f"experts of {short['active_expert_parameters']:,} parameters run for a token"
    )
