"""Statistics that `compress` made, kept in the user's cache for the next run that asks the same.

The name of a file is a hash of the whole question: the model, its tokenizer, the text as tokens (so also their number,
length and seed), which statistics, the batches, a search's method and options, and the code that counts. The newest few
are kept. Nothing depends on them: where they cannot be kept or read, the next run calibrates.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..cache import only_ours, own_folder
from ..errors import LocumError
from ..files import clear, fingerprint, sweep
from ..places import remember
from ..stats.origin import Origin
from ..stats.statistics_file import STATISTICS_VERSION, load_statistics
from ..stats.sums import Statistics

FOLDER, END = "statistics", ".safetensors"
MOST_FILES, MOST_BYTES = 8, 8 * 2**30
PACKAGE = Path(__file__).parents[1]
logger = logging.getLogger(__name__)


def has_some(model_fingerprint: str) -> bool:
    """Whether there are statistics of a model. If not, its text need not be read to ask for them."""
    with contextlib.suppress(OSError):
        return any(own_folder(FOLDER).glob(f"{model_fingerprint}-*{END}"))
    return False


def kept(origin: Origin, asked: Mapping[str, Any]) -> tuple[Path | None, Statistics | None]:
    """The statistics that answer exactly this, and their file, if there are any; with a word."""
    try:
        file = _file(origin, asked)
        if not only_ours(file):
            return None, None
        found = load_statistics(file)
    except (OSError, LocumError):
        return None, None
    if found.unlike(origin, asked) or found.next_block is not None:
        return None, None
    with contextlib.suppress(OSError):
        os.utime(file)
    logger.warning("the statistics of an earlier run are used, of the same model, text and options: %s", file)
    return file, found


def keep(made: Path, statistics: Statistics) -> None:
    """Move the file of these statistics to the others, and let the oldest go. Where it cannot be kept, it is removed."""
    try:
        if not made.is_file():
            return
        if (size := made.stat().st_size) > MOST_BYTES:
            logger.warning(
                "the statistics have %.1f GiB, and no more than %.0f GiB are kept for the next run; to keep them, name a "
                "file with --statistics",
                size / 2**30,
                MOST_BYTES / 2**30,
            )
            return
        file = _file(statistics.origin, statistics.asked or {})
        scratch = file.with_name(f".{file.name}.part-{os.getpid()}")  # of a killed run, the next one sweeps it
        try:
            shutil.move(made, scratch)
            scratch.chmod(0o600)
            os.replace(scratch, file)
        finally:
            clear(scratch)
        remember(statistics.id, file)
        _let_go(file.parent)
    except OSError as error:
        logger.info("the statistics are not kept for the next run: %s", error)
    finally:
        clear(made)


def _file(origin: Origin, asked: Mapping[str, Any]) -> Path:
    question = {**origin.words(), "shape": origin.shape.fingerprint, **asked, "code": _code()}
    return own_folder(FOLDER) / f"{origin.model_fingerprint}-{fingerprint(json.dumps(question, sort_keys=True))}{END}"


@functools.cache
def _code() -> str:
    """What counts: Locum as it is installed, and the libraries under it."""
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers")]
    return fingerprint(str(STATISTICS_VERSION), *versions, *(p.read_bytes() for p in sorted(PACKAGE.rglob("*.py"))))


def _let_go(folder: Path) -> None:
    """Remove all but the newest, within the limits, and what killed runs left."""
    for left in folder.glob(".*.part-*"):
        sweep(folder / left.name[1:].rpartition(".part-")[0])
    total = 0
    files = sorted(folder.glob(f"*{END}"), key=lambda file: file.stat().st_mtime, reverse=True)
    for number, file in enumerate(files):
        total += file.stat().st_size
        if number >= MOST_FILES or total > MOST_BYTES:
            file.unlink(missing_ok=True)
