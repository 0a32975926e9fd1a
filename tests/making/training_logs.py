"""Logs of real training runs, as `recover` leaves them in a checkpoint."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from making.tiny_models import tiny_model
from making.training import compressed, light, run, tiny_tokens


@functools.cache
def real_log(steps: int) -> str:
    """The log of an annealed run of a tiny model, validated five times on the way."""
    original = tiny_model("olmoe")
    plan = light(original)
    options = {"steps": steps, "validate_every": max(steps // 5, 1), "end_fraction": 0.7}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        run(compressed(original, plan), plan, original, tiny_tokens(3), log=log, **options)
        return log.read_text(encoding="utf-8")


def make_log(path: Path, steps: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(real_log(steps), encoding="utf-8")
    return path
