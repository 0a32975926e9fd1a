"""What the stages share: options that have one name, one help text and one check everywhere.

Options are keyword-only in every stage, carry their help in the annotation, and have one name and one default in Python
and on the command line. Options of methods and of recovery are those of their own dataclasses.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch

from .. import ranks
from ..arguments import in_declared_forms
from ..data.documents import Source
from ..errors import OptionError
from ..files import watched
from ..formats.schemes import SCHEMES
from ..options import LARGEST
from ..runs import clear_states, is_reserved, reserved

OUTPUTS = ("out", "picture")  # parameters of stages that say where to write
Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class Help:
    """One line of help for an option.

    A line that names registered things is a function: other packages' things are known only when the line is shown.
    """

    text: str | Callable[[], str]

    @property
    def line(self) -> str:
        return self.text if isinstance(self.text, str) else self.text()


Data = Annotated[
    Sequence[str | Path | Source] | Mapping[str, Any],
    Help("text, folder, JSONL, Parquet or datasets folder as [domain=]PATH[@WEIGHT]"),
]
Out = Annotated[Path | None, Help("where to write")]
Force = Annotated[bool, Help("replace an output that exists")]
Seed = Annotated[int, Help("seed of everything random")]
Device = Annotated[str, Help("auto, cpu, cuda, cuda:1, ...")]
ToObserve = Annotated[int, Help("tokens to observe, shared over domains by weight")]
Split = Annotated[str, Help("train, validation, test or all of the documents")]
Length = Annotated[int, Help("tokens in a block")]
BatchSize = Annotated[int, Help("blocks in a batch")]
DryRun = Annotated[
    bool, Help("say what it would take (time, memory, disk), measured on one decoder layer, and do nothing else")
]
Preset = Annotated[str, Help("best: the best defaults that are known; paper: the method as it was published")]
Remove = Annotated[float | None, Help("fraction of the routed experts' parameters to remove, 0 to 1")]
Fit = Annotated[str | None, Help("largest size of the checkpoint's tensors, such as 16GiB")]
Bits = Annotated[
    str | None, Help("experts and stand-ins in 8, 4, 3 or 2 bits, or in a number format: fp8-scaled, nvfp4, ...")
]
Group = Annotated[int, Help("weights with one scale, for --bits: 32, 64 or 128")]
Rest = Annotated[
    str | None,
    Help(f"attention, shared experts and the output head in few bits too, at the very end: {', '.join(SCHEMES)}"),
]
Quantise = Annotated[str, Help("who chooses the numbers for --bits: gptq, by Gram matrices, or nearest")]


Stage = TypeVar("Stage", bound=Callable[..., Any])


def alone(stage: Stage) -> Stage:
    """A stage beside which no other run writes to its outputs: reserved before they are looked at, and until the end.
    What a program that is no run puts there meanwhile stays, unless `force`. Runs that `append` to one file take turns in
    writing alone. A stage that ends well removes what it had kept to go on from, and what runs before it had. Its arguments
    come in the forms that it declares (arguments.py)."""

    stage = in_declared_forms(stage)
    parameters = inspect.signature(stage).parameters
    defaults = {name: parameters[name].default for name in OUTPUTS if name in parameters}

    @functools.wraps(stage)
    def run(*given: Any, **options: Any) -> Any:
        if options.get("dry_run"):  # nothing is written, nor is what an interrupted run left removed
            if ranks.count() > 1:
                raise OptionError("--dry-run measures one process; leave torchrun out")
            return stage(*given, **options)
        outputs = [options.get(name, default) for name, default in defaults.items() if not options.get("append")]
        outputs = [Path(out) for out in outputs if isinstance(out, (str, Path)) and ranks.is_first()]
        own = [out for out in outputs if not is_reserved(out)]
        with contextlib.ExitStack() as stack:
            for out in outputs:
                stack.enter_context(reserved(out))
                if not options.get("force", False):
                    stack.enter_context(watched(out))
            result = stage(*given, **options)
            for out in own:
                clear_states(out)
            return result

    return run  # type: ignore[return-value]


def silent(stage: str, done: int, total: int) -> None:
    pass


def timed(progress: Progress) -> Progress:
    """The same progress, with the seconds that the last layer took."""
    last = time.perf_counter()

    def report(stage: str, done: int, total: int) -> None:
        nonlocal last
        before, last = last, time.perf_counter()
        progress(f"{stage}: {last - before:.1f} s for the last layer", done, total)

    return report


class Counted:
    """Progress of a pass over text: tokens, their rate, and the decoder layer where the model is streamed."""

    def __init__(self, progress: Progress, stage: str, blocks: int, tokens: int) -> None:
        self._progress, self._stage, self._tokens = progress, stage, tokens  # of a block
        self._first: tuple[float, int] | None = None
        self._layer, self._now = "", (0, blocks)

    def blocks(self, done: int, total: int) -> None:
        """So many of all blocks are done. A run that goes on counts its rate from where it begins."""
        now = time.perf_counter()
        self._first = self._first or (now, done)
        seconds, new = now - self._first[0], done - self._first[1]
        rate = f", {new * self._tokens / seconds:,.0f} a second" if new and seconds > 0 else ""
        self._now = done, total
        self._progress(f"{self._stage}: {self._layer}{done * self._tokens:,} tokens{rate}", done, total)

    def layers(self, done: int, of: int) -> None:
        """So many decoder layers are done in the pass that is running."""
        self._layer = f"layer {done} of {of}, " if done < of else ""
        self.blocks(*self._now)


def device_of(name: str) -> str:
    """The device that a name means. Raises OptionError for one that is not there, before anything is loaded."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if name == "cuda" and ranks.count() > 1:
        name = f"cuda:{ranks.local() % torch.cuda.device_count()}"
    try:
        torch.zeros(1, device=name).item()  # the meta device holds no number
    except Exception as error:  # each of torch's devices that is not there fails in its own way
        there = "cpu" + "".join(f", cuda:{i}" for i in range(torch.cuda.device_count()))
        raise OptionError(
            f"--device {name} cannot be used ({str(error).splitlines()[0]:.80}); devices here: auto, {there}"
        ) from error
    return name


def check_number(name: str, value: int, least: int, most: float = LARGEST) -> None:
    if not least <= value <= most:
        end = "" if most == math.inf else f" to {most}"
        raise OptionError(f"--{name} is {value}; allowed: whole numbers from {least}{end}")


def needed(value: Any, name: str) -> Path:
    if value is None:
        raise OptionError(f"--{name} is missing; say where to write")
    return Path(value)
