"""An export target of another package: a list of a checkpoint's tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from locum.checkpoints.read import read_headers
from locum.checkpoints.weight_files import is_adapter
from locum.exports.target import target
from locum.files import write_text
from locum.options import option


@target("listing")
@dataclass(frozen=True)
class Listing:
    """A text file with the names of the tensors."""

    kind: ClassVar[str] = "file"
    ending: str = option("", "only names that end so")

    def fault(self, model: Path) -> str:
        return "it is an adapter, whose tensors are not all there; give its base" if is_adapter(model) else ""

    def write(self, model: Path, out: Path) -> str:
        names = sorted(name for name in read_headers(model) if name.endswith(self.ending))
        write_text(out, "\n".join(names))
        return f"{len(names)} names"
