"""The processes that time models: questions and answers are lines of JSON (run.py, engines/timing.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engines.engines import Engine, last_words
from ..errors import EngineError
from ..exports.target import TARGETS, write_form
from ..json_text import parse_json
from ..options import make_options


class Asked:
    """The process that times one model."""

    def __init__(self, name: str, process: subprocess.Popen[str], said: Path) -> None:
        self.name, self.process, self.said = name, process, said

    def __call__(self, do: str, **question: Any) -> Any:
        """Its answer. Raises EngineError where it has none, with the type of its error first."""
        try:
            self.process.stdin.write(json.dumps({"do": do, **question}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EngineError(
                f"the process that times the {self.name} ended with code {self.process.wait()} (-9: the system ended it, as "
                f"it does when memory runs out): {last_words(self.said.read_text(errors='replace'))}"
            )
        answer = parse_json(line)
        if "error" in answer:
            raise Failed(self.name, *answer["error"])
        return answer["answer"]


class Failed(EngineError):
    """What a process could not do, and went on after."""

    def __init__(self, name: str, kind: str, message: str) -> None:
        self.why = " ".join(message.split()) or kind
        super().__init__(f"the {name} could not be timed: {kind}: {self.why}")


@contextmanager
def worker(name: str, said: Path, engine: Engine | None = None) -> Iterator[Asked]:
    """A process that ends with the block, however that ends: run.py's, or an engine's own in its environment."""
    command, settings = [sys.executable, "-P", "-m", f"{__package__}.run"], None
    if engine is not None:
        command = [str(engine.python()), "-P", str(engine.timing), engine.name]
        settings = {**engine.settings, **os.environ, "HF_HUB_OFFLINE": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    with said.open("w") as errors:
        process = subprocess.Popen(command, stderr=errors, env=settings, **pipes)
    try:
        yield Asked(name, process, said)
    finally:
        process.kill()
        process.communicate()


GGUF_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True)
class Elsewhere:
    """A model in another engine than transformers. `given`: the file to run in place of the folder, where the engine reads files."""

    engine: Engine
    folder: Path
    given: Path | None
    ask: Asked
    scratch: Path

    def load(self, own: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
        """Load it as the process of transformers did (`own`); its version, and its bytes over those of the weights there.

        Raises LocumError where it cannot be had in this engine.
        """
        place = self.folder
        if self.engine.form:
            place = self.given or self._exported(own["dtype"])
        same = {"dtype": own["dtype"], "threads": own["threads"]}
        said = self.ask("load", folder=str(place.resolve()), **how | same)
        size = said.get("bytes", own["weights_bytes"])
        return said | {"bytes": size, "share": size / own["weights_bytes"]}

    def _exported(self, dtype: str) -> Path:
        form = make_options(TARGETS[self.engine.form], {"type": GGUF_TYPES[dtype]})
        write_form(form, self.folder, file := self.scratch / f"model.{form.name}")
        return file
