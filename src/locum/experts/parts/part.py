"""A kind of part: what a stand-in is made of. An expert computes with the sum of its parts (docs/design.md section 1).

    y(x) = W_down [act(W_gate x) * (W_up x)] + c,      W = the sum of what its parts give,  c = the sum of their constants

A kind is one frozen dataclass in one file. Its fields are what the plan's file holds. The class says everything else:
what it needs, how large it is, how it is built, what it computes, what whole weights it stands for, and its words.
Plans, layouts, containers, costs, recovery, exports and the report loop over the kinds that are registered.

The tensors of one kind lie side by side in a stack of the container; an expert has a row of it. Parts of one kind that
cannot lie side by side, such as adapters of different ranks, differ in their `variant`, and have a stack each.

Letters: P pairs (token, expert), Q pairs of one expert, T tokens, D model width, F expert width, G 2F with a gate (gate
columns first) and F without, R rank.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ...errors import PlanError
from ...kernels.products import Products
from ...registry import Registry
from ...shapes import LayerShape
from ...stats.sums import LayerStatistics
from ..quantisers import QUANTISERS, Gram, Write
from ..weights import ExpertWeights


class Sizes(Protocol):
    """What a tensor's shape follows from: a layer's shape and a container's layout have it."""

    hidden_size: int
    expert_width: int
    has_gate: bool
    has_bias: bool


@dataclass(frozen=True)
class Place:
    """Where a part stands in a plan: words for messages, the whole slot, the layer's number of bases, its shape."""

    where: str
    parts: tuple[Part, ...]
    num_bases: int
    shape: LayerShape

    def refuse_beside(self, part: Part, is_what: str) -> None:
        """Raise PlanError, for a part that cannot be added to, with the others of its slot."""
        more = " + ".join(str(other) for other in self.parts if other is not part)
        raise PlanError(f"{self.where} {is_what} and has {more} too; leave one of the two out")


class Site(Protocol):
    """What a part is built from: one layer's original experts, its bases, and its statistics."""

    statistics: LayerStatistics | None
    generator: torch.Generator

    def original(self, e: int) -> ExpertWeights:
        """The original expert, its hidden units in the order of the base that stands in for it."""

    def base(self, index: int) -> ExpertWeights:
        """A shared base of the layer."""

    def others(self, e: int) -> ExpertWeights | None:
        """The whole weights among the expert's parts (own weights or a base), as they are stored, or None where it has none."""

    def input_grams(self, e: int) -> dict[str, Tensor]:
        """The Gram matrix of each weight's inputs, by the weight's name, in the order of `original`."""

    def seen(self, e: int) -> dict[str, Gram]:
        """The mean of x x^T over each weight's inputs, with what an expert that saw few tokens borrows (quantisers.py)."""

    def members(self, part: Part) -> tuple[int, ...]:
        """The experts of the layer that have this very part, or with which it comes."""

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once a layer: what several experts share is found together."""

    def once_over(self, e: int, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives for an expert over its whole weights, as they are stored: made once for all plans that are built together."""


@dataclass(frozen=True)
class Part(abc.ABC):
    """The base class of every kind. Fields are the plan's; class attributes and methods are the kind's.

    Two fields every kind has. They are in no plan where there is no format.
    """

    format: str = field(default="", kw_only=True)  # of its matrices (formats/rows.py); "": the dtype of the checkpoint
    quantiser: str = field(default="nearest", kw_only=True)  # one of QUANTISERS: who chooses their numbers

    name: ClassVar[str]
    legend: ClassVar[str]  # what a reader of the report calls it
    plural: ClassVar[str]  # what an export calls experts that have it
    prefix: ClassVar[str]  # of its tensors' names in the container; "{}" is the number of the variant
    is_whole: ClassVar[bool] = False  # it has a whole expert's weights, with biases where the family has them
    has_biases: ClassVar[bool] = False  # it has the expert's biases where the family has them
    in_place: ClassVar[bool] = (
        False  # it is the expert's own weights, changed where they lie: a stock layer can hold it
    )
    is_narrow: ClassVar[bool] = (
        False  # its hidden units are fewer than a whole expert's, so other weights do not add to it
    )
    stands_alone: ClassVar[bool] = False  # it is all of an expert's weights, so other weights do not add to it
    # No plan names it: it comes with other parts.
    follows: ClassVar[bool] = False
    # The kind of what it shares with other experts, whose row of the expert its products read beside its own; their variants are one.
    shares: ClassVar[str] = ""
    changes_weights: ClassVar[bool] = True  # False: it adds to the output alone
    as_weights: ClassVar[bool] = True  # whether whole weights can say it (`whole`)
    fades_in: ClassVar[bool] = True  # annealing lets it come in as the old weights fade out (training/layer.py)
    trains: ClassVar[str] = "always"  # in recovery by adapters: "always", "with bases" or "never"
    linear: ClassVar[
        tuple[str, ...]
    ] = ()  # trained tensors [N, D] or [N, D, R], a number of the output from each row D
    at_once: ClassVar[bool] = False  # whether it has the grouped products below, for all pairs at once
    has_products: ClassVar[bool] = False  # whether these are products with matrices (biases and constants are not)
    sees: ClassVar[Mapping[str, str]] = {}  # by tensor, the weight of ExpertWeights whose inputs are its own

    # --- in the plan

    def check(self, place: Place) -> None:
        """Raise PlanError where the part does not fit its place."""

    def needs(self) -> tuple[str, ...]:
        """The statistics that building reads, beside those of the quantiser."""
        return ()

    @property
    def is_drawn(self) -> bool:
        """Whether building draws from the site's generator."""
        return False

    def reads(self) -> tuple[str, ...]:
        """All statistics that building reads."""
        return (*self.needs(), *(QUANTISERS[self.quantiser].needs if self.format else ()))

    def beside(self) -> tuple[Part, ...]:
        """The parts that come with it, which no plan names."""
        return ()

    def to_json(self) -> dict[str, Any]:
        """The fields that a plan's file holds."""
        fields = asdict(self)
        formats = {name: fields.pop(name) for name in ("format", "quantiser")}
        return fields | formats if self.format else fields

    # --- size and layout

    @property
    def stack(self) -> type[Part]:
        """The kind in whose stack the row lies: the part's own, but for a base, which lies among own weights."""
        return type(self)

    def variant(self) -> tuple[int, ...]:
        """What tells stacks of the kind apart."""
        return ()

    def row(self, e: int) -> tuple[int, ...]:
        """The key of the row that expert `e` uses: rows lie in the order of keys, and equal keys are one row."""
        return (e,)

    @classmethod
    @abc.abstractmethod
    def tensors(cls, variant: tuple[int, ...], sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """The shape of one row of every tensor of a stack, by the tensor's name after the prefix."""

    @classmethod
    def variant_fault(cls, variant: tuple[int, ...], sizes: Sizes) -> str:
        """What is wrong with a variant that a checkpoint's config names, if anything."""
        return "" if variant == () else f"{cls.name} has no variant {list(variant)}"

    # --- building

    @abc.abstractmethod
    def build(self, e: int, site: Site) -> dict[str, Tensor]:
        """One row of every tensor."""

    @classmethod
    def store(cls, row: Mapping[str, Tensor], write: Write, grams: Mapping[str, Gram]) -> dict[str, Tensor]:
        """A row as a stack in few bits has it: bytes in place of matrices. `grams` are of the inputs of whole weights, by the
        weight's name; none where the quantiser reads none."""
        return {
            leaf: write(tensor, grams.get(cls.sees.get(leaf, ""))).stored if tensor.dim() == 2 else tensor
            for leaf, tensor in row.items()
        }

    # --- one expert's pairs: any number format, with gradients

    @classmethod
    def first(cls, row: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor | None:
        """What the part adds to the first product [Q, G] of its inputs [Q, D]: one for gate and up, or one each."""

    @classmethod
    def second(cls, row: Mapping[str, Tensor], hidden_QF: Tensor, weight_Q1: Tensor) -> Tensor | None:
        """What it adds to the output [Q, D]. The router weights are multiplied into the hidden states already."""

    @classmethod
    def output(cls, row: Mapping[str, Tensor]) -> Tensor | None:
        """The constant [D] that it adds to the output, before the router weight."""

    # --- all pairs at once, where `at_once`: a pair's row is row_P, -1 for none

    @classmethod
    def add_first(
        cls,
        way: Products,
        pre_PG: Tensor,
        inputs: tuple[Tensor, ...],
        token_P: Tensor,
        stack: nn.Module,
        row_P: Tensor,
        each_P: Tensor,
    ) -> None:
        """Add to the first products. `each_P` counts the pairs."""

    @classmethod
    def add_first_bias(cls, pre_PG: Tensor, stack: nn.Module, row_P: Tensor) -> None:
        """Add biases to the first products."""

    @classmethod
    def add_second(
        cls,
        way: Products,
        total_TD: Tensor,
        hidden_PF: Tensor,
        token_P: Tensor,
        stack: nn.Module,
        row_P: Tensor,
        each_P: Tensor,
    ) -> None:
        """Add to each token the second products of its pairs."""

    @classmethod
    def add_second_bias(
        cls, total_TD: Tensor, token_P: Tensor, weight_P1: Tensor, stack: nn.Module, row_P: Tensor
    ) -> None:
        """Add the biases of the second product, times the router weights."""

    @classmethod
    def add_output(cls, total_TD: Tensor, token_P: Tensor, weight_P1: Tensor, stack: nn.Module, row_P: Tensor) -> None:
        """Add constants, times the router weights."""

    # --- conversion, costs and words

    @classmethod
    def whole(cls, row: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
        """What the row adds to whole weights, in float32, by name: gate_up_GD, down_DF, gate_up_bias_G, down_bias_D."""
        return {}

    @classmethod
    def multiplied(cls, leaf: str) -> bool:
        """Whether products are made with this tensor (else it is only added)."""
        return "bias" not in leaf

    @abc.abstractmethod
    def __str__(self) -> str:
        """The part in words, as `locum plan --diff` and the report say it."""

    def words(self) -> str:
        """The same with its bits."""
        return f"{self} in {self.format} ({self.quantiser})" if self.format else str(self)

    def mark(self) -> str:
        """One sign for the report's grid of experts."""
        return self.name[0]

    def colour(self) -> str:
        """The class of the report's style sheet."""
        return "fx"

    def order(self) -> tuple[int, ...]:
        """Where the report's grid sorts it among parts of its kind."""
        return self.variant()


PARTS: Registry[type[Part]] = Registry("part", entry_points="locum.parts")
Kind = TypeVar("Kind", bound=type[Part])


def part(name: str) -> Callable[[Kind], Kind]:
    """Register the dataclass below as a kind of part."""

    def register(kind: Kind) -> Kind:
        kind.name = name
        PARTS.add(name, kind)
        return kind

    return register
