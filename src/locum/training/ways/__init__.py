"""Ways to recover: each file registers one, a frozen dataclass of its own options.

    @way("my_way", source="arXiv NNNN.NNNNN")
    @dataclass(frozen=True)
    class MyWay(Way): ...

is all it takes to add one: `recover`, `compress`, the command line and `locum list` then have it, and the conformance
tests run over it. A way says what is trained, what each step does, and which loss is lowered. Options that belong to
every run (steps, learning rate, data) are in training/options.py; a way's own options must have other names.

What `prepare` did to the model, `finish` takes back: the result has the layout and the dtypes that the model came with.
A way holds no state. Opened layers are kept in the context. Other packages offer ways under the entry-point group
"locum.ways".
"""

from __future__ import annotations

import abc
import sys
from collections.abc import Callable, Iterable
from typing import ClassVar, TypeVar

from torch import Tensor

from ...data.tokens import Batch
from ...models.next_token_loss import loss_sum
from ...plans.plan import Plan
from ...registry import Registry, import_modules
from ...shapes import LayerShape
from ..adapters import close_adapters
from ..context import Context, check_layers


class Way(abc.ABC):
    """What the rest of Locum asks of a way to recover, with the usual answers. A way says what is different about it.

    A class that only has the same methods is a way too: `@way` gives it the answers that it lacks.
    """

    name: ClassVar[str]  # set by @way
    source: ClassVar[str]  # set by @way
    learning_rate: ClassVar[float]  # set by @way: the one to use where none is given
    fits_adapter: ClassVar[bool]  # whether a small adapter file can hold the result. Default: where no weights change
    changes_weights: ClassVar[bool] = True  # False: only routers and vectors change
    across_ranks: ClassVar[bool] = False  # whether several ranks can share a run: its loss is of the model's output
    experts_alone: ClassVar[bool] = False  # whether of the original its experts are enough, read one at a time
    layer_by_layer: ClassVar[bool] = False  # whether it has the original's layers beside the model's own
    top_logits: ClassVar[int] = 0  # of the original's logits that are kept on the disk in its place
    reads_use: ClassVar[bool] = False  # whether `context.uses` is read: how text uses the experts

    def objection(self, plan: Plan | None) -> str | None:
        """Why this way cannot train what the plan made, as a sentence that begins with the way's name. None: it can."""
        return None

    def needs_original(self, plan: Plan | None) -> bool:
        """Whether the original model is needed. If so, `context.original` is there in all methods below."""
        return False

    def becomes(self, plan: Plan | None, layers: Iterable[LayerShape]) -> Plan | None:
        """The plan of the result, where parts are added that stay. `layers` are those of the model."""
        return plan

    def check(self, context: Context) -> None:
        """Refuses what cannot be done with this model, before anything is changed. Raises an error of Locum's."""
        check_layers(context)

    def identity(self, context: Context) -> dict[str, str]:
        """What the run depends on beside options, data, model and plan. A run resumes only where it is the same."""
        return {}

    @abc.abstractmethod
    def prepare(self, context: Context, start: int) -> None:
        """Makes the model trainable, to go on with step `start`. Exactly what requires a gradient is trained."""

    def at_step(self, context: Context, step: int) -> dict[str, float]:
        """Called before every step and once after the last. Returns what the log should say of the step."""
        return {}

    def loss(self, context: Context, batch: Batch) -> tuple[Tensor, int]:
        """The loss, summed over the positions of `batch.loss_mask_BS[:, 1:]`, and their number. Steps lower its mean.

        One forward pass of the model has to be made in it.
        """
        return loss_sum(context.model, batch, context.device)

    def is_result(self, context: Context, step: int) -> bool:
        """Whether the model that runs at this step is the one that `finish` would give. A run ends with the best of those."""
        return True

    def finish(self, context: Context) -> None:
        """Gives the model back in the layout that it came with."""
        close_adapters(context)


WAYS: Registry[type[Way]] = Registry("way to recover", entry_points="locum.ways")
Class = TypeVar("Class", bound=type)


def way(name: str, source: str, learning_rate: float = 1e-3) -> Callable[[Class], Class]:
    """Register the class below as a way to recover. `source` says where it is from: an arXiv id, or a word.

    `learning_rate` is the highest of a run for which the user names none; choose it on validation text.
    """

    def register(cls: Class) -> Class:
        cls.name, cls.source, cls.learning_rate = name, source, learning_rate
        for answer, usual in vars(Way).items():
            if not answer.startswith("_") and answer not in Way.__abstractmethods__ and not hasattr(cls, answer):
                setattr(cls, answer, usual)
        if not hasattr(cls, "fits_adapter"):
            cls.fits_adapter = not cls.changes_weights
        return WAYS.add(name, cls)

    return register


import_modules(sys.modules[__name__])
