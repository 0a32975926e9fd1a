"""States of an interrupted training run, from which it goes on to the same weights."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, OptionError
from ..json_text import parse_json

STATE_FILE = "state.safetensors"
STATE_VERSION = "2"


@dataclass(frozen=True, eq=False)
class Best:
    """The trained parameters, on the CPU, at the validation with the lowest loss so far."""

    step: int
    loss: float
    tensors: dict[str, Tensor]


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


def sample(tensor: Tensor) -> bytes:
    """Shape, dtype and some 64 values from all over a tensor: a part of what identifies a run."""
    values = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // 64)].double().cpu()
    return f"{list(tensor.shape)} {tensor.dtype}".encode() + values.numpy().tobytes()


def load_state(workdir: Path | None, identity: dict[str, Any], restart: bool) -> State:
    """The state an interrupted run left in `workdir`, or a fresh one. Raises OptionError if it was another run's."""
    if workdir is None or not (workdir / STATE_FILE).is_file():
        return State()
    if restart:
        forget(workdir)
        return State()
    path = workdir / STATE_FILE
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
        notes = parse_json(header["locum-recovery"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}); start over with --restart (restart=True)") from error
    theirs = notes["identity"]
    differ = [key for key in sorted({*identity, *theirs}) if identity.get(key) != theirs.get(key)]
    if differ:
        changes = ", ".join(f"{key} was {theirs.get(key)!r} and is {identity.get(key)!r}" for key in differ)
        raise OptionError(
            f"{workdir} holds an interrupted run of something else: {changes}; give what that run was given to resume "
            f"it, or --restart (restart=True) to discard it"
        )
    validation = tuple((step, loss) for step, loss in notes["validation"])
    best = {key.removeprefix("best|"): tensors.pop(key) for key in list(tensors) if key.startswith("best|")}
    return State(
        notes["step"],
        tensors,
        notes["tokens"],
        notes["seconds"],
        validation,
        notes["loss"],
        None if notes["best"] is None else Best(*notes["best"], best),
    )


def forget(workdir: Path) -> None:
    """Remove the work folder of a run whose result is safe."""
    shutil.rmtree(workdir, ignore_errors=True)
