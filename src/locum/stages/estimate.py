"""What a stage would take before it is run: an `Estimate`, which stages make with --dry-run and the command line shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import free_space


@dataclass(frozen=True)
class Estimate:
    """Time, memory and disk of a stage. Times are those of this machine as it is now."""

    stage: str
    measured: str  # what was measured, in words
    seconds: float
    memory_bytes: int  # of the process, or of the device it computes on, at most
    read_bytes: int  # from the files of checkpoints
    written_bytes: int  # on the disk at once, at most
    free_memory_bytes: int
    free_disk_bytes: int | None = None  # where it writes; None: it writes nothing worth counting
    parts: tuple[Estimate, ...] = ()

    @classmethod
    def joined(cls, stage: str, parts: Sequence[Estimate]) -> Estimate:
        """Stages that run one after the other, and whose files stay until the end."""
        return cls(
            stage,
            "; ".join(dict.fromkeys(part.measured for part in parts)),
            sum(part.seconds for part in parts),
            max(part.memory_bytes for part in parts),
            sum(part.read_bytes for part in parts),
            sum(part.written_bytes for part in parts),
            min(part.free_memory_bytes for part in parts),
            min((part.free_disk_bytes for part in parts if part.free_disk_bytes is not None), default=None),
            tuple(parts),
        )


def disk_of(out: str | Path | None) -> int | None:
    """Bytes that are free where an output is to be written; None for one that is not written."""
    return None if out is None else free_space(Path(out))
