"""Export targets: the forms, other than Locum's own, that a checkpoint can be written in. Every target is one file.

A target is a frozen dataclass. Its fields are its options, with their help and what they allow:

    @target("gguf")
    @dataclass(frozen=True)
    class Gguf:
        \"\"\"One sentence, which the command line shows.\"\"\"

        kind: ClassVar[str] = "file"
        type: str = option("bf16", "of the numbers in the file", choices=("f32", "bf16"))

        def fault(self, model: Path) -> str: ...
        def write(self, model: Path, out: Path) -> str: ...

Other packages offer targets under the entry-point group "locum.exports". `locum verify` uses a target too, where an
engine reads that form alone (`Engine.form`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

from ..errors import UnsupportedModel
from ..registry import Registry


class Target(Protocol):
    """What the rest of Locum needs of an export target."""

    name: ClassVar[str]
    kind: ClassVar[str]  # what it writes: "file" or "folder"

    def fault(self, model: Path) -> str:
        """Why this form cannot hold the checkpoint in the folder `model`, and what to do. Empty where it can hold it.

        It is asked before any weight is read. Damaged checkpoints are not its concern: reading them raises.
        """
        ...

    def write(self, model: Path, out: Path) -> str:
        """Write the checkpoint to `out`, whole or not at all, and say in words what was written.

        It is called only where there is no fault. The checkpoint stays as it is.
        """
        ...


TARGETS: Registry[type[Target]] = Registry("form", "locum.exports")
Class = TypeVar("Class", bound=type)


def target(name: str) -> Callable[[Class], Class]:
    """Register an export target under the name that `locum export --to` takes."""

    def register(cls: Class) -> Class:
        cls.name = name
        return TARGETS.add(name, cls)

    return register


def write_form(form: Target, model: Path, out: Path) -> str:
    """Write a checkpoint in a form, and say in words what was written. Raises UnsupportedModel where it cannot be held."""
    if fault := form.fault(model):
        raise UnsupportedModel(f"{model}: {fault}")
    return form.write(model, out)
