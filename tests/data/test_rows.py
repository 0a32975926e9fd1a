"""Rows of every kind of file: the same whatever they lie in, shown whole to the chat template, or refused by name."""

from __future__ import annotations

import json

import pytest

from locum.data.documents import read_documents
from locum.errors import DataError
from making.data import TALK, load, make_tokenizer, write_rows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


SHOWING = (
    "{% if tools %}[{{ tools | tojson }}]{% endif %}{% if loud %}[LOUD]{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function | tojson }}]{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def shown(path, tokenizer):
    """All the text that a model is shown of a file."""
    tokens = load(path, tokenizer, keep_partial=True)
    return tokenizer.decode(tokens.ids_BS[tokens.attention_BS.bool()].tolist())


def test_rows_are_the_same_whatever_the_file_is_called(tmp_path, tokenizer):
    rows = [{"text": "the red fox"}, {"text": "ran, over"}]
    expected = shown(write_rows(tmp_path / "a.jsonl", rows), tokenizer)
    for name in ("b.ndjson", "c.jsonlines", "d.jsonl.txt", "e.JSONL", "f.json"):
        assert shown(write_rows(tmp_path / name, rows), tokenizer) == expected, name
    (tmp_path / "g.csv").write_text('label,text\n1,the red fox\n2,"ran, over"\n')
    (tmp_path / "h.tsv").write_text("text\tlabel\nthe red fox\t1\nran, over\t2\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "i.ndjson").write_text((tmp_path / "b.ndjson").read_text())
    for name in ("g.csv", "h.tsv", "folder"):
        assert shown(tmp_path / name, tokenizer) == expected, name


def test_what_arrow_fills_with_nulls_is_not_there(tmp_path):
    datasets = pytest.importorskip("datasets")
    tokenizer = make_tokenizer(tmp_path, SHOWING)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"city": {"type": "string"}}}}
    other = {"type": "function", "function": {"name": "g", "parameters": {"x": {"least": 1}}}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "red"},
                {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": given}}]},
                {"role": "assistant", "content": "blue"},
            ],
            "tools": [one],
            "chat_template_kwargs": options,
        }
        for given, one, options in (({"city": "P"}, tool, {"loud": True}), ({"x": 1}, other, {"calm": 1}))
    ]
    expected = shown(write_rows(tmp_path / "a.jsonl", rows), tokenizer)
    assert "null" not in expected and '"city": "P"' in expected and expected.count("[LOUD]") == 1
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    assert shown(tmp_path / "a.parquet", tokenizer) == expected
    assert shown(tmp_path / "saved", tokenizer) == expected


def test_a_null_that_a_row_of_json_has_stays(tmp_path):
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": {"city": None}}}],
    }
    rows = [{"messages": [{"role": "user", "content": "red"}, call]}]
    assert '"city": null' in shown(write_rows(tmp_path / "a.jsonl", rows), make_tokenizer(tmp_path, SHOWING))


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_settings_reach_the_chat_template(tmp_path, as_text):
    tokenizer = make_tokenizer(tmp_path, SHOWING)
    more = {"tools": [{"type": "function", "function": {"name": "UNIQUE"}}], "chat_template_kwargs": {"loud": True}}
    more = {name: json.dumps(value) if as_text else value for name, value in more.items()}
    rows = [{"messages": TALK, **more}, {"prompt": "red?", "completion": "blue", **more}]
    text = shown(write_rows(tmp_path / "a.jsonl", rows), tokenizer)
    assert text.count("UNIQUE") == 2 and text.count("[LOUD]") == 2
    one, other = (
        next(iter(read_documents(write_rows(tmp_path / "b.jsonl", [row])))) for row in ({"messages": TALK}, rows[0])
    )
    assert one.key == other.key  # the same conversation: it stays in its split, whichever tools there are


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 // 0 }}",
        "{{ messages[7].content.x }}",
        "{{ raise_exception('roles must alternate') }}",
        "{% for m in messages %}",
        "{{ '\\ud800' }}",
        {"tool_use": "{{ messages[0].content }}", "rag": "{{ messages[0].content }}"},
    ],
    ids=str,
)
def test_whatever_a_chat_template_fails_by_names_the_row(tmp_path, tokenizer, template):
    broken = make_tokenizer(tmp_path)
    broken.chat_template = template
    rows = write_rows(tmp_path / "a.jsonl", [{"text": "x"}, {"messages": TALK}])
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: the tokenizer's chat template refuses") as error:
        load(rows, broken)
    assert "\n" not in str(error.value)


def test_a_chat_template_that_writes_without_end_names_the_row(tmp_path, tokenizer):
    broken = make_tokenizer(tmp_path)
    broken.chat_template = "{{ messages[0].content }}{{ 'a' * 10**7 }}"
    rows = write_rows(tmp_path / "a.jsonl", [{"messages": TALK}])
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: .* makes 10,000,\d+ characters .* allowed: 4,194,304"):
        load(rows, broken)
