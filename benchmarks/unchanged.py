"""What Locum computes, as hashes: a record before a change of the code and one after it show that nothing changed.

    PYTHONPATH=tests python -m benchmarks.unchanged record --out FILE.json [--only PATTERN]
    PYTHONPATH=tests python -m benchmarks.unchanged compare A.json B.json [--only PATTERN]

The bundled reference model and three tiny ones go through every method, and two of them through every way to recover.
Recorded are statistics, plans, sizes, the tensors of what is written, logits and losses; of what Locum refuses, the error.

Only Locum's public functions are used, and every option is spelled out: modules may move and defaults may change. Where
an option gets another name, it has to get it here too. Values are equal to the bit only on one machine, with the same
versions and one thread. So record both sides there, the older one in a worktree with its own sources on PYTHONPATH:
the first line printed says which sources run.

A pattern is a regular expression that is searched for in names such as "reference/lightmoe svd".
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import argparse
import hashlib
import json
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor

import locum
from making.tiny_models import tiny_model

REFERENCE = Path(locum.__file__).parent / "reference"
DATA = [f"code={REFERENCE / 'text' / 'code.txt'}", f"novels={REFERENCE / 'text' / 'novels.txt'}@2"]
VOCABULARY = 4096  # of the reference model's tokenizer
TINY = ("qwen3_moe", "deepseek_v3", "gpt_oss")
RECOVERED = ("reference", "qwen3_moe")
STARTS = ("gaussian", "svd", "whitened")
CRITERIA = ("ean", "ean_dims", "frequency", "gate", "gate_softmax", "mone", "reap")

OBSERVE = {"length": 128, "batch_size": 8, "split": "train", "seed": 0, "device": "cpu", "force": False}
SEARCH = {"pruned": 0.25, "importance": "output", "counts": "inverse", "population": 20, "generations": 10}
SEARCH |= {"candidates": 3, "block": 3}
LOW_RANK = {"start": "svd", "exponent": 0.15, "minimum": 1, "multiple": 16}
SELECT = {"selection": "adaptive", "score": "gate", "alpha": 0.3, "clip": 0.2}

RECOVER = {"steps": 6, "learning_rate": 1e-3, "schedule": "cosine", "warmup_fraction": 0.2, "batch_size": 2}
RECOVER |= {"length": 64, "accumulate": 1, "weight_decay": 0.01, "clip": 1.0, "balance": 0.0, "precision": "fp32"}
RECOVER |= {"seed": 0, "checkpoint_every": 0, "validate_every": 1, "validation_tokens": 512, "adapter_only": False}
RECOVER |= {"device": "cpu", "force": False, "restart": False}
ADAPTED = {"rank": 2, "train_bases": True}
ANNEALED = {"how": "annealed", **ADAPTED, "end_fraction": 0.5, "annealing": "linear", "steepness": 3.0}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {  # name: (what is recovered, its options)
    "annealed": ("lightmoe gaussian", ANNEALED),
    "annealed exponential": ("lightmoe svd", ANNEALED | {"annealing": "exponential", "train_bases": False}),
    "lora": ("lightmoe gaussian", {"how": "lora", **ADAPTED}),
    "vectors": ("compressed-experts projections", {"how": "vectors"}),
    "vectors hidden": ("compressed-experts hidden", {"how": "vectors"}),
    "vectors static": ("compressed-experts static", {"how": "vectors"}),
    "vectors as adapter": ("compressed-experts projections", {"how": "vectors", "adapter_only": True}),
    "full": ("prune reap", {"how": "full"}),
    "full balanced": ("prune reap", {"how": "full", "balance": 0.01, "accumulate": 2}),
}


@dataclass(frozen=True)
class Case:
    """One plan to make and apply. `search` says which importance its statistics were searched by."""

    method: str
    remove: float | None
    options: dict[str, Any]
    search: str | None = None
    onto: str | None = None
    apply: bool = True


def cases(tiny: bool) -> dict[str, Case]:
    """Every method, with variants. Tiny experts are too small for many bases and high ranks."""
    rank, bases, less = (2, 2, 0.4) if tiny else (4, 3, 0.5)
    light = SELECT | {"grouping": "dominant", "bases": bases, "rank": rank, "start": "gaussian", "align": False}
    over = SELECT | {"shared": True, "rank": rank, "start": "gaussian"}
    low = {"score": "reap"} | LOW_RANK
    searched = SEARCH | LOW_RANK | {"seed": 0, "decompose": True}
    active = {"main": 0, "vectors": "projections", "renormalise": False}
    other = {"selection": "uniform", "score": "reap", "grouping": "kmeans", "align": True}
    made = {f"lightmoe {start}": Case("lightmoe", less, light | {"start": start}) for start in STARTS}
    made |= {f"replace shared {start}": Case("replace", 0.5, over | {"start": start}) for start in STARTS}
    made |= {f"replace alone {s}": Case("replace", 0.5, over | {"shared": False, "start": s}) for s in STARTS[1:]}
    made |= {f"decompose {start}": Case("decompose", 0.5, low | {"start": start}) for start in STARTS[1:]}
    made |= {f"moe-i2 {s}": Case("moe-i2", 0.5, searched | {"start": s}, "output") for s in STARTS[1:]}
    made |= {
        "lightmoe kmeans aligned": Case("lightmoe", less, light | other),
        "lightmoe merged": Case("lightmoe", less, light | {"selection": "average", "rank": 0}),
        "decompose all alike": Case("decompose", 0.4, low | {"score": "none", "exponent": 0.0}),
        "moe-i2 search alone": Case("moe-i2", 0.25, searched | {"decompose": False}, "output"),
        "mone": Case("mone", 0.5, {"score": "mone", "budget": "uniform"}),
        "mone global": Case("mone", 0.3, {"score": "mone", "budget": "global"}),
        "prune reap": Case("prune", 0.5, {"score": "reap", "budget": "uniform"}),
        "prune out of reach": Case("prune", 0.99, {"score": "reap", "budget": "uniform"}),
        "prune frequency global": Case("prune", 0.3, {"score": "frequency", "budget": "global"}),
        "compressed-experts projections": Case("compressed-experts", None, active),
        "compressed-experts hidden": Case("compressed-experts", None, active | {"vectors": "hidden", "main": 1}),
        "compressed-experts static": Case("compressed-experts", None, active | {"vectors": "static"}),
        "compressed-experts none": Case("compressed-experts", None, active | {"vectors": "none", "renormalise": True}),
        "compressed-experts onto lightmoe": Case("compressed-experts", None, active, onto="lightmoe gaussian"),
    }
    made |= {f"criterion {s}": Case("mone", 0.5, {"score": s, "budget": "uniform"}, apply=False) for s in CRITERIA}
    if tiny:  # one pass of the model for every expert is too dear on the other
        made["moe-i2 by loss"] = Case("moe-i2", 0.5, searched | {"importance": "loss", "counts": "gap"}, "loss")
    return made


@dataclass
class Work:
    """One model, the folder for what is made of it, and the values found so far. Nothing is made twice."""

    name: str
    model: Path
    folder: Path
    values: dict[str, Any]
    cases: dict[str, Case] = field(default_factory=dict)
    refused: dict[Path, locum.LocumError] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return 4096 if self.name == "reference" else 2048

    def made(self, what: str, make: Callable[[Path], object]) -> Path:
        """The path of what `make(path)` writes. A refusal is raised again each time."""
        path = self.folder / what.replace(" ", "-")
        if path in self.refused:
            raise self.refused[path]
        if not path.exists():
            torch.manual_seed(0)
            try:
                make(path)
            except locum.LocumError as error:
                self.refused[path] = error
                raise
        return path

    def statistics(self) -> Path:
        also = ("input_gram", "hidden_gram")
        asked = {"data": DATA, "tokens": self.tokens, "also": also, **OBSERVE}
        return self.made("statistics.safetensors", lambda out: locum.calibrate(self.model, out=out, **asked))

    def searched(self, importance: str) -> Path:
        """Statistics of MoE-I2's search, with what whitened factors need."""
        options = SEARCH | LOW_RANK | {"importance": importance, "decompose": True, "start": "whitened"}
        options |= {"counts": "gap"} if importance == "loss" else {}
        asked = {"data": DATA, "method": "moe-i2", "tokens": self.tokens, "sample": 512, **OBSERVE, **options}
        return self.made(f"{importance}.safetensors", lambda out: locum.search(self.model, out=out, **asked))

    def source(self, case: Case) -> Path | None:
        """The statistics that a case is made from; None where its method needs none."""
        if case.method == "compressed-experts" and case.onto is None:
            return None
        return self.searched(case.search) if case.search else self.statistics()

    def plan(self, name: str) -> Path:
        case = self.cases[name]
        source = self.source(case) or self.model
        onto = None if case.onto is None else self.plan(case.onto)
        asked = {"method": case.method, "remove": case.remove, "fit": None, "onto": onto, "force": False}
        return self.made(f"{name}.json", lambda out: locum.plan([source], out=out, **asked, **case.options))

    def applied(self, name: str) -> Path:
        plan, statistics = self.plan(name), self.source(self.cases[name])
        asked = {"plan": plan, "statistics": statistics, "seed": 0, "force": False}
        return self.made(name, lambda out: locum.apply(self.model, out=out, **asked))

    def recovered(self, way: str) -> Path:
        source, changes = WAYS[way]
        model, asked = self.applied(source), RECOVER | changes
        return self.made(
            f"recovered {way}",
            lambda out: locum.recover(model, data=DATA, out=out, original=self.model, **asked),
        )

    def note(self, name: str, find: Callable[[], dict[str, Any]]) -> None:
        """Record what a function finds, or why Locum refuses."""
        started = time.perf_counter()
        try:
            found = find()
        except locum.LocumError as error:
            found = {"refused": f"{type(error).__name__}: {self.without_paths(str(error))}"}
        self.values |= {f"{self.name}/{name}/{key}": value for key, value in found.items()}
        print(f"{time.perf_counter() - started:6.1f} s  {self.name}/{name}  {found.get('refused', '')}", flush=True)

    def without_paths(self, text: str) -> str:
        return text.replace(str(self.folder), "WORK").replace(str(REFERENCE), "REFERENCE")


def digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """One hash of names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name, tensor in named:
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of all those in a folder, by name."""
    found: dict[str, Tensor] = {}
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dictionary)
    return dict(sorted(found.items()))


def tensors_of(folder: Path) -> str:
    return digest(read_tensors(folder).items())


@torch.no_grad()
def of_folder(folder: Path) -> dict[str, Any]:
    """The tensors of a checkpoint, and the logits that transformers gets from it in float32."""
    ids_BS = torch.randint(2, VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits_BSV = model(input_ids=ids_BS, use_cache=False).logits
    return {
        "tensors": tensors_of(folder),
        "logits": digest([("logits", logits_BSV)]),
        "first logits": logits_BSV.flatten()[:4].tolist(),
    }


def of_statistics(path: Path) -> dict[str, Any]:
    return {name: digest([(name, tensor)]) for name, tensor in read_tensors(path).items()}


def of_case(work: Work, name: str) -> dict[str, Any]:
    plan, shape = locum.load_plan(work.plan(name)), locum.read_shape(work.model)
    size = plan.size(shape)
    found = {
        "plan id": plan.id,
        "parameters": size.parameters,
        "bytes": size.bytes,
        "expert parameters": size.expert_parameters,
        "replaced per layer": [len(layer.replaced) for layer in plan.layers],
        "experts per layer": [len(layer.survivors) for layer in plan.layers],
    }
    return found | (of_folder(work.applied(name)) if work.cases[name].apply else {})


def of_recovery(work: Work, way: str) -> dict[str, Any]:
    folder = work.recovered(way)
    log = [json.loads(line) for line in (folder / "recovery.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "validation losses": [entry["validation_loss"] for entry in log if "validation_loss" in entry],
        **({"tensors": tensors_of(folder)} if WAYS[way][1].get("adapter_only") else of_folder(folder)),
    }


def model_folder(name: str, folder: Path) -> Path:
    """The reference model, or a tiny one in float32 with the reference model's tokenizer."""
    if name == "reference":
        return REFERENCE / "model"
    tiny_model(name, vocab_size=VOCABULARY, max_position_embeddings=512).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / "model" / file, folder)
    return folder


def of_model(name: str, values: dict[str, Any], wanted: Callable[[str], bool]) -> None:
    """Everything that is recorded of one model."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        work = Work(name, model_folder(name, folder / "model"), folder, values, cases(name != "reference"))
        finds: dict[str, Callable[[], dict[str, Any]]] = {
            "original": lambda: of_folder(work.model),
            "statistics": lambda: of_statistics(work.statistics()),
            "searched": lambda: of_statistics(work.searched("output")),
        }
        finds |= {case: lambda case=case: of_case(work, case) for case in work.cases}
        if name in RECOVERED:
            finds |= {f"recovered {way}": lambda way=way: of_recovery(work, way) for way in WAYS}
        for what, find in finds.items():
            if wanted(f"{name}/{what}"):
                work.note(what, find)


def header(only: str) -> dict[str, Any]:
    """Where a record is from."""
    names = ("torch", "transformers", "safetensors", "locum")
    return {
        "commit": commit(),
        "command": "PYTHONPATH=tests python -m benchmarks.unchanged record" + (f" --only {only!r}" if only else ""),
        "machine": f"{os.cpu_count()} cores, {processor()}",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in names},
    }


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def commit() -> str | None:
    """The commit of the sources that run, with "+" when they were changed since; None outside a repository."""
    try:
        run = [
            subprocess.run(
                ["git", *words], cwd=Path(locum.__file__).parent, capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", "."])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return run[0] + "+" * bool(run[1])


def record(out: Path, only: str) -> None:
    """Write the values of all models whose names have the pattern."""
    started = time.perf_counter()
    print(f"recording the sources in {Path(locum.__file__).parent}", flush=True)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    values: dict[str, Any] = {}
    for name in ("reference", *TINY):
        of_model(name, values, lambda what: bool(re.search(only, what)))
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**header(only), "values": values}, indent=0, sort_keys=True)
    out.write_text(text + "\n", encoding="utf-8")
    print(f"{len(values)} values in {time.perf_counter() - started:.0f} s")


def compare(a: Path, b: Path, only: str) -> int:
    """Print what differs, and how much. Returns how many values differ."""
    one, two = (json.loads(path.read_text(encoding="utf-8")) for path in (a, b))
    for key in ("machine", "python", "versions"):
        if one[key] != two[key]:
            print(f"note: {key}: {one[key]} and {two[key]}; values may differ for that alone")
    names = sorted(name for name in {*one["values"], *two["values"]} if re.search(only, name))
    sides = {name: [side["values"].get(name, "not there") for side in (one, two)] for name in names}
    differ = [name for name, (x, y) in sides.items() if x != y]
    for name in differ:
        print(f"{name}: " + " -> ".join(json.dumps(value) for value in sides[name]))
    print(f"{len(names) - len(differ)} values equal, {len(differ)} differ")
    return len(differ)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording, comparing = commands.add_parser("record"), commands.add_parser("compare")
    recording.add_argument("--out", type=Path, required=True, help="where to write the record")
    comparing.add_argument("records", type=Path, nargs=2, help="two records")
    for command in (recording, comparing):
        command.add_argument("--only", default="", help="what has this pattern in its name")
    given = parser.parse_args()
    if given.command == "record":
        record(given.out, given.only)
        return 0
    return int(compare(*given.records, given.only) > 0)


if __name__ == "__main__":
    raise SystemExit(main())
