"""The undamaged things: a tiny model and everything that Locum makes of it and reads again, in one folder.

All of it is made by Locum's own commands, in this process, which computes: so call it in a child.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from safetensors.torch import load_file, save_file

from making.checkpoints import locum, text, write_checkpoint, write_rows, write_text

TEMPLATE = """{% for message in messages %}{% if message.role not in ['system', 'user', 'assistant'] %}\
{{ raise_exception('unknown role ' + message.role) }}{% endif %}<{{ message.role }}> {{ message.content }}
{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"""
SHORT = "--length 64 --tokens 512 --batch-size 4"
CALIBRATE = f"calibrate model --data words.txt {SHORT}"
SEARCH = f"search model --data words.txt {SHORT} --sample 64 --generations 2 --population 4"
RECOVER = "recover small --original model --data words.txt --length 64 --batch-size 2 --steps 4 --checkpoint-every 1"
MEASURE = "--data words.txt --length 64 --tokens 512 --resamples 20"
PARTIAL = "calibrate model --data words.txt --length 16 --tokens 1024 --batch-size 1 --out resumed.safetensors"
VECTORS = "recover vectors --how vectors --data words.txt --length 64 --batch-size 2 --steps 2 --adapter-only"
MADE = (
    f"{CALIBRATE} --out stats.safetensors",
    f"{SEARCH} --out searched.safetensors",
    f"search model --data words.txt {SHORT} --method auto --out auto.safetensors",
    "plan stats.safetensors --remove 0.4 --rank 2 --out plan.json",
    "plan stats.safetensors --method mone --remove 0.25 --out constants.json",
    "plan stats.safetensors --method prune --remove 0.25 --out prune.json",
    "plan model --method compressed-experts --out policy.json",
    "apply model --plan plan.json --out small",
    "apply model --plan constants.json --out constants",
    "apply model --plan prune.json --out pruned",
    "apply model --plan policy.json --out vectors",
    f"{VECTORS} --out adapter",
    f"{RECOVER} --out recovered",
    f"eval pruned --against model {MEASURE} --json results.jsonl",
    f"eval recovered {MEASURE} --json results.jsonl",
)
# What is interrupted: the command, the function after so many calls of which Ctrl-C is pressed, and what is left behind.
INTERRUPTED = (
    (f"{RECOVER} --out resumed", "locum.training.loop.Loop.one_step", 2, ".resumed.recover/state.safetensors"),
    (PARTIAL, "locum.measure.calibration._run_batch", 55, ".resumed.safetensors.partial"),
    (
        f"{SEARCH} --out resumed.search",
        "locum.measure.removals.ModelExplorer.output_error",
        3,
        ".resumed.search.answers",
    ),
)


def make_world(folder: Path) -> None:
    """Everything, in a folder that is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    write_checkpoint(Path("model"))
    Path("model/chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    _shard(Path("model"), Path("sharded"))
    write_text(Path("words.txt"))
    _write_data()
    for line in MADE:
        result = locum(line)
        if result.exit_code:
            raise RuntimeError(f"the undamaged world cannot be made: {line}: {result.stderr}")
    for line, where, calls, left in INTERRUPTED:
        with _interrupted(where, calls):
            locum(line)
        if not Path(left).is_file():
            raise RuntimeError(f"the undamaged world cannot be made: {line}: an interrupt left no {left}")


@contextmanager
def _interrupted(where: str, calls: int) -> Iterator[None]:
    """Ctrl-C when a function has been called so often."""
    owner, _, name = where.rpartition(".")
    module = sys.modules.get(owner) or sys.modules[owner.rpartition(".")[0]]
    holder: Any = module if owner in sys.modules else getattr(module, owner.rpartition(".")[2])
    real, done = getattr(holder, name), []

    def press(*given: Any, **named: Any) -> Any:
        result = real(*given, **named)
        done.append(1)
        if len(done) > calls:
            raise KeyboardInterrupt
        return result

    with mock.patch.object(holder, name, press):
        yield


def _shard(source: Path, folder: Path) -> None:
    """The same checkpoint in two shards with an index."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in sorted(set(where.values())):
        save_file({n: tensors[n] for n in where if where[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _chat(seed: int, role: Any = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": text(seed, 300)}, {"role": "assistant", "content": text(seed + 1, 300)}]


def _write_data() -> None:
    """Every form of data, and in `odd/` files of these forms whose columns are not what they should be."""
    import datasets

    rows = [{"text": text(seed, 600)} for seed in range(40)]
    write_rows(Path("rows.jsonl"), rows=40)
    with Path("chat.jsonl").open("w", encoding="utf-8") as file:
        for seed in range(60):
            pair = {"prompt": text(seed, 200), "completion": text(seed + 1, 200)}
            file.write(json.dumps({"messages": _chat(seed)} if seed % 2 else pair) + "\n")
    datasets.disable_progress_bars()
    made = datasets.Dataset.from_list(rows)
    made.save_to_disk("dataset")
    datasets.DatasetDict({"train": made, "test": made.select(range(8))}).save_to_disk("splits")
    _parquet(Path("rows.parquet"), rows)
    Path("odd").mkdir()
    for name, odd in ODD.items():
        _parquet(Path("odd") / f"{name}.parquet", odd)


def _parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


ODD: dict[str, list[dict[str, Any]]] = {
    "numbers": [{"text": i} for i in range(9)],
    "fractions": [{"text": i / 7} for i in range(9)],
    "nulls": [{"text": None}, {"text": "a word"}],
    "only nulls": [{"text": None}] * 3,
    "bytes": [{"text": b"\xff\xfe words"}] * 3,
    "lists": [{"text": ["a", "b"]}] * 3,
    "objects": [{"text": {"text": "a"}}] * 3,
    "empty strings": [{"text": ""}] * 3,
    "no rows": [],
    "other column": [{"words": "a b c"}] * 3,
    "no messages": [{"messages": []}] * 3,
    "messages of strings": [{"messages": ["a", "b"]}] * 3,
    "messages of null": [{"messages": [None, {"role": "user", "content": "x"}]}] * 3,
    "role null": [{"messages": _chat(1, None)}] * 3,
    "role unknown": [{"messages": _chat(1, "tool")}] * 3,
    "content null": [{"messages": [{"role": "user", "content": None}]}] * 3,
    "content of parts": [{"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}] * 3,
    "completion null": [{"prompt": "a", "completion": None}, {"prompt": "a", "completion": "b"}],
    "prompt a number": [{"prompt": 3, "completion": "b"}] * 3,
}
