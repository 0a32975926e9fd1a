"""JSON that nobody wrote by accident: it is refused with one line by whatever reads it, never followed into a traceback."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from locum.json_text import DEEPEST, parse_json
from making.checkpoints import locum as command

DEEP = "[" * 100_000 + "]" * 100_000
LONG = '{"x": ' + "9" * 5000 + "}"


def test_what_is_json_is_read():
    assert (
        parse_json('{"a": [1, 2.5, null]}')
        == json.loads(b'{"a": [1, 2.5, null]}')
        == parse_json(b'{"a": [1, 2.5, null]}')
    )
    assert parse_json('{"a": 1, "a": 2}', object_pairs_hook=list) == [("a", 1), ("a", 2)]


@pytest.mark.parametrize(
    "text",
    [DEEP, LONG, "{", "", b"\xff", '{"a": ' * 5000],
    ids=["deep", "long", "open", "empty", "bytes", "open and deep"],
)
def test_what_is_none_is_a_value_error(text):
    with pytest.raises((json.JSONDecodeError, UnicodeDecodeError)):
        parse_json(text)


def test_what_nests_is_read_as_far_as_programs_follow_it():
    """A function that walks through data calls itself at every level, some of them twice."""
    nested = lambda levels: '{"x": [' * (levels // 2) + "1" + "]}" * (levels // 2)  # noqa: E731
    assert parse_json(nested(DEEPEST)) == json.loads(nested(DEEPEST))
    for text in (nested(DEEPEST + 2), nested(DEEPEST + 2).encode(), '{"x": "[["}' + " " * 9 + nested(DEEPEST + 2)):
        with pytest.raises(json.JSONDecodeError):
            parse_json(text)
    assert len(parse_json(json.dumps([[i] for i in range(DEEPEST + 9)]))) == DEEPEST + 9


HALVES = ['"\\ud800"', '{"\\uDC00": 1}', '[["x\\ud83d"]]', '"\\udd8a\\ud83e"']


@pytest.mark.parametrize("text", HALVES)
def test_half_a_surrogate_pair_is_no_text(text):
    for form in (text, text.encode()):
        with pytest.raises(json.JSONDecodeError, match="half a surrogate pair"):
            parse_json(form)
        assert parse_json(form, halves=True) == json.loads(text)


@pytest.mark.parametrize("text", ['"\\ud83e\\udd8a"', '"🦊"', '"\\\\ud800"', '"d800"'])
def test_whole_pairs_are(text):
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)


def one_line(*arguments) -> str:
    result = command(*arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.stderr
    return result.stderr


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "locum.json", "plan.json"])
def test_half_a_pair_in_a_checkpoint(name, small, words, tmp_path):
    folder = shutil.copytree(small, tmp_path / "small")
    content = json.loads((folder / name).read_text()) if (folder / name).is_file() else {"weight_map": {}}
    (folder / name).write_text(json.dumps(content | {"method": "\ud800"}))
    said = one_line("recover", folder, "--data", words, "--out", tmp_path / "out")
    assert str(folder / name) in said and "half a surrogate pair" in said


@pytest.mark.parametrize("text", [DEEP, LONG], ids=["deep", "long"])
@pytest.mark.parametrize(
    "name, line",
    [
        ("config.json", "inspect {folder}"),
        ("model.safetensors.index.json", "inspect {folder}"),
        ("locum.json", "recover {folder} --data {words} --out {out}"),
        ("plan.json", "recover {folder} --data {words} --out {out}"),
        ("tokenizer_config.json", "eval {folder} --data {words}"),
        ("tokenizer.json", "eval {folder} --data {words}"),
        ("generation_config.json", "eval {folder} --data {words} --tokens 128 --length 64"),
    ],
)
def test_in_a_checkpoint(name, line, text, small, words, tmp_path):
    folder = shutil.copytree(small, tmp_path / "small")
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(text)
    said = one_line(*line.format(folder=folder, words=words, out=tmp_path / "out").split())
    assert str(folder) in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", [DEEP, LONG], ids=["deep", "long"])
def test_in_the_header_of_weights(text, small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "small")
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text.encode())
    assert "model.safetensors" in one_line("inspect", folder)


@pytest.mark.parametrize("text", [DEEP, LONG, HALVES[0]], ids=["deep", "long", "half a pair"])
def test_in_other_inputs(text, checkpoint, tmp_path):
    rows, notes, plan = tmp_path / "rows.jsonl", tmp_path / "statistics.safetensors", tmp_path / "plan.json"
    rows.write_text(text + "\n")
    plan.write_text(text)
    save_file({"x": torch.zeros(1)}, notes, {"locum-statistics": text})
    assert str(rows) in one_line("report", rows, "--out", tmp_path / "page.html")
    assert str(rows) in one_line("calibrate", checkpoint, "--data", rows, "--out", tmp_path / "out")
    assert str(notes) in one_line("plan", notes, "--remove", 0.5, "--out", tmp_path / "out.json")
    assert str(plan) in one_line("apply", checkpoint, "--plan", plan, "--out", tmp_path / "out")
