"""Low-rank adapter: B A on every projection, over a base or alone.

Starts say where an adapter begins, each a function beside the statistics that it reads:

    gaussian   A drawn from N(0, 1/columns), B zero: over a base the product starts at nothing (as LoRA, 2106.09685)
    svd        the truncated SVD of what the base leaves over of the old weights
    whitened   the same, weighed by the inputs that each weight saw (SVD-LLM, arXiv 2403.07378)

Without a base, gaussian starts would leave every gradient exactly zero (B = 0 in all three projections makes the hidden
state zero). B is then drawn too, scaled so that B A has the variance of the old weights.

Letters: P pairs (token, expert), Q pairs of one expert, D model width, F expert width, G 2F with a gate and F without,
R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...errors import PlanError, unknown
from ...kernels.grouped import add_halves
from ...kernels.products import Products
from ..factors import Whitened, gaussian_factors, refitted, svd_factors
from ..quantisers import Gram, Write
from .own_weights import first_product
from .part import Part, Place, Site, Sizes, part

Factors = tuple[Tensor, Tensor]  # A [R, inputs], B [outputs, R]
RIDGE = 0.3  # of the mean diagonal of an expert's Gram matrix: other text gives it other inputs (docs/log.md)


class Task(NamedTuple):
    """One weight that an adapter begins for."""

    name: str  # of ExpertWeights
    old: Tensor
    base: Tensor | None
    rank: int
    e: int
    site: Site


class Start(NamedTuple):
    needs: tuple[str, ...]  # statistics
    factors: Callable[[Task], Factors]


def _gaussian(task: Task) -> Factors:
    a, b = gaussian_factors(*task.old.shape, task.rank, task.old, task.site.generator)
    if task.base is None:
        scale = float(task.old.float().std()) * (task.old.shape[1] / task.rank) ** 0.5
        b = (torch.randn(b.shape, generator=task.site.generator) * scale).to(b)
    return a, b


def _rest(task: Task) -> Tensor:
    return task.old.float() - (0 if task.base is None else task.base.float())


def _svd(task: Task) -> Factors:
    return svd_factors(_rest(task), task.rank)


def _whitened(task: Task) -> Factors:
    def made() -> Whitened:
        return Whitened(_rest(task), task.site.input_grams(task.e)[task.name], RIDGE)

    return task.site.once_over(task.e, ("whitened", task.name), made).factors(task.rank)


STARTS: dict[str, Start] = {
    "gaussian": Start((), _gaussian),
    "svd": Start((), _svd),
    "whitened": Start(("input_gram", "hidden_gram"), _whitened),
}


@part("low_rank")
@dataclass(frozen=True)
class LowRank(Part):
    """An adapter of one rank on gate, up and down."""

    rank: int
    start: str = "gaussian"  # one of STARTS

    legend = "low-rank adapter"
    plural = "low-rank stand-ins"
    prefix = "adapters.{}."
    fades_in = False
    linear = ("down_B_DR",)
    at_once = True
    has_products = True

    def check(self, place: Place) -> None:
        if self.start not in STARTS:
            raise PlanError(f"{place.where}: {unknown('start', str(self.start), STARTS)}")
        limit = min(place.shape.hidden_size, place.shape.expert_width)
        if type(self.rank) is not int or not 1 <= self.rank <= limit:
            raise PlanError(
                f"{place.where} has rank {self.rank!r}; allowed: 1 to {limit}, the smaller side of its "
                f"{place.shape.hidden_size} x {place.shape.expert_width} weights"
            )

    def needs(self) -> tuple[str, ...]:
        return STARTS[self.start].needs

    @property
    def is_drawn(self) -> bool:
        return self.start == "gaussian"

    def variant(self) -> tuple[int, ...]:
        return (self.rank,)

    @classmethod
    def tensors(cls, variant: tuple[int, ...], sizes: Sizes) -> dict[str, tuple[int, ...]]:
        (r,), d, f = variant, sizes.hidden_size, sizes.expert_width
        gate = {"gate_B_FR": (f, r)} if sizes.has_gate else {}
        first = {"gate_up_A": ((2 if sizes.has_gate else 1) * r, d)}
        return first | gate | {"up_B_FR": (f, r), "down_A_RF": (r, f), "down_B_DR": (d, r)}

    @classmethod
    def variant_fault(cls, variant: tuple[int, ...], sizes: Sizes) -> str:
        limit = min(sizes.hidden_size, sizes.expert_width)
        if len(variant) == 1 and type(variant[0]) is int and 1 <= variant[0] <= limit:
            return ""
        return f"ranks {list(variant)} do not fit {sizes.hidden_size} x {sizes.expert_width} weights"

    def build(self, e: int, site: Site) -> dict[str, Tensor]:
        old, base = site.original(e), site.others(e)

        def factors(name: str) -> Factors:
            matrix = getattr(old, name)
            task = Task(name, matrix, None if base is None else getattr(base, name), self.rank, e, site)
            a, b = STARTS[self.start].factors(task)
            return a.to(matrix.dtype), b.to(matrix.dtype)

        up_a, up_b = factors("up_FD")
        down_a, down_b = factors("down_DF")
        if old.gate_FD is None:
            return {"gate_up_A": up_a, "up_B_FR": up_b, "down_A_RF": down_a, "down_B_DR": down_b}
        gate_a, gate_b = factors("gate_FD")
        first = {"gate_up_A": torch.cat([gate_a, up_a]), "gate_B_FR": gate_b}
        return first | {"up_B_FR": up_b, "down_A_RF": down_a, "down_B_DR": down_b}

    @classmethod
    def store(cls, row: Mapping[str, Tensor], write: Write, grams: Mapping[str, Gram]) -> dict[str, Tensor]:
        """A first; then B, made anew for what became of A, on what that gives it."""

        def second(b_OR: Tensor, a_RI: Tensor, new_RI: Tensor, gram: Gram | None) -> Tensor:
            wide_RI = new_RI.double()
            seen_RI = None if gram is None else wide_RI @ gram.matrix_II.to(wide_RI)
            fitted_OR = refitted(b_OR, a_RI, new_RI, seen_RI).to(b_OR.dtype)
            return write(fitted_OR, None if seen_RI is None else Gram(seen_RI @ wide_RI.T)).stored

        of_input, of_hidden, rank = grams.get("up_FD"), grams.get("down_DF"), row["up_B_FR"].shape[1]
        first, down = write(row["gate_up_A"], of_input), write(row["down_A_RF"], of_hidden)
        stored = {"gate_up_A": first.stored}
        if "gate_B_FR" in row:
            gate_RD = row["gate_up_A"][:rank]
            stored["gate_B_FR"] = second(row["gate_B_FR"], gate_RD, first.numbers[:rank], of_input)
        stored["up_B_FR"] = second(row["up_B_FR"], row["gate_up_A"][-rank:], first.numbers[-rank:], of_input)
        stored["down_A_RF"] = down.stored
        stored["down_B_DR"] = second(row["down_B_DR"], row["down_A_RF"], down.numbers, of_hidden)
        return stored

    @classmethod
    def first(cls, row: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        low = first_product(inputs, row["gate_up_A"])
        if "gate_B_FR" not in row:
            return linear(low, row["up_B_FR"])
        gate_QR, up_QR = low.chunk(2, dim=1)
        return torch.cat([linear(gate_QR, row["gate_B_FR"]), linear(up_QR, row["up_B_FR"])], dim=1)

    @classmethod
    def second(cls, row: Mapping[str, Tensor], hidden_QF: Tensor, weight_Q1: Tensor) -> Tensor:
        return linear(linear(hidden_QF, row["down_A_RF"]), row["down_B_DR"])

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
        low_PR = pre_PG.new_zeros(len(token_P), stack.gate_up_A.shape[1])
        add_halves(way, low_PR, inputs, token_P, stack.gate_up_A, row_P)
        f = stack.up_B_FR.shape[1]
        way.add(pre_PG[:, -f:], low_PR[:, -stack.up_B_FR.shape[2] :], stack.up_B_FR, row_P, each_P)
        if hasattr(stack, "gate_B_FR"):
            way.add(pre_PG[:, :f], low_PR[:, : stack.gate_B_FR.shape[2]], stack.gate_B_FR, row_P, each_P)

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
        low_PR = hidden_PF.new_zeros(len(token_P), stack.down_A_RF.shape[1])
        way.add(low_PR, hidden_PF, stack.down_A_RF, row_P, each_P)
        way.scatter(total_TD, low_PR, stack.down_B_DR, row_P, token_P)

    @classmethod
    def whole(cls, row: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
        product = adapter_product(row)
        first = [product[name] for name in ("gate_FD", "up_FD") if name in product]
        return {"gate_up_GD": torch.cat(first), "down_DF": product["down_DF"]}

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.start})"

    def mark(self) -> str:
        return "r"

    def colour(self) -> str:
        return "fr"

    def order(self) -> tuple[int, ...]:
        return (-self.rank,)


def adapter_product(row: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """B A of one adapter for each projection, in float32, under the names of ExpertWeights."""
    tensors = {leaf: tensor.float() for leaf, tensor in row.items()}
    rank = tensors["up_B_FR"].shape[1]
    first = tensors["gate_up_A"]
    products = {"up_FD": tensors["up_B_FR"] @ first[-rank:], "down_DF": tensors["down_B_DR"] @ tensors["down_A_RF"]}
    if "gate_B_FR" in tensors:
        products["gate_FD"] = tensors["gate_B_FR"] @ first[:rank]
    return products
