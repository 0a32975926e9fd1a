"""Peak memory of every stage, in multiples of the checkpoint: with the whole model in memory, and with one decoder layer at a time.

    python -m benchmarks.bigger.memory WORKDIR --out benchmarks/results/bigger_memory.jsonl [--page docs/memory.md]

Every run is a process of its own with one thread, and its peak is the operating system's, of the whole process tree. What
importing Locum takes is measured first and taken off. The checkpoint has the architecture of OLMoE and random weights in bfloat16;
computed is in float32 where the stage has a choice. `--page` writes the table of what the results file holds, and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.speed.timing import publish
from locum.bundled import reference_data
from locum.checkpoints.skeleton import read_shape

from .apply import child
from .checkpoint import OLMOE, random_checkpoint

SIZES = OLMOE | {"hidden_size": 512, "intermediate_size": 512, "num_experts": 32, "num_attention_heads": 8}
SIZES |= {"num_key_value_heads": 8, "num_experts_per_tok": 4, "vocab_size": 8192}
TRAININGS = "bigger_training.jsonl"  # beside the results of this program
HEAD = """# Memory

Peak memory of every stage in multiples of the checkpoint, what importing Locum takes (here {base:.2f} GiB) taken off: the operating
system's figure of the whole process tree. Made by `python -m benchmarks.bigger.memory WORKDIR --page docs/memory.md` from
`benchmarks/results/bigger_memory.jsonl`: {layers} decoder layers, {size:.2f} GiB of bfloat16, {tokens:,} tokens, of trainings 4 steps of 512.
Numbers are float32 where a stage computes, twice the checkpoint; files that are mapped while they load count too. A checkpoint
this small makes activations and what a layer needs for itself look large. `search` holds the Gram matrices of all layers, 1.0 GiB
here: they lie on the disk where they would take more than a quarter of the free memory.

| stage | whole model | one layer at a time |
|---|---|---|
"""
TRAINING = """
Trainings of a model of SmolMoE's shape, {parameters:,} parameters in {size:.2f} GiB of bfloat16 with random weights, half of whose
experts LightMoE has replaced: {steps} steps of {tokens} tokens, old weights there until the last. Made by
`python -m benchmarks.bigger.training`, evidence `benchmarks/results/bigger_training.jsonl`; everything counts here, imports too.

| training | peak memory | in multiples of the original |
|---|---|---|
"""


def runs(original: Path, here: Path, tokens: int) -> Iterator[tuple[str, bool, list[str]]]:
    """Stage, whether it is streamed, and its command line, in the order in which they need each other."""
    data = [word for source in reference_data()[:2] for word in ("--data", source)]
    text = [*data, "--tokens", str(tokens), "--length", "256", "--batch-size", "2"]
    fp32, both = ["--precision", "fp32"], ((False, "--no-stream"), (True, "--stream"))
    small, plan = here / "small", here / "plan.json"
    training = [str(small), *data, "--length", "256", "--batch-size", "2", "--steps", "4", "--validation-tokens", "512"]
    few = ["--sample", "256", "--generations", "2", "--population", "8"]
    yield "inspect", False, ["inspect", str(original)]
    for streamed, flag in both:
        out = here / f"statistics{flag}"
        yield "calibrate", streamed, ["calibrate", str(original), *text, "--no-gram", *fp32, flag, "--out", str(out)]
    for streamed, flag in both:
        yield "search", streamed, ["search", str(original), *text, *few, flag, "--out", str(here / f"found{flag}")]
    made = ["--method", "lightmoe", "--start", "svd", "--rank", "8", "--remove", "0.5", "--out", str(plan)]
    yield "plan", False, ["plan", str(here / "statistics--stream"), *made]
    yield "apply", False, ["apply", str(original), "--plan", str(plan), "--out", str(small)]
    for streamed, flag in both:
        yield "eval", streamed, ["eval", str(small), "--against", str(original), *text, "--split", "all", *fp32, flag]
    for how, more in {"lora": [], "lora --checkpointing on": [], "annealed": []}.items():
        words = ["recover", *training, "--how", *how.split(), *more, "--out", str(here / how.replace(" ", ""))]
        yield f"recover --how {how}", False, words
    for streamed, flag in both:
        layerwise = ["recover", *training, "--how", "layerwise", flag, "--out", str(here / f"layerwise{flag}")]
        yield "recover --how layerwise", streamed, layerwise


def page(results: Path) -> str:
    """The table of the newest row of every stage."""
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    base = next(row for row in reversed(rows) if row["run"] == "import locum")
    newest = {(row["run"], row["streamed"]): row for row in rows if row["run"] != "import locum"}
    last = next(reversed(newest.values()))
    about = {"layers": last["layers"], "size": last["checkpoint_bytes"] / 2**30, "tokens": last["tokens"]}
    lines = []
    for name in dict.fromkeys(name for name, _ in newest):
        found = (newest.get((name, streamed)) for streamed in (False, True))
        cells = ("" if row is None else f"{row['multiples']:.2f}" for row in found)
        lines.append(f"| `{name}` | {' | '.join(cells)} |\n")
    return HEAD.format(base=base["peak_bytes"] / 2**30, **about) + "".join(lines)


def trainings(results: Path) -> str:
    """The table of the newest row of every training of benchmarks.bigger.training."""
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    newest = {row["run"]: row for row in rows}
    about = {name: rows[-1][name] for name in ("parameters", "steps", "tokens")}
    lines = (
        f"| `{name}` | {row['peak_bytes'] / 2**30:.2f} GiB | {row['peak_bytes'] / row['checkpoint_bytes']:.2f} |\n"
        for name, row in newest.items()
    )
    return TRAINING.format(size=rows[-1]["checkpoint_bytes"] / 2**30, **about) + "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--only", default="", help="stages whose names begin so")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bigger_memory.jsonl"))
    parser.add_argument("--page", type=Path, help="write the table here, from the results file, and run nothing")
    options = parser.parse_args()
    if options.page is not None:
        text = page(options.out) + trainings(options.out.with_name(TRAININGS))
        options.page.write_text(text, encoding="utf-8")
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    here, original = options.workdir, options.workdir / "original"
    if not original.exists():
        random_checkpoint(original, "olmoe", SIZES | {"num_hidden_layers": options.layers})
    size = read_shape(original).bytes
    about: dict[str, Any] = {"layers": options.layers, "checkpoint_bytes": size, "tokens": options.tokens}
    base = child(["-c", "import locum.cli"])
    publish({"run": "import locum", "streamed": False, **base, **about}, 1, options.out)
    for name, streamed, words in runs(original, here, options.tokens):
        target = Path(words[words.index("--out") + 1]) if "--out" in words else None
        if target is not None and target.exists() and name.startswith(options.only):
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        if not name.startswith(options.only):
            continue
        measured = child(["-m", "locum", *words])
        multiples = max(0.0, measured["peak_bytes"] - base["peak_bytes"]) / size
        row = {"run": name, "streamed": streamed, **measured, "multiples": round(multiples, 3), **about}
        publish(row, 1, options.out)


if __name__ == "__main__":
    main()
