"""Tasks with gold answers, scored by lm-eval: a model and its original on the same items, with paired intervals.

lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) reads the tasks, builds the prompts and scores every item;
here its per-item values become the rows that every other metric has. A value is lm-eval's own aggregate; its 95%
interval resamples items, and model and original share the resamples, so their difference is paired.

Shapes: R resamples, N items of a task.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import io
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LocumError, OptionError
from ..files import fingerprint
from .loss import INTERVAL
from .memory import peak_bytes
from .rows import Row

Values = dict[str, list[Any]]  # metric -> its value for each of N items, as lm-eval aggregates them


@dataclass(frozen=True)
class Scores:
    """What one model scored on one task."""

    values: Values
    aggregates: dict[str, Callable[[list[Any]], float]]
    stderr: dict[str, float | None]  # lm-eval's own standard errors; None where it has none
    items: str  # fingerprint of the items and their prompts


def find_tasks(names: str | Sequence[str], folder: Path | None = None) -> dict[str, Any]:
    """lm-eval's task objects for names (or `a,b`), groups taken apart; `folder` holds more task files, and comes first.

    Raises OptionError when lm-eval is not installed, for an unknown name (with close matches) and for a task whose data
    cannot be read. lm-eval's own tasks read their data from a hub; those of a folder may read local files.
    """
    wanted = [name.strip() for name in (names.split(",") if isinstance(names, str) else names) if name.strip()]
    if not wanted:
        raise OptionError("--tasks names no task; write one or more, such as --tasks piqa,hellaswag")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise OptionError(f"--tasks needs lm-eval ({error}); install it with: pip install 'locum[eval]'") from None
    if folder is not None and not any(Path(folder).glob("**/*.yaml")):
        raise OptionError(f"--task-path {folder} holds no task file (.yaml); name a folder with lm-eval task files")
    with _quiet():
        manager = TaskManager(include_path=folder, include_defaults=False) if folder is not None else None
        own = manager.all_tasks if manager is not None else []
        if manager is None or not set(wanted) <= set(own):  # lm-eval's thousands of files take seconds to read
            manager = TaskManager(include_path=folder)
        for name in wanted:
            if name not in manager.all_tasks:
                raise OptionError(_unknown_task(name, manager.all_tasks, own, folder))
        tasks = _load(manager, wanted)
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise OptionError(f"task {name!r} runs code that the model writes; run it with lm_eval, in a sandbox")
    return tasks


def _unknown_task(name: str, known: list[str], own: list[str], folder: Path | None) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    there = f"{folder} has {', '.join(own)}; " if own else "--task-path FOLDER adds your own; "
    return f"unknown task {name!r}: {hint}{there}`lm_eval ls tasks` lists lm-eval's"


def _load(manager: Any, wanted: list[str]) -> dict[str, Any]:
    try:
        return manager.load(list(dict.fromkeys(wanted)))["tasks"]
    except LocumError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise OptionError(
            f"the data of {', '.join(wanted)} cannot be read: {type(error).__name__}: {said:.300}; lm-eval's own tasks "
            f"need a network or a cache that holds them, tasks of --task-path may read local files"
        ) from error


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Any],
    *,
    against: Any = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    resamples: int = 1000,
    model_name: str = "model",
    against_name: str = "original",
    plan: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Score a causal language model on tasks from `find_tasks`; rows have the task as domain and items as n.

    The metrics are the task's own, such as acc (the likeliest option is right) and acc_norm (the same per character).
    With `against`, the original's rows come along, and `METRIC_delta` is model minus original on the same items.
    `limit` takes the first items of each task. Prompts have no chat template, as lm-eval does by default.
    """
    if batch_size < 1 or resamples < 1 or (limit is not None and limit < 1):
        raise OptionError(f"batch_size is {batch_size}, resamples {resamples}, limit {limit}; all must be 1 or more")
    start = time.perf_counter()
    ours = _scores(model, tokenizer, tasks, limit, batch_size, seed, resamples)
    theirs = None if against is None else _scores(against, tokenizer, tasks, limit, batch_size, seed, resamples)
    about = {"lm_eval": importlib.metadata.version("lm_eval"), "limit": limit, "resamples": resamples}
    shared = {"seed": seed, "seconds": time.perf_counter() - start, "peak_bytes": peak_bytes(model.device)}
    rows = []
    for name, scores in ours.items():
        other = None if theirs is None else theirs[name]
        if other is not None and other.items != scores.items:
            raise LocumError(f"task {name!r} gave the two models different items; its data or prompts change by run")
        for (whose, metric), (value, low, high, stderr) in _measure(scores, other, f"{seed}:{name}", resamples).items():
            called, of_plan = (model_name, plan) if whose == "model" else (against_name, None)
            evaluation = {**about, "task": name, "items": scores.items, "stderr": stderr}
            made = {**(provenance or {}), "evaluation": evaluation}
            n = len(next(iter(scores.values.values())))
            rows.append(Row(called, of_plan, metric, name, value, low, high, n, **shared, provenance=made))
    return rows


def _scores(
    model: Any, tokenizer: Any, tasks: Mapping[str, Any], limit: int | None, batch_size: int, seed: int, resamples: int
) -> dict[str, Scores]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    with _quiet():
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        found = lm_eval.evaluate(
            lm=wrapped,
            task_dict={"tasks": dict(tasks), "groups": {}},
            limit=limit,
            log_samples=True,
            bootstrap_iters=resamples,
        )
    return {name: _collect(task, found["samples"][name], found["results"][name]) for name, task in tasks.items()}


def _collect(task: Any, samples: list[dict[str, Any]], results: dict[str, Any]) -> Scores:
    """Per-item values of every metric. A task with several filters has each metric once per filter."""
    values: Values = {}
    aggregates, stderr = {}, {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        for metric in sample["metrics"]:
            plain = sample["filter"] == "none"
            called = metric if plain else f"{metric} ({sample['filter']})"
            values.setdefault(called, []).append(sample[metric])
            aggregates[called] = task.aggregation()[metric]
            said = results.get(f"{metric}_stderr,{sample['filter']}")
            stderr[called] = float(said) if isinstance(said, int | float) else None
    marks = [sample[key] for sample in samples for key in ("doc_hash", "prompt_hash", "target_hash")]
    return Scores(values, aggregates, stderr, fingerprint("".join(marks)))


def _measure(
    ours: Scores, theirs: Scores | None, seed: str, resamples: int
) -> dict[tuple[str, str], tuple[float, float | None, float | None, float | None]]:
    """Value, 95% interval and lm-eval's standard error, keyed by whose it is and the metric."""
    measured = {}
    for metric, values in ours.values.items():
        draws_RN = np.random.default_rng(int(fingerprint(seed), 16)).integers(
            len(values), size=(resamples, len(values))
        )
        both = {"model": ours} if theirs is None else {"model": ours, "original": theirs}
        points, drawn_R = {}, {}
        for whose, scores in both.items():
            aggregate, items = scores.aggregates[metric], scores.values[metric]
            points[whose] = float(aggregate(items))
            drawn_R[whose] = np.array([aggregate([items[i] for i in draw_N]) for draw_N in draws_RN.tolist()])
            measured[whose, metric] = (points[whose], *_interval(drawn_R[whose], len(items)), scores.stderr[metric])
        if theirs is not None:
            paired_R = drawn_R["model"] - drawn_R["original"]
            delta = points["model"] - points["original"]
            measured["model", f"{metric}_delta"] = (delta, *_interval(paired_R, len(values)), None)
    return measured


def _interval(drawn_R: np.ndarray, items: int) -> tuple[float | None, float | None]:
    return tuple(np.percentile(drawn_R, INTERVAL).tolist()) if items > 1 else (None, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's remarks, which are about its own command line, and its progress bars except on a terminal."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    bars = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with bars:
            yield
    finally:
        log.setLevel(level)
