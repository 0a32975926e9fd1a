"""The engines that can be asked about a checkpoint, each a process in an environment of its own.

transformers runs in this environment; vLLM and llama.cpp where `make engines` puts them, or where a variable says. What
is asked, and how an engine is driven, is in run.py, which the engine's own interpreter runs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import EngineError, OptionError
from ..files import write_text
from ..json_text import parse_json
from ..registry import Registry

SCRIPT, TIMING = (Path(__file__).with_name(name) for name in ("run.py", "timing.py"))
LAST_LINES = 3  # of what a process printed before it died


@dataclass(frozen=True)
class Engine:
    """Where an engine is, what it needs, and how far from transformers' numbers it may be."""

    name: str
    title: str
    package: str  # what its environment can import
    variable: str = ""  # of the environment, with the path of its interpreter
    folder: str = ""  # its environment where nothing else is said
    settings: Mapping[str, str] = field(default_factory=dict)
    # The most that a logit may differ, or a log-probability where the engine gives those. In 16 bits rounding can turn a
    # router's choice, so there the likeliest tokens are compared, and this is said of tokens that tie.
    tolerance: float = 1e-2
    tolerance_16: float = 0.5
    form: str = ""  # of `locum export`, where it reads that alone and no checkpoint folder
    form_options: Mapping[str, Any] = field(default_factory=dict)
    script: Path = SCRIPT  # what its interpreter runs; it answers as run.py does
    timing: Path | None = None  # what its interpreter runs to time it, which answers as timing.py does
    adapters: bool = False  # whether an adapter folder can be put over its base there

    def python(self) -> Path | None:
        """Its interpreter, or None where it is not there. Raises OptionError where the variable leads nowhere."""
        if not self.variable or (self.variable not in os.environ and importlib.util.find_spec(self.package)):
            return Path(sys.executable)
        if named := os.environ.get(self.variable):
            if not Path(named).is_file():
                raise OptionError(
                    f"{self.variable}={named} is not there; give the path of the interpreter of {self.title}"
                )
            return Path(named)
        # Beside Locum's own source alone: the current folder may be a checkpoint that somebody else made.
        made = Path(__file__).parents[3] / self.folder / "bin" / "python"
        return made if made.is_file() else None

    @property
    def absence(self) -> str:
        return f"not there; `make engines` in Locum's source makes {self.folder}, or set {self.variable} to its interpreter"


ENGINES: Registry[Engine] = Registry("engine", "locum.engines")


def register_engine(engine: Engine) -> Engine:
    """Let `locum verify` ask an engine too. Other packages do so under the entry-point group "locum.engines"."""
    return ENGINES.add(engine.name, engine)


register_engine(Engine("transformers", "transformers", "transformers", tolerance=1e-3, adapters=True))
register_engine(
    Engine(
        "vllm",
        "vLLM",
        "vllm",
        "LOCUM_VLLM_PYTHON",
        ".venv-vllm",
        {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
        },
        timing=TIMING,
    )
)
register_engine(
    Engine(
        "llamacpp",
        "llama.cpp",
        "llama_cpp",
        "LOCUM_LLAMACPP_PYTHON",
        ".venv-llamacpp",
        form="gguf",
        form_options={"type": "f32"},
        timing=TIMING,
    )
)


def chosen_engines(names: str | None) -> dict[str, Engine]:
    """The engines of a list of names with commas, or all. Raises OptionError for an unknown name, and for one that is
    named but not there."""
    if names is None:
        return dict(ENGINES.items())
    return {name: ENGINES[name] for name in (part.strip() for part in names.split(","))}


@dataclass(frozen=True)
class Answer:
    """What an engine says: see run.py."""

    version: str
    values: torch.Tensor
    ids: torch.Tensor | None
    tokens: list[list[int]]
    keys: dict[str, list[str]]
    texts: list[list[int]] | None
    bytes: int | None
    seconds: float


def last_words(said: str) -> str:
    """The last lines of what a process printed."""
    return " | ".join(said.strip().splitlines()[-LAST_LINES:]) or "it said nothing"


def ask_all(
    engine: Engine, python: Path, jobs: Sequence[Mapping[str, Any]], workdir: Path, **environment: str
) -> list[dict[str, Any]]:
    """Run jobs in the engine's environment, one after another in one process; what it says of each, as run.py has
    it. Raises EngineError with its last words where the process dies."""
    workdir.mkdir(parents=True, exist_ok=True)
    asked, answers = workdir / "jobs.json", workdir / "answers.json"
    write_text(asked, json.dumps(list(jobs)))
    settings = {**engine.settings, **os.environ, "HF_HUB_OFFLINE": "1", **environment}
    # -P: the folder of the script is not searched for modules; it may have some with the names of others.
    command = [str(python), "-P", str(engine.script), engine.name, str(asked), str(answers)]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode or not answers.is_file():
        raise EngineError(f"{engine.title} ended with code {done.returncode}: {last_words(done.stderr)}")
    return parse_json(answers.read_text(encoding="utf-8"))


def ask(engine: Engine, python: Path, job: Mapping[str, Any], workdir: Path) -> Answer:
    """What an engine says of one job. Raises EngineError with its own words where it failed."""
    start = time.perf_counter()
    (said,) = ask_all(engine, python, [job], workdir)
    if "error" in said:
        kind, message = said["error"]
        raise EngineError(f"{engine.title} refused it: {kind}: {' '.join(message.split()) or 'no message'}")
    return Answer(
        said["version"],
        torch.from_numpy(np.load(workdir / said["values"])),
        torch.from_numpy(np.load(workdir / said["ids"])) if "ids" in said else None,
        said["tokens"],
        said["keys"],
        said.get("texts"),
        said.get("bytes"),
        time.perf_counter() - start,
    )
