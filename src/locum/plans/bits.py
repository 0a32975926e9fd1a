"""A plan's parts in few bits: one number format for all that have matrices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..errors import OptionError, unknown
from ..experts.quantisers import QUANTISERS
from ..formats.int_groups import BITS, GROUPS
from ..formats.rows import row_format
from ..shapes import ModelShape
from .layer_plan import KEPT, LayerPlan, Slot

ZERO_POINTS = (2,)  # bits in which numbers around zero alone are too few


@dataclass(frozen=True)
class FewBits:
    """A number format (formats/rows.py) and who chooses the numbers."""

    format: str
    quantiser: str

    @classmethod
    def of(cls, bits: str, group: int, quantiser: str) -> FewBits:
        """From 8, 4, 3 or 2 with the size of groups, or the name of a format. Raises OptionError for what is not known."""
        if quantiser not in QUANTISERS:
            raise OptionError(unknown("quantiser", quantiser, QUANTISERS))
        if group not in GROUPS:
            raise OptionError(f"--group is {group}; allowed: {', '.join(map(str, GROUPS))}")
        name = bits
        if bits.isdecimal():
            if int(bits) not in BITS:
                raise OptionError(f"--bits is {bits}; allowed: {', '.join(map(str, BITS))}, or the name of a format")
            name = f"int{int(bits)}-g{group}{'-z' if int(bits) in ZERO_POINTS else ''}"
        made, only = row_format(name), QUANTISERS[quantiser].only
        if only is not None and not isinstance(made, only):
            quantiser = "nearest"  # of floats, there is no other
        return cls(name, quantiser)

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that the quantiser reads."""
        return QUANTISERS[self.quantiser].needs

    def applied(self, layers: Iterable[LayerPlan], shape: ModelShape) -> list[LayerPlan]:
        """The layers with every part that has matrices in few bits; layers that were left out come in whole."""
        given = {layer.layer: layer for layer in layers}
        plans = [given.get(x.name, LayerPlan(x.name, (KEPT,) * x.num_experts)) for x in shape.layers]
        return [replace(plan, slots=tuple(map(self._slot, plan.slots))) for plan in plans]

    def _slot(self, slot: Slot) -> Slot:
        parts = (
            replace(part, format=self.format, quantiser=self.quantiser) if part.stack.has_products else part
            for part in slot.parts
        )
        return replace(slot, parts=tuple(parts))
