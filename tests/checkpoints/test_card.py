"""The head of a model card: what a hub reads of the original, the licence, the task and what was measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import locum
from locum.checkpoints.card import head_of, model_card
from locum.checkpoints.card_data import TASKS, card_data, hub_id, in_hub_cache
from locum.checkpoints.skeleton import read_shape
from locum.plans.bits import FewBits
from locum.plans.plan import KEPT, LayerPlan, make_plan
from making.cards import checked
from making.checkpoints import locum as command

CAUSAL = "AutoModelForCausalLM"
HEAD = """---
license: apache-2.0
language: [en, de]
tags: [moe, "o'clock: yes"]
pipeline_tag: fill-mask
datasets: [org/trained-on]
base_model: org/parent
---
# The original
"""


TEXT = Path("/cache/datasets--org--text/snapshots/1/a.jsonl")


@pytest.fixture
def original(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "original"))


def head(folder: Path, card: str | None = None, opens: str = CAUSAL, **about: object) -> dict:
    """The head of the card of what is made from a folder with this card."""
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    out = folder.parent / "card"
    out.mkdir(exist_ok=True)
    (out / "README.md").write_text(head_of(card_data(folder, opens, **about)) + "\n# x\n", encoding="utf-8")
    return checked(out)


def test_what_the_originals_card_says_is_carried_over_where_it_holds(original):
    (original / "config.json").write_text(json.dumps(config(original) | {"_name_or_path": "org/original"}))
    assert head(original, HEAD, over=original)["base_model_relation"] == "adapter"
    assert "base_model" not in head(original, HEAD, over=original.parent)
    made = head(original, HEAD, relation="finetune", data=[TEXT, TEXT, original])
    assert made == {
        "base_model": "org/original",  # not that of the original
        "base_model_relation": "finetune",
        "datasets": ["org/text"],
        "language": ["en", "de"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "o'clock: yes", "mixture-of-experts", "compressed", "locum"],
    }


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("card", "files", "licence"),
    [
        ("---\nlicense: mit\n---\n", ["LICENSE"], {"license": "mit"}),
        ("---\nlicense: [mit, apache-2.0]\n---\n", [], {"license": ["mit", "apache-2.0"]}),
        (
            "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n",
            ["LICENSE"],
            {"license": "other", "license_name": "llama3", "license_link": "LICENSE"},
        ),
        (
            "---\nlicense: other\nlicense_name: mine\nlicense_link: /home/me/LICENSE\n---\n",
            [],
            {"license": "other", "license_name": "mine", "license_link": "LICENSE"},
        ),
        (
            "# no head",
            ["LICENCE.txt", "licence-of-others.txt"],
            {"license": "other", "license_name": "license-of-the-original", "license_link": "LICENCE.txt"},
        ),
        ("---\nlicense: 7\n---\n", [], {}),
        (None, [], {}),
    ],
)
def test_the_licence_is_that_of_the_original_or_left_out(card, files, licence, original):
    for name in files:
        (original / name).write_text("You may.")
    made = head(original, card)
    assert {key: value for key, value in made.items() if key.startswith("license")} == licence


@pytest.mark.parametrize(
    "card",
    [
        "---\nlicense: {a: b}\ntags: 7\nlanguage: [[en]]\nbase_model: /home/me\npipeline_tag: [x]\n---\n",
        "---\ntags: [1, 2]\nlanguage: '<img src=x>'\n---\n",
        "---\n- a list\n---\n",
        "---\na: [\n---\n",
        "---\n" + "{a: " * 2000 + "\n---\n",
        "---\nlicense: !!python/object/apply:os.system ['true']\n---\n",
        '---\nlicense: "a\\nb"\ntags: ["\\e[31m"]\n---\n',
        b"---\nlicense: \xff\n---\n",
    ],
)
def test_metadata_that_no_hub_has_is_left_out(card, original):
    (original / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    made = head(original)
    assert set(made) <= {"library_name", "pipeline_tag", "tags"} and made["tags"][-3:] == head(original)["tags"][-3:]


def test_a_card_that_may_not_be_read_is_passed_over(original, monkeypatch, caplog):
    (original / "README.md").write_text(HEAD)

    def refuse(self, *given, **named):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    data = card_data(original, CAUSAL)
    assert data.license is None and hub_id(original) is None and "cannot be read" in caplog.text


def test_a_card_without_end_is_not_read(original, caplog):
    with (original / "README.md").open("wb") as file:
        file.truncate(2**40)
    assert set(head(original)) == {"library_name", "pipeline_tag", "tags"}
    assert "its metadata cannot be read (it has more than" in caplog.text


@pytest.mark.parametrize(("opens", "task"), TASKS.items())
def test_the_task_goes_by_the_class_that_opens_it(opens, task, original):
    assert head(original, HEAD, opens)["pipeline_tag"] == task
    assert head(original, HEAD, "OlmoeForSomething")["pipeline_tag"] == "fill-mask"


# --- what the original is called on a hub -------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["org/name", "name"])
def test_a_hubs_cache_says_what_a_model_is_called(named, checkpoint, tmp_path):
    snapshot = tmp_path / f"models--{named.replace('/', '--')}" / "snapshots" / "0123abcd"
    shutil.copytree(checkpoint, snapshot)
    assert hub_id(snapshot) == named
    assert in_hub_cache(tmp_path / "datasets--org--text" / "snapshots" / "1" / "a.jsonl", "datasets") == "org/text"
    assert in_hub_cache(tmp_path / "datasets--org--text" / "a.jsonl", "datasets") is None


@pytest.mark.parametrize(
    ("card", "said", "named"),
    [
        ("See https://huggingface.co/org/original for more", None, "org/original"),
        ('AutoModelForCausalLM.from_pretrained("org/original")', "other/parent", "org/original"),
        ('AutoModelForCausalLM.from_pretrained("org/original-instruct")', None, None),
        ("a path/original", None, None),
        ("", "org/name", "org/name"),
        ("", "/home/me/name", None),
        ("", "./name", None),
        ("", "a/b/c", None),
        ("", "name", None),  # a folder's name as likely
        ("", "org/na me", None),
        ("", 7, None),
    ],
)
def test_the_folder_may_say_what_its_model_is_called(card, said, named, original):
    (original / "README.md").write_text(card)
    (original / "config.json").write_text(
        json.dumps(config(original) | ({} if said is None else {"_name_or_path": said}))
    )
    assert hub_id(original) == named


def test_a_path_that_is_there_is_no_name(original, monkeypatch, tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    (original / "config.json").write_text(json.dumps(config(original) | {"_name_or_path": "org/name"}))
    monkeypatch.chdir(tmp_path)
    assert hub_id(original) is None


def test_the_text_says_what_the_head_cannot(original):
    shape = read_shape(original)
    plan = make_plan(shape, [LayerPlan(x.name, (KEPT,) * x.num_experts) for x in shape.layers])
    card = model_card(plan, shape, "small", {"original": "orig<i>nal"}, CAUSAL, card_data(original, CAUSAL))
    assert "The original states no licence here" in card
    assert "What orig&lt;i&gt;nal is called on a hub is not known here: add `base_model:" in card
    (original / "README.md").write_text(HEAD + "https://huggingface.co/org/original")
    card = model_card(plan, shape, "small", {"original": "original"}, CAUSAL, card_data(original, CAUSAL))
    assert "The licence is that of the original: apache-2.0." in card and "is not known here" not in card


def test_the_text_says_in_which_numbers_experts_are(original):
    shape = read_shape(original)
    kept = [LayerPlan(x.name, (KEPT,) * x.num_experts) for x in shape.layers]
    plan = make_plan(shape, FewBits.of("4", 32, "nearest").applied(kept, shape), method="prune")
    card = model_card(plan, shape, "small", {}, CAUSAL, card_data(original, CAUSAL))
    left = plan.size(shape).bytes - (shape.bytes - shape.bytes_of_experts)
    saved = 100 * (1 - left / shape.bytes_of_experts)
    assert f"experts in int4-g32, which take {saved:.1f}% fewer bytes than they did by prune." in card
    assert 50 < saved < 90 and "nothing removed" not in card


# --- along the way ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(checkpoint, plan_file, words, tmp_path_factory):
    """An original with a card, what was made of it, and what was trained on text from a hub's cache."""
    root = tmp_path_factory.mktemp("cards")
    original = Path(shutil.copytree(checkpoint, root / "original"))
    (original / "README.md").write_text(HEAD + "https://huggingface.co/org/original")
    text = root / "datasets--org--text" / "snapshots" / "1" / "a.txt"
    text.parent.mkdir(parents=True)
    shutil.copyfile(words, text)
    locum.apply(original, plan=plan_file, out=root / "small")
    asked = {"data": [f"web={text}"], "steps": 1, "length": 32, "batch_size": 1, "validation_tokens": 64}
    locum.recover(root / "small", how="lora", out=root / "recovered", **asked)
    locum.export(root / "recovered", to="stock", out=root / "whole")
    return root


def test_every_card_on_the_way_is_one_that_a_hub_takes(chain):
    heads = {name: checked(chain / name) for name in ("small", "recovered", "whole")}
    same = {
        "base_model": "org/original",
        "license": "apache-2.0",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
    }
    assert all(same.items() <= found.items() for found in heads.values())
    assert "base_model_relation" not in heads["small"] and "datasets" not in heads["small"]
    assert heads["recovered"]["base_model_relation"] == "finetune" and heads["recovered"]["datasets"] == ["org/text"]
    assert "Calibrated on a." in (chain / "small" / "README.md").read_text()


def test_what_was_trained_alone_comes_from_the_model_that_it_was(original, words, tmp_path):
    """It is compared with that, and no method made it."""
    asked = {"data": [str(words)], "steps": 1, "length": 32, "batch_size": 1, "validation_tokens": 64}
    locum.recover(original, how="router", out=tmp_path / "trained", **asked)
    assert (
        "Made with Locum from original: trained, nothing removed." in (tmp_path / "trained" / "README.md").read_text()
    )
    assert json.loads((tmp_path / "trained" / "locum.json").read_text())["original"] == "original"
    rows = locum.evaluate(tmp_path / "trained", data=[str(words)], tokens=64, length=32)
    assert {"original", "trained"} == {row.model for row in rows}
    locum.recover(tmp_path / "trained", how="router", out=tmp_path / "again", **asked)
    assert json.loads((tmp_path / "again" / "locum.json").read_text())["original"] == "original"


def test_a_recovery_says_its_validation_at_both_ends(chain):
    summary = json.loads((chain / "recovered" / "locum.json").read_text())["recovery"]
    (found,) = ModelCard((chain / "recovered" / "README.md").read_text()).data.eval_results
    assert found.metric_value == pytest.approx(summary["validation_loss"], rel=1e-5)
    assert (
        f"Trained on web: the loss on its validation text was {summary['validation_loss_before']:.4f} before"
        in (chain / "recovered" / "README.md").read_text()
    )
    assert found.metric_args == {"before": pytest.approx(summary["validation_loss_before"], rel=1e-5)}


def test_an_evaluation_writes_what_was_lost_into_the_card(chain, words, tmp_path):
    folder = Path(shutil.copytree(chain / "recovered", tmp_path / "recovered"))
    card = folder / "README.md"
    card.write_text(card.read_text().replace("## Provenance", "My own words.\n\n## Provenance"))
    line = [
        "eval",
        folder,
        "--against",
        chain / "original",
        "--length",
        32,
        "--tokens",
        128,
        "--resamples",
        20,
        "--card",
    ]
    result = command(*line, "--data", f"a={words}", "--data", f"other={words}", "--out", tmp_path / "rows.jsonl")
    assert result.exit_code == 0, result.output
    rows = {
        (r["model"], r["domain"], r["metric"]): r
        for r in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    }
    found = {(x.dataset_config, x.metric_type): x for x in ModelCard(card.read_text()).data.eval_results}
    checked(folder)
    for domain in ("a", "other", "all"):
        for metric in ("loss", "bits_per_byte"):
            number, ours = found[domain, metric], rows["recovered", domain, metric]
            assert number.metric_value == pytest.approx(ours["value"], rel=1e-5)
            assert number.metric_args["original"] == pytest.approx(rows["original", domain, metric]["value"], rel=1e-5)
            assert number.metric_args["low"] == pytest.approx(ours["low"], rel=1e-5)
    text = card.read_text()
    assert "| a | test | seen by calibration |" in text and "| other | test | never seen |" in text
    assert "| all | test |  |" in text and "My own words." in text and "Not measured yet" not in text
    loss = found["other", "loss"]
    assert f"| {loss.metric_args['original']:.4f} | {loss.metric_value:.4f} |" in text
    again = command(*line, "--data", f"third={words}", "--split", "validation")
    assert again.exit_code == 0, again.output
    text = card.read_text()
    assert (
        text.count("## What was lost") == 1
        and "| third | validation | never seen |" in text
        and "| other | test |" in text
    )
    assert "validation text of the recovery" in text and "My own words." in text
    checked(folder)


def test_cards_that_cannot_be_written_to_are_refused_before_the_work(chain, words, tmp_path, monkeypatch):
    monkeypatch.setattr("locum.stages.evaluation.open_to_run", None)
    for folder in (chain / "original", Path(shutil.copytree(chain / "small", tmp_path / "small"))):
        if folder.parent == tmp_path:
            (folder / "README.md").write_text("---\na: [\n---\n")
        said = command("eval", folder, "--data", words, "--card")
        assert said.exit_code == 2 and "leave" in said.stderr and "out" in said.stderr
