"""What is compared: methods with options, each as it is and in few bits, and random pruning beside them.

lightmoe:rank=8      a method with an option of its own
prune:score=reap:bits=4:group=64:quantiser=nearest      its experts in 4 bits: more of them stay for the same bytes
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..criteria.criterion import CRITERIA
from ..errors import OptionError
from ..methods import METHODS, SAVED, TARGETED, Method, SearchingMethod
from ..options import KINDS, option_fields
from ..plans.bits import FewBits
from ..stats.definitions import STATISTICS
from ..stats.events import Event, EveryExpertEvent, HiddenGradientEvent, SearchEvent, WeightGradientEvent
from .planning import chosen_method, few_bits

RANDOM = "prune:score=random"  # the row that every choice has to beat, also in the same bits
# A backward pass, or all experts on all tokens: what takes these is compared where it is named.
COSTLY = (HiddenGradientEvent, WeightGradientEvent, EveryExpertEvent)
GROUPS = {
    "all": lambda: [n for n in METHODS if METHODS[n].saves in TARGETED and not _need(METHODS[n]().needs(), *COSTLY)],
    "criteria": lambda: [f"prune:score={n}" for n in CRITERIA if not _need(CRITERIA[n].needs, SearchEvent, *COSTLY)],
}
OF_BITS = {"bits": str, "group": int, "quantiser": str}


@dataclass(frozen=True)
class Candidate:
    """A method with options, as it was named, and the bits of what it leaves, None for those of the checkpoint."""

    name: str
    method: Method
    given: dict[str, Any]
    few: FewBits | None = None

    @property
    def read_besides(self) -> tuple[str, ...]:
        """Statistics that quantising reads, which are collected on demand."""
        return () if self.few is None else tuple(name for name in self.few.needs if STATISTICS[name].on_demand)

    def words(self) -> list[Any]:
        """All on which its numbers depend."""
        said = [self.name, self.method.name, dataclasses.asdict(self.method)]
        return said if self.few is None else [*said, dataclasses.asdict(self.few)]


def candidates_of(methods: str, bits: str | None, recover: str | None) -> tuple[Candidate, ...]:
    """The methods that are named, in these bits too, and random pruning in every bits that there are. Raises OptionError for what is
    no method, no option of it or no bits, and for a training beside weights in few bits."""
    named = [n for word in methods.split(",") if word for n in (GROUPS[word]() if word in GROUPS else [word.strip()])]
    if not named:
        raise OptionError("--methods names nothing; give all, criteria, or names such as lightmoe,prune:score=ean")
    names = [*named, RANDOM]
    for few in filter(None, (bits or "").split(",")):
        names += [f"{name}:bits={few.strip()}" for name in named if not _of_bits(name) and not _chooses_bits(name)]
    names += [chance_of(name) for name in names]
    found = tuple(_candidate(name) for name in dict.fromkeys(names))
    if recover is not None and (low := next((c.name for c in found if c.few is not None), None)):
        raise OptionError(
            f"--recover {recover} adds to the bytes of weights in few bits, as {low} has, and bytes are to be equal; leave one of the "
            f"two out"
        )
    return found


def chance_of(name: str) -> str:
    """The name of random pruning in the bits of a candidate."""
    return ":".join([RANDOM, *_of_bits(name)])


def _of_bits(name: str) -> list[str]:
    return [word for word in name.split(":")[1:] if word.partition("=")[0] in OF_BITS]


def _chooses_bits(name: str) -> bool:
    return METHODS[name.partition(":")[0]].saves == "bytes"


def _candidate(name: str) -> Candidate:
    method, *words = name.split(":")
    kinds = {field.name: field.metadata["kind"] for field in option_fields(METHODS[method])} | OF_BITS
    given: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        key = key.replace("-", "_")
        given[key] = _typed(value, kinds.get(key, str), f"--methods {name}: {word}")
    of_bits = {key: given.pop(key) for key in OF_BITS if key in given}
    chosen = chosen_method(method, given, "best")
    if chosen.saves not in TARGETED:
        raise OptionError(f"--methods {name}: it saves {SAVED[chosen.saves]}, not bytes, so there are no equal bytes")
    return Candidate(name, chosen, given, _few(name, chosen, of_bits))


def _few(name: str, chosen: Method, given: dict[str, Any]) -> FewBits | None:
    if not given:
        return None
    if "bits" not in given:
        raise OptionError(f"--methods {name}: {' and '.join(given)} without bits; give bits=4 too, or leave it out")
    few = few_bits(given["bits"], given.get("group", 32), given.get("quantiser", "gptq"), chosen)
    if few.needs and isinstance(chosen, SearchingMethod):
        if "quantiser" in given:
            raise OptionError(
                f"--methods {name}: {few.quantiser} reads Gram matrices, which a search does not collect; take quantiser=nearest"
            )
        return FewBits.of(given["bits"], given.get("group", 32), "nearest")
    return few


def _typed(text: str, kind: type, where: str) -> Any:
    try:
        return {"true": True, "false": False}[text] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise OptionError(f"{where}: the value must be {KINDS.get(kind, kind.__name__)}") from None


def _need(needs: Sequence[str], *events: type[Event]) -> bool:
    """Whether any of these statistics comes from such events."""
    return any(STATISTICS[name].event in events for name in needs)
