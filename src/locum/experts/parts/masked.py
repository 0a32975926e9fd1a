"""Masked: an expert's own weights, some of which are zero (Expert Slimming, arXiv 2406.02500). Nothing else changes.

Its row lies among own weights, and a stock layer can hold it. It is as large as the expert was: zeros save only what an engine
skips that knows their pattern.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...errors import OptionError, PlanError, unknown
from ..masks import MASKS, Pattern
from .own_weights import OwnWeights, rows_of
from .part import Part, Place, Site, Sizes, part


@part("masked")
@dataclass(frozen=True)
class Masked(Part):
    """The expert's own weights with zeros in a pattern: "2:4", "4:8", or a share of each row, such as "0.5"."""

    pattern: str = "2:4"
    by: str = "wanda"  # one of MASKS

    legend = "masked"
    plural = "masked experts"
    prefix = OwnWeights.prefix
    is_whole = True
    has_biases = True
    in_place = True
    trains = "never"

    @property
    def stack(self) -> type[Part]:
        return OwnWeights

    def check(self, place: Place) -> None:
        if self.by not in MASKS:
            raise PlanError(f"{place.where}: {unknown('mask', str(self.by), MASKS)}")
        try:
            Pattern.of(self.pattern)
        except OptionError as error:
            raise PlanError(f"{place.where}: {error}") from error
        if len(place.parts) > 1:
            place.refuse_beside(self, "is masked")
        if self.format:
            raise PlanError(
                f"{place.where} is masked and in {self.format}, in which zeros do not stay; leave one of the two out"
            )
        if place.shape.expert_bytes:
            raise PlanError(
                f"{place.where} is masked, but the checkpoint is quantised; plan for the one that it was made from"
            )

    def needs(self) -> tuple[str, ...]:
        return MASKS[self.by].needs

    def row(self, e: int) -> tuple[int, ...]:
        return (0, e)

    @classmethod
    def tensors(cls, variant: tuple[int, ...], sizes: Sizes) -> dict[str, tuple[int, ...]]:
        return OwnWeights.tensors(variant, sizes)

    def build(self, e: int, site: Site) -> dict[str, Tensor]:
        mask, pattern = MASKS[self.by], Pattern.of(self.pattern)
        known: dict[str, Tensor | None] = dict.fromkeys(("gate_FD", "up_FD", "down_DF"))
        if mask.squares is not None:
            inputs_D, hidden_F = (site.statistics[name][e] for name in mask.squares)
            known = {"gate_FD": inputs_D, "up_FD": inputs_D, "down_DF": hidden_F}
        elif mask.needs:
            known = {name: gram.matrix_II for name, gram in site.seen(e).items()}
        return rows_of(
            site.original(e).map(
                lambda name, tensor: mask.masked(tensor, known[name], pattern) if name in known else tensor
            )
        )

    def __str__(self) -> str:
        return f"zeros {self.pattern} ({self.by})"

    def mark(self) -> str:
        return "z"

    def colour(self) -> str:
        return "fk"
