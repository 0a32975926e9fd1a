"""What lm-eval's task files of this folder name as functions: the data, and bits per byte of an answer.

Importing it imports Locum, so that lm-eval's own command line opens compressed checkpoints when a task is named by its
file: `lm_eval --model hf --model_args pretrained=DIR --tasks benchmarks/tasks/lm_eval/locum_piqa.yaml`. (Named by
`--tasks locum_piqa --include_path benchmarks/tasks/lm_eval` the model is loaded first, which only stock checkpoints
survive.)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

import locum  # noqa: F401 - registers the loader of compressed checkpoints

# lm-eval and `locum eval` read this file by its path, from anywhere: nothing else tells them where the package is.
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from benchmarks.tasks import items


def dataset(name: str, **_: Any) -> DatasetDict:
    """The test items of one set, in seeded order."""
    return DatasetDict({"test": Dataset.from_list(items.evaluation_items(name))})


def solution_bits(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """Log-likelihood of the solution after its prompt, and its UTF-8 bytes: bits per byte adds up both."""
    return {"bits_per_byte": (results[0][0], len(doc["solution"].encode()))}
