"""A routing policy: which of the selected experts run for a token, with what weights, on which inputs.

A policy acts on the call. It gets what the router selected, `index [T, K]` and `weight [T, K]`, and the hidden states, and
returns indices and weights of its own, -1 for "does not run". One that `chooses` acts before, on the router: it gets the
logits too, and selects in its place. What it has `added` goes to the output of the experts. A kind is one frozen dataclass in
one file: its fields are what the plan's file holds; tensors that it stores lie in the container under the names that `tensors`
gives.

Letters: T tokens, K top-k, M experts that may run, E experts, D model width, F expert width.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from ...errors import PlanError
from ...registry import Registry
from ...shapes import LayerShape


class Counts(Protocol):
    """What a policy's tensors follow from: a container's layout has it."""

    num_experts: int
    hidden_size: int
    expert_width: int
    has_gate: bool


@dataclass(frozen=True)
class Routed:
    """What the experts compute on: `inputs` holds one input for gate and up together, or the gate's and the up's.

    An index of -1 is an expert that does not run; its weight is 0.
    """

    index_TM: Tensor
    weight_TM: Tensor
    inputs: tuple[Tensor, ...]
    down_TF: Tensor | None = None  # added to one, it scales the hidden state in front of the down projection

    def of(self, token_P: Tensor) -> Routed:
        """The same with inputs for every pair in place of every token."""
        down = None if self.down_TF is None else self.down_TF[token_P]
        return replace(self, inputs=tuple(x_TD[token_P] for x_TD in self.inputs), down_TF=down)


def modulate(x: Tensor, offset: Tensor) -> Tensor:
    """x (1 + offset), rounded once."""
    return torch.addcmul(x, x, offset)


def wide(weight: Tensor) -> Tensor:
    """Float32 at least."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def size(weight: Tensor) -> Tensor:
    """Weights as policies compare them and add them up: some routers scale them for each expert, below zero too."""
    return wide(weight).abs()


def fraction(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 1 where the whole is zero; never a NaN, in gradients either."""
    zero = whole == 0
    return torch.where(zero, 1.0, part / whole.masked_fill(zero, 1.0))


def run_only(runs_TK: Tensor, index_TK: Tensor, weight_TK: Tensor, x_TD: Tensor, renormalise: bool) -> Routed:
    """Some of the selected experts, in the places they had. With `renormalise` the sizes of their weights add up to what all
    did."""
    kept_TK = torch.where(runs_TK, weight_TK, 0)
    if renormalise:
        scale_T1 = fraction(size(weight_TK).sum(1, keepdim=True), size(kept_TK).sum(1, keepdim=True))
        # A token that runs all of them keeps its weights to the bit.
        scale_T1 = torch.where(runs_TK.all(dim=1, keepdim=True), 1, scale_T1)
        kept_TK = (kept_TK * scale_T1).to(weight_TK.dtype)
    return Routed(torch.where(runs_TK, index_TK, -1), kept_TK, (x_TD,))


def check_number(where: str, name: str, value: Any, most: float) -> None:
    """Refuse what is no number from 0 to the most."""
    if type(value) not in (int, float) or not 0 <= value <= most or value == math.inf:
        bounds = f"numbers from 0 to {most:g}" if math.isfinite(most) else "numbers of 0 or more"
        raise PlanError(f"{where} has {name} {value!r}; allowed: {bounds}")


def check_average(where: str, mean: Any, shape: LayerShape | None) -> None:
    """Refuse what is no mean number of experts of a token."""
    check_number(where, "mean", mean, math.inf if shape is None else shape.top_k)


class Policy(abc.ABC):
    """The base class of every kind of policy."""

    name: ClassVar[str]
    chooses: ClassVar[bool] = False  # whether it selects in place of the router, from all of its logits
    reads_all: ClassVar[bool] = (
        False  # whether it must see every expert that the router selected, so that others follow it
    )

    only_adds: ClassVar[bool] = False  # whether all that it does is add to the experts' output

    @property
    def place(self) -> str:
        """What a layer has one of: a policy on top takes the place of the one with the same."""
        return self.name

    def check(self, where: str, shape: LayerShape | None) -> None:
        """Raise PlanError where the policy does not fit the layer; without a shape, where it can fit none."""

    @abc.abstractmethod
    def most(self, top_k: int) -> int:
        """The most experts that run for a token."""

    def average(self, top_k: int) -> float:
        """How many experts run for a token, on the average of the text that it was calibrated on; the most where none was."""
        return self.most(top_k)

    def among(self, survivors: tuple[int, ...]) -> Policy:
        """The policy for a layer in which these experts, by their original indices, are left."""
        return self

    @abc.abstractmethod
    def route(
        self, counts: Counts, tensors: Mapping[str, Tensor], x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> Routed:
        """Apply the policy to what a router selected."""

    def choose(self, logits_TE: Tensor, index_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and weights in place of those that a router made of these logits, where the policy `chooses`."""
        return index_TK, weight_TK

    def added(self, tensors: Mapping[str, Tensor], x_TD: Tensor) -> Tensor | None:
        """What is added to the output of the experts for every token [T, D], whichever run; None: nothing."""
        return None

    def tensors(self, counts: Counts) -> dict[str, tuple[int, ...]]:
        """The shapes of what it stores in a container, by name. Stored tensors start at zero."""
        return {}

    def per_token(self, top_k: int) -> int:
        """How many rows of the stored tensors one token uses."""
        return 0

    def active(self, counts: Counts, top_k: int) -> int:
        """The most numbers of the stored tensors that one token uses."""
        return self.per_token(top_k) * sum(math.prod(size[1:]) for size in self.tensors(counts).values())

    def work(self, counts: Counts, index_TK: Tensor, routed: Routed) -> tuple[int, int]:
        """Numbers that it reads and operations that it makes, for what a router selected and it made of that."""
        return 0, 0

    def to_json(self) -> dict[str, Any]:
        """What files hold; `read_policy` is the way back."""
        return {"policy": self.name, **asdict(self)}

    @abc.abstractmethod
    def __str__(self) -> str:
        """The policy in words."""


POLICIES: Registry[type[Policy]] = Registry("routing policy", entry_points="locum.policies")
Kind = TypeVar("Kind", bound=type[Policy])


def policy(name: str) -> Callable[[Kind], Kind]:
    """Register the dataclass below as a kind of routing policy."""

    def register(kind: Kind) -> Kind:
        kind.name = name
        POLICIES.add(name, kind)
        return kind

    return register


def read_policy(data: Mapping[str, Any]) -> Policy:
    """A policy from what `to_json` gave. Raises OptionError, KeyError or TypeError for anything else; values `check` looks at."""
    fields = {name: tuple(x) if isinstance(x, list) else x for name, x in data.items() if name != "policy"}
    return POLICIES[data["policy"]](**fields)
