"""The commands that are killed, and the small world of files that they read."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from locum.measure import remembered
from locum.models import layer_major
from making.checkpoints import locum, write_checkpoint, write_text

WORLD = "{world}"
TEXT = f"--data a={WORLD}/words.txt --data b={WORLD}/more.txt"
COUNTED = f"{TEXT} --length 16 --tokens 2400 --batch-size 1"
TRAINED = (
    f"{WORLD}/small --original {WORLD}/model {TEXT} --length 64 --batch-size 2 --steps 12 --checkpoint-every 3 "
    "--validate-every 6 --validation-tokens 512"
)
SHARDS = f"--statistics {WORLD}/deep.safetensors --shard-size 300KB"
SIZES = {"num_hidden_layers": 4}
DEEP = {"num_hidden_layers": 24, "hidden_size": 64, "intermediate_size": 48}  # for what takes as long as it has layers
SAVE_EVERY = 0.05  # seconds between saved answers of a search: in earnest 30
HELD = 2**18  # bytes of hidden states of batches that are streamed together: in earnest 2**30


@dataclass(frozen=True)
class Stage:
    """A command that writes one output. `line` lacks --out; `other` is an option by which it makes another one."""

    name: str
    line: str
    other: str
    out: str = "out"

    def arguments(self, world: str, *more: str) -> str:
        return " ".join([self.line.replace(WORLD, world), *more, f"--out {self.out}"])


STATISTICS = "out.safetensors"
STAGES = {
    stage.name: stage
    for stage in (
        Stage("calibrate", f"calibrate {WORLD}/model {COUNTED}", "--seed 1", STATISTICS),
        Stage("calibrate --stream", f"calibrate {WORLD}/model {COUNTED} --stream", "--seed 1", STATISTICS),
        Stage(
            "search",
            f"search {WORLD}/model {COUNTED} --sample 64 --generations 3 --population 6",
            "--seed 1",
            STATISTICS,
        ),
        Stage("plan", f"plan {WORLD}/stats.safetensors --remove 0.4 --rank 2", "--remove 0.3", "out.json"),
        Stage("apply", f"apply {WORLD}/deep --plan {WORLD}/deep.json {SHARDS}", "--seed 1"),
        Stage("apply stock", f"apply {WORLD}/deep --plan {WORLD}/prune.json --shard-size 300KB", "--shard-size 200KB"),
        Stage(
            "compress",
            f"compress {WORLD}/model {COUNTED} --remove 0.4 --rank 2 --recover lora --recover-steps 6 --recover-length 64 "
            "--recover-batch-size 2 --recover-checkpoint-every 2 --recover-validate-every 0",
            "--recover-seed 1",
        ),
        Stage("recover lora", f"recover {TRAINED} --how lora", "--seed 1"),
        Stage("recover annealed", f"recover {TRAINED} --how annealed", "--seed 1"),
        Stage("recover esft", f"recover {TRAINED} --how esft", "--threshold 0.5"),
        Stage("recover layerwise", f"recover {TRAINED} --how layerwise", "--seed 1"),
        Stage("recover layerwise --stream", f"recover {TRAINED} --how layerwise --stream", "--seed 1"),
        Stage(
            "eval",
            f"eval {WORLD}/small --against {WORLD}/model {TEXT} --length 64 --tokens 2048 --resamples 50",
            "--seed 1",
            "out.jsonl",
        ),
        Stage("report", f"report {WORLD}/results.jsonl", "--title Other", "out.html"),
        Stage("export", f"export {WORLD}/small --to stock", ""),
    )
}
MADE = (
    f"calibrate model {COUNTED} --out stats.safetensors",
    "plan stats.safetensors --remove 0.4 --rank 2 --out plan.json",
    f"calibrate deep {TEXT} --length 64 --tokens 512 --out deep.safetensors",
    "plan deep.safetensors --remove 0.4 --rank 4 --out deep.json",
    "plan deep.safetensors --method prune --remove 0.25 --out prune.json",
    "apply model --plan plan.json --out small",
    f"eval small --against model {TEXT} --length 64 --tokens 2048 --resamples 20 --out results.jsonl",
)


def make_world(folder: Path) -> None:
    """A tiny model, text, and what the stages read. It computes: call it in a child."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    write_checkpoint(Path("model"), **SIZES)
    write_checkpoint(Path("deep"), **DEEP)
    write_text(Path("words.txt"))
    write_text(Path("more.txt"), seed=1)
    for line in MADE:
        result = locum(line.replace(WORLD, "."))
        if result.exit_code:
            raise RuntimeError(f"the world cannot be made: {line}: {result.stderr}")


def shorten_intervals() -> None:
    """Have states saved so often that commands of a second have some. Nothing else of Locum is changed."""
    remembered.SAVE_EVERY, layer_major.HELD = SAVE_EVERY, HELD
