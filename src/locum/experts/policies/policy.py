"""A routing policy: which of the selected experts run for a token, with what weights, on which inputs.

A policy acts on the call. It gets what the router selected, `index [T, K]` and `weight [T, K]`, and the hidden states, and
returns indices and weights of its own, -1 for "does not run". A kind is one frozen dataclass in one file: its fields are
what the plan's file holds; tensors that it stores lie in the container under the names that `tensors` gives.

Letters: T tokens, K top-k, M experts that may run, E experts, D model width, F expert width.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

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


class Policy(abc.ABC):
    """The base class of every kind of policy."""

    name: ClassVar[str]

    def check(self, where: str, shape: LayerShape | None) -> None:
        """Raise PlanError where the policy does not fit the layer; without a shape, where it can fit none."""

    @abc.abstractmethod
    def most(self, top_k: int) -> int:
        """The most experts that run for a token."""

    @abc.abstractmethod
    def route(
        self, counts: Counts, tensors: Mapping[str, Tensor], x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> Routed:
        """Apply the policy to what a router selected."""

    def tensors(self, counts: Counts) -> dict[str, tuple[int, ...]]:
        """The shapes of what it stores in a container, by name. Stored tensors start at zero."""
        return {}

    def per_token(self, top_k: int) -> int:
        """How many rows of the stored tensors one token uses."""
        return 0

    def work(self, counts: Counts, index_TK: Tensor, routed: Routed) -> tuple[int, int]:
        """Numbers that it reads and operations that it makes, for what a router selected and it made of that."""
        return 0, 0

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
