"""Ways to recover: each file registers one, as a frozen dataclass of its own options.

    @way("my_way", source="arXiv NNNN.NNNNN")
    @dataclass(frozen=True)
    class MyWay: ...

is all it takes to add one: `recover`, `compress`, the command line and `locum list` then have it, and the conformance
tests run over it. A way says what is trained, what each step does, and which loss is lowered. Options that belong to
every run (steps, learning rate, data) are in training/options.py; a way's own options must have other names.

What `prepare` did to the model, `finish` takes back: the result has the layout and the dtypes that the model came with.
A way holds no state. Opened layers are kept in the context. Other packages offer ways under the entry-point group
"locum.ways".
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import ClassVar, Protocol, TypeVar

from torch import Tensor

from ...data.tokens import Batch
from ...plans.plan import Plan
from ...registry import Registry, import_modules
from ...shapes import LayerShape
from ..context import Context


class Way(Protocol):
    """What the rest of Locum needs of a way to recover."""

    name: ClassVar[str]  # set by @way
    source: ClassVar[str]  # set by @way
    learning_rate: ClassVar[float]  # set by @way: the one to use where none is given
    changes_weights: ClassVar[bool]  # False: only routers and vectors change
    across_ranks: ClassVar[
        bool
    ]  # whether several ranks can share a run: its loss comes from the model's output. Default: no
    experts_alone: ClassVar[bool]  # whether of the original its experts are enough, read one at a time; else False
    fits_adapter: ClassVar[bool]  # whether a small adapter file can hold the result. Default: where no weights change
    reads_use: ClassVar[bool]  # whether `context.uses` is read: how text uses the experts. Default: no

    def objection(self, plan: Plan | None) -> str | None:
        """Why this way cannot train what the plan made, as a sentence that begins with the way's name. None: it can."""
        ...

    def needs_original(self, plan: Plan | None) -> bool:
        """Whether the original model is needed. If so, `context.original` is there in all methods below."""
        ...

    def becomes(self, plan: Plan | None, layers: Iterable[LayerShape]) -> Plan | None:
        """The plan of the result, where parts are added that stay. Default: the plan as it is. `layers` are those of the model."""
        ...

    def check(self, context: Context) -> None:
        """Refuses what cannot be done with this model, before anything is changed. Raises an error of Locum's."""
        ...

    def identity(self, context: Context) -> dict[str, str]:
        """What the run depends on beside options, data, model and plan. A run resumes only where it is the same."""
        ...

    def prepare(self, context: Context, start: int) -> None:
        """Makes the model trainable, to go on with step `start`. Exactly what requires a gradient is trained."""
        ...

    def at_step(self, context: Context, step: int) -> dict[str, float]:
        """Called before every step and once after the last. Returns what the log should say of the step."""
        ...

    def loss(self, context: Context, batch: Batch) -> tuple[Tensor, int]:
        """The loss, summed over the positions of `batch.loss_mask_BS[:, 1:]`, and their number. Steps lower its mean.

        One forward pass of the model has to be made in it. `models.next_token_loss.loss_sum` is the usual loss.
        """
        ...

    def is_result(self, context: Context, step: int) -> bool:
        """Whether the model that runs at this step is the one that `finish` would give. A run ends with the best of those."""
        ...

    def finish(self, context: Context) -> None:
        """Gives the model back in the layout that it came with."""
        ...


WAYS: Registry[type[Way]] = Registry("way to recover", entry_points="locum.ways")
Class = TypeVar("Class", bound=type)


def _as_it_is(way: Way, plan: Plan | None, layers: Iterable[LayerShape]) -> Plan | None:
    return plan


def way(name: str, source: str, learning_rate: float = 1e-3) -> Callable[[Class], Class]:
    """Register the class below as a way to recover. `source` says where it is from: an arXiv id, or a word.

    `learning_rate` is the highest of a run for which the user names none; choose it on validation text.
    """

    def register(cls: Class) -> Class:
        cls.name, cls.source, cls.learning_rate = name, source, learning_rate
        cls.experts_alone = getattr(cls, "experts_alone", False)
        cls.fits_adapter = getattr(cls, "fits_adapter", not getattr(cls, "changes_weights", True))
        cls.reads_use = getattr(cls, "reads_use", False)
        cls.becomes = getattr(cls, "becomes", _as_it_is)
        return WAYS.add(name, cls)

    return register


import_modules(sys.modules[__name__])
