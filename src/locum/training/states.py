"""States of an interrupted training run, from which it goes on to the same weights: of the loop one file, of layers that are trained
one after the other a file for each (one_by_one.py)."""

from __future__ import annotations

import contextlib
import json
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ..errors import CheckpointError
from ..files import clear, existing_folder, read_tensors, write_tensors
from ..json_text import parse_json
from ..runs import differences, set_aside
from ..stats.on_disk import is_on_disk, on_disk, put_down

STATE_FILE, LAYER_FILES = "state.safetensors", "layer-*.safetensors"
STATE_VERSION = "3"
NOTES = "locum-recovery"  # the entry of the file's metadata
STATE_ITEMSIZE = 4 * 4  # bytes of a state for every parameter that is trained: float32, two moments, and as it was best
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW; a parameter that never had a gradient has none


@dataclass(frozen=True, eq=False)
class Best:
    """The trained parameters, on the CPU, at the validation with the lowest loss so far."""

    step: int
    loss: float
    tensors: dict[str, Tensor]


def laid_aside(tensor: Tensor, workdir: Path | None) -> Tensor:
    """A copy on the CPU that takes no memory: in a file without a name on the disk of `workdir`. In memory without one, or room there."""
    try:
        copy = None if workdir is None else on_disk(existing_folder(workdir), tuple(tensor.shape), tensor.dtype)
    except OSError:
        copy = None
    if copy is None:
        return tensor.to("cpu", copy=True).contiguous()
    copy.copy_(tensor)
    if is_on_disk(copy):
        put_down(copy)
    return copy


@dataclass(frozen=True)
class State:
    """Where a run was: everything that its next step depends on."""

    step: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    validation: tuple[tuple[int, float], ...] = ()  # (steps done, loss)
    loss: float | None = None  # of the last step
    best: Best | None = None
    without_moments: tuple[str, ...] = ()
    path: Path | None = None

    def check_tensors(self, trained: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError unless every trained parameter is there with its moments, and nothing else is."""
        wanted = {f"parameter|{name}": _form(p) for name, p in trained.items()}
        for name in trained.keys() - set(self.without_moments):
            wanted |= {f"{kind}|{name}": _form(trained[name]) for kind in MOMENTS}
        there = {key: _form(tensor) for key, tensor in self.tensors.items()}
        if self.best is not None:
            wanted |= {f"best|{name}": _form(p) for name, p in trained.items()}
            there |= {f"best|{name}": _form(tensor) for name, tensor in self.best.tensors.items()}
        wanted |= {key: "[] torch.float32" for key in wanted if key.startswith("step|")}
        for key in sorted({*wanted, *there}):
            found, right = (x.get(key, "not there") for x in (there, wanted))
            if found != right:
                raise _unfit(self.path, f"{key.replace('|', ' of ')} is {found} and should be {right}")


def _form(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"


def save_state(workdir: Path, identity: dict[str, Any], state: State) -> None:
    """Write a state whole or not at all; the one before it stays until then."""
    notes = {
        "version": STATE_VERSION,
        "identity": identity,
        "step": state.step,
        "tokens": state.tokens,
        "seconds": state.seconds,
        "validation": state.validation,
        "loss": state.loss,
        "best": None if state.best is None else (state.best.step, state.best.loss),
        "without_moments": state.without_moments,
    }
    best = {} if state.best is None else {f"best|{name}": t for name, t in state.best.tensors.items()}
    workdir.mkdir(parents=True, exist_ok=True)
    write_tensors(workdir / STATE_FILE, state.tensors | best, {NOTES: json.dumps(notes)})


def sample(tensor: Tensor) -> bytes:
    """Shape, dtype and some 64 values from all over a tensor: a part of what identifies a run."""
    values = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // 64)].double().cpu()
    return f"{list(tensor.shape)} {tensor.dtype}".encode() + values.numpy().tobytes()


def load_state(workdir: Path | None, identity: dict[str, Any], restart: bool) -> State:
    """The state an interrupted run left in `workdir`, or a fresh one.

    Another run's is set aside with its log, and so is a file that cannot be read. Raises CheckpointError for one of another version
    of Locum, and one that answers what is asked and does not hold what a state holds: there may be hours behind it.
    """
    if workdir is None or not has_state(workdir):
        return State()
    if restart:
        forget(workdir)
        return State()
    if not (workdir / STATE_FILE).exists():
        set_aside(workdir, f"{workdir} is of an interrupted run that trained layer by layer")
        return State()
    path = workdir / STATE_FILE
    try:
        tensors, header = read_tensors(path)
        notes = parse_json(header[NOTES])
    except (SafetensorError, KeyError, ValueError) as error:
        set_aside(path, f"{path} cannot be read ({error!r})")
        return State()
    version = notes.get("version") if isinstance(notes, dict) else None
    if isinstance(version, str) and version != STATE_VERSION:
        raise _unfit(path, f"its version is {version!r}, and this Locum reads {STATE_VERSION!r}")
    if differ := _unlike(notes, identity):
        set_aside(workdir, f"{workdir} is of an interrupted run of something else: {differ}")
        return State()
    best = {key.removeprefix("best|"): tensors.pop(key) for key in list(tensors) if key.startswith("best|")}
    return _checked(State(path=path, tensors=tensors, **_fields(path, notes, best)), identity.get("steps"))


def _unlike(notes: Any, identity: dict[str, Any]) -> str:
    """How the run that left a state differs from this one, in words."""
    notes = notes if isinstance(notes, dict) else {}
    if (version := notes.get("version")) != STATE_VERSION:
        return f"its version is {version!r} and should be {STATE_VERSION!r}"
    theirs = notes.get("identity")
    return differences(theirs if isinstance(theirs, dict) else {}, parse_json(json.dumps(identity)))


def _fields(path: Path, notes: dict[str, Any], best: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of a state from its notes, with their types."""
    try:
        loss, at = notes["loss"], notes["best"]
        return {
            "step": operator.index(notes["step"]),
            "tokens": operator.index(notes["tokens"]),
            "seconds": float(notes["seconds"]),
            "validation": tuple((operator.index(step), float(value)) for step, value in notes["validation"]),
            "loss": None if loss is None else float(loss),
            "best": None if at is None else Best(operator.index(at[0]), float(at[1]), best),
            "without_moments": tuple(map(str, notes["without_moments"])),
        }
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise _unfit(path, f"its notes are damaged ({error!r})") from error


def _checked(state: State, steps: int | None) -> State:
    most = math.inf if steps is None else steps
    if not 1 <= state.step <= most:
        raise _unfit(state.path, f"it is of step {state.step}, and the run has steps 1 to {most}")
    return state


def _unfit(path: Path | None, why: str) -> CheckpointError:
    return CheckpointError(
        f"no run can go on from {path}: {why}; go on with the version of Locum that wrote it, or start over with "
        f"--restart (restart=True)"
    )


def has_state(workdir: Path) -> bool:
    """Whether a run, of whatever, could go on from what is there."""
    return (workdir / STATE_FILE).exists() or any(workdir.glob(LAYER_FILES))


def forget(workdir: Path) -> None:
    """Remove the work folder of a run whose result is safe."""
    with contextlib.suppress(OSError):
        clear(workdir)
