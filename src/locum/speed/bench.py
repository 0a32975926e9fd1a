"""How fast a model is and how much memory it takes, beside the original, and how far that is from what the machine can do.

    bench --questions--> one process per model (run.py) --seconds--> rows --> JSON, picture, table

Every round asks each model, implementation and number of prompts once, in an order that moves on by one each time, so
that other load on the machine hits all of them alike. Prefill is the pass over the prompts up to their first new token,
decode the passes after it. The floor of a pass is what reading its weights takes at the measured bandwidth, or what its
operations take at the measured rate, whichever is longer (measure/costs.py says what is counted). In another engine the same is
counted, in proportion to the bytes of the weights that it holds.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

from ..bundled import sample_texts
from ..checkpoints.notes import plan_of
from ..checkpoints.read import fingerprint_checkpoint, load_tokenizer, read_config
from ..checkpoints.skeleton import check_vocabularies, read_shape
from ..engines.engines import ENGINES, Engine, chosen_engines
from ..errors import EngineError, LocumError, OptionError
from ..files import check_output, or_else_printed, provenance, write_text
from ..places import name_of
from ..stages.opening import Precision, dtype_of
from ..stages.options import Device, Force, Help, Out, Progress, alone, check_number, device_of, silent
from . import page
from .asking import Asked, Elsewhere, Failed, worker

KIND, FORMAT_VERSION = "locum-bench", 1
CHARACTERS_PER_TOKEN = 10  # of text, on the safe side
PHASES = ("prefill", "decode")
OWN = "transformers"  # the engine whose implementations run.py times


@alone
def bench(
    model: Path,
    *,
    against: Annotated[Path | None, Help("the original, timed in the same rounds")] = None,
    engine: Annotated[
        str,
        Help(
            lambda: f"engines, separated by commas: {', '.join(n for n, e in ENGINES.items() if n == OWN or e.timing)}"
        ),
    ] = OWN,
    gguf: Annotated[
        Path | None,
        Help("the model as llama.cpp is to run it, such as in 4 bits; default: exported in its own precision"),
    ] = None,
    prompt: Annotated[int, Help("tokens of a prompt")] = 128,
    new_tokens: Annotated[int, Help("tokens to generate after each prompt")] = 32,
    batch_sizes: Annotated[Sequence[int], Help("prompts at a time; may be given several times")] = (1, 8),
    rounds: Annotated[int, Help("times that everything is measured")] = 5,
    precision: Precision = "auto",
    threads: Annotated[int | None, Help("threads of the processor; default: as many as PyTorch takes")] = None,
    device: Device = "auto",
    out: Out = None,
    picture: Annotated[Path | None, Help("write charts of the results to this HTML page")] = None,
    force: Force = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Tokens per second, time to the first token, memory, and the work behind them, with the floor that the machine sets.

    With --against, side by side with the original under each of transformers' implementations of experts. On the processor, both
    also as locum.optimize makes them, and in other engines, each in an environment of its own (`make engines`).
    """
    folders = {"model": Path(model)} | ({} if against is None else {"original": Path(against)})
    engines = _engines(engine, gguf, device := device_of(device))
    given = {
        "engines": [one.name for one in engines],
        "prompt": prompt,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "precision": precision,
        "threads": threads,
    }
    settings = given | {"batch_sizes": list(batch_sizes), "device": device}
    _check(settings)
    for path in (out, picture):
        if path is not None:
            check_output(path, force, inputs=list(folders.values()))
    about = {name: _about(folder, settings) for name, folder in folders.items()}
    if against is not None:
        check_vocabularies(model, against)
    ids = _text_ids(folders["model"], max(batch_sizes), prompt + new_tokens)
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="locum-bench-") as scratch:
        workers = {name: stack.enter_context(worker(name, Path(scratch) / name)) for name in folders}
        others = {}
        for name, one in ((name, one) for name in folders for one in engines if one.name != OWN):
            (place := Path(scratch) / f"{name}-{one.name}").mkdir()
            ask = stack.enter_context(worker(f"{name} in {one.title}", place / "said", one))
            given = gguf if name == "model" else None
            others[name, one.name] = Elsewhere(one, folders[name], given, ask, place)
        measured = measure(workers, others, folders, ids, settings, progress)
    result = {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "settings": settings,
        **results(about, measured, settings),
    }
    result["provenance"] = provenance()
    text = json.dumps(result, indent=1)
    with or_else_printed(text):
        if out is not None:
            write_text(Path(out), text)
        if picture is not None:
            write_text(Path(picture), page.make_page(result))
    return result


# --- checks, before any weight is read --------------------------------------------------------------------------------


def _check(settings: dict[str, Any]) -> None:
    for name, least in (("prompt", 1), ("new_tokens", 2), ("rounds", 1), ("threads", 1)):
        if settings[name] is not None:
            check_number(name.replace("_", "-"), settings[name], least)
    if not settings["batch_sizes"]:
        raise OptionError("--batch-sizes names no number of prompts; give at least one, such as 1")
    for size in settings["batch_sizes"]:
        check_number("batch-sizes", size, 1)
    dtype_of(settings["precision"])


def _engines(names: str, gguf: Path | None, device: str) -> list[Engine]:
    """The engines named, all of which are there and can be timed. Raises OptionError where one is not."""
    chosen = list(chosen_engines(names).values())
    others = [engine for engine in chosen if engine.name != OWN]
    for engine in others:
        if engine.timing is None:
            raise OptionError(f"--engine {engine.name} cannot be timed; locum verify can ask it")
        if engine.python() is None:
            raise OptionError(f"--engine {engine.name} is {engine.absence}")
    if others and device != "cpu":
        raise OptionError(f"--engine {others[0].name} is timed on the processor alone; give --device cpu")
    if gguf is not None:
        if not any(engine.form == "gguf" for engine in others):
            raise OptionError("--gguf is for llama.cpp; give --engine llamacpp too")
        if not Path(gguf).is_file():
            raise OptionError(f"no such file: {gguf}; --gguf is a model as `locum export --to gguf` writes it")
    return chosen


def _about(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What is known of a checkpoint from its files. Raises OptionError where the text is too long for it."""
    shape, plan = read_shape(folder), plan_of(folder)
    length, most = settings["prompt"] + settings["new_tokens"], _positions(folder)
    if most is not None and length > most:
        raise OptionError(
            f"--prompt and --new-tokens are {length} tokens together; {folder} has {most} positions; ask for fewer"
        )
    return {
        "name": name_of(folder),
        "fingerprint": fingerprint_checkpoint(folder),
        "plan": None if plan is None else plan.id,
        "method": None if plan is None else plan.method,
        "parameters": shape.parameters,
        "bytes": shape.bytes,
        "layers": len(shape.layers),
    }


def _positions(folder: Path) -> int | None:
    return getattr(read_config(folder).get_text_config(), "max_position_embeddings", None)


def _text_ids(folder: Path, count: int, length: int) -> list[list[int]]:
    """The first tokens of `count` stretches of the bundled text."""
    tokenizer = load_tokenizer(folder)
    texts = sample_texts(count, CHARACTERS_PER_TOKEN * length)
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:length] for text in texts]
    if shortest := min((len(row) for row in rows if len(row) < length), default=None):
        raise OptionError(
            f"{count} prompts with {length} tokens each are asked for, and the bundled text has only {shortest} for the "
            f"shortest; lower --batch-sizes, --prompt or --new-tokens"
        )
    return rows


# --- asking -----------------------------------------------------------------------------------------------------------


Runs = dict[tuple[str, str], Asked]  # who is asked, by model and implementation


def measure(
    workers: dict[str, Asked],
    others: dict[tuple[str, str], Elsewhere],
    folders: dict[str, Path],
    ids: list[list[int]],
    settings: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Everything that the processes say, by model, and by model, implementation (or engine) and number of prompts."""
    how = {"ids": ids, "prompt": settings["prompt"], "threads": settings["threads"], "device": settings["device"]}
    how["dtype"] = str(dtype_of(settings["precision"]) or "auto").removeprefix("torch.")
    loaded, work, told = {}, {}, {name: [] for name in workers}
    for number, (name, ask) in enumerate(workers.items()):
        progress("bench: loading", number, len(workers) + len(others))
        loaded[name] = ask("load", folder=str(folders[name]), **how)
        work |= {(name, size): ask("work", batch=size) for size in settings["batch_sizes"]}
    asked: Runs = {(name, one): workers[name] for name in workers for one in loaded[name]["implementations"]}
    if OWN not in settings["engines"]:
        asked = {}
    engines, failed = {}, {}
    for number, (who, other) in enumerate(others.items(), len(workers)):
        progress("bench: loading", number, len(workers) + len(others))
        try:
            engines[who] = other.load(loaded[who[0]], how)
            asked[who] = other.ask
        except LocumError as error:
            failed[who] = getattr(error, "why", str(error))
    runs, not_run = _warmed(asked, failed, settings["batch_sizes"])
    for name in workers:
        if not any(run[0] == name for run in runs):
            why = next(x["why"] for x in reversed(not_run) if x["model"] == name)
            raise EngineError(f"the {name} could not be timed at all: {why}")
    said: dict[tuple[str, str, int], list[dict[str, Any]]] = {run: [] for run in runs}
    for number in range(settings["rounds"]):
        for name, ask in workers.items():
            told[name].append(ask("machine"))
        first = number % len(runs)
        for done, run in enumerate(runs[first:] + runs[:first]):
            name, implementation, size = run
            progress(
                f"bench: {name}, {implementation}, {size}", number * len(runs) + done, settings["rounds"] * len(runs)
            )
            said[run].append(asked[name, implementation]("generate", implementation=implementation, batch=size))
    progress("bench: done", settings["rounds"] * len(runs), settings["rounds"] * len(runs))
    return {"loaded": loaded, "work": work, "machine": told, "said": said, "not_run": not_run, "engines": engines}


def _warmed(
    asked: Runs, failed: dict[tuple[str, str], str], sizes: Sequence[int]
) -> tuple[list[tuple[str, str, int]], list[dict[str, Any]]]:
    """What runs, each once by now, which warms caches and thread pools; and what does not, with the reason."""
    runs, not_run = [], []
    for (name, implementation), size in itertools.product([*asked, *failed], sizes):
        try:
            if (why := failed.get((name, implementation))) is None:
                asked[name, implementation]("generate", implementation=implementation, batch=size)
                runs.append((name, implementation, size))
        except Failed as error:
            why = error.why
        if why is not None:
            not_run.append({"model": name, "implementation": implementation, "batch": size, "why": why})
    return runs, not_run


# --- what it comes to -------------------------------------------------------------------------------------------------


def results(about: dict[str, Any], measured: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Models with their memory and their machine, and a row for every model, implementation, batch and phase."""
    models = {}
    for name, known in about.items():
        told = measured["machine"][name]
        best = {key: max(one[key] for one in told) for key in told[0]}  # a peak is the most that was ever reached
        loaded = {k: v for k, v in measured["loaded"][name].items() if k != "implementations"}
        engines = {engine: said for (of, engine), said in measured["engines"].items() if of == name}
        models[name] = known | loaded | best | {"engines": engines}
    rows = [
        _row(run, phase, said, measured["work"][run[0], run[2]], models[run[0]])
        for run, said in measured["said"].items()
        for phase in PHASES
    ]
    for row in rows:
        rivals = [
            r for r in rows if r["model"] == "original" and (r["batch"], r["phase"]) == (row["batch"], row["phase"])
        ]
        best_second = min((r["median_seconds"] for r in rivals), default=None)
        row["times_the_original"] = None if best_second is None else best_second / row["median_seconds"]
    return {"models": models, "rows": rows, "not_run": measured["not_run"]}


def _row(
    run: tuple[str, str, int], phase: str, said: list[dict[str, Any]], work: list[dict[str, Any]], model: dict[str, Any]
) -> dict[str, Any]:
    calls = work[:1] if phase == "prefill" else work[1:]
    elsewhere = model["engines"].get(run[1])
    share = elsewhere["share"] if elsewhere else 1.0  # of the bytes that transformers' process holds
    tokens, read, operations = (sum(call[key] for call in calls) for key in ("tokens", "bytes", "operations"))
    floor = sum(
        max(call["bytes"] * share / model["bytes_per_second"], call["operations"] / model["operations_per_second"])
        for call in calls
    )
    seconds = [one[phase] for one in said]
    middle, (fast, slow) = statistics.median(seconds), quartiles(seconds)
    peaks = [one["peak_bytes"] for one in said if one["peak_bytes"] is not None]
    return {
        **dict(zip(("model", "implementation", "batch"), run, strict=True)),
        "engine": run[1] if elsewhere else OWN,
        "phase": phase,
        "tokens_per_second": tokens / middle,
        "low": tokens / slow,
        "high": tokens / fast,
        "first_token_seconds": middle if phase == "prefill" else None,
        "median_seconds": middle,
        "seconds": seconds,
        "tokens": tokens,
        "bytes_per_token": read * share / tokens,
        "operations_per_token": operations / tokens,
        "experts_per_layer": statistics.mean(count for call in calls for count in call["experts"]),
        "floor_seconds": floor,
        "times_the_floor": middle / floor,
        "peak_bytes": max(peaks, default=None),
    }


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third; of a single value, the value."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third
