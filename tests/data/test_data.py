"""Text to blocks: splits, packing, masks, bytes, chat, sampling, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
from io import StringIO

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from locum.data.documents import Source, parse_sources, read_documents
from locum.data.rows import Document
from locum.data.text import passages
from locum.data.tokens import batches, fingerprint_tokenizer, training_batches
from locum.errors import DataError, OptionError
from making.data import TALK, THINKING, load, make_tokenizer, many, write_rows

WORLD = "Grüße, 世界! 🎉🏳️‍🌈 naïve café\n\tdef f(x):  return x  "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def text_with_loss(tokens, tokenizer):
    return tokenizer.decode(tokens.ids_BS[tokens.loss_mask_BS].tolist())


# specifications


def test_sources_name_domains_and_weights(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("x")
    odd = tmp_path / "b=c@3.txt"
    odd.write_text("x")
    assert parse_sources(str(file)) == (Source("a", file, 1.0),)
    assert parse_sources(f"code={file}@2.5") == (Source("code", file, 2.5),)
    assert parse_sources([f"{file}@.5", f"d={odd}@2"]) == (Source("a", file, 0.5), Source("d", odd, 2.0))
    assert parse_sources(odd) == (Source("b=c@3", odd),)
    assert parse_sources({"x": file, "y": f"{odd}@4"}) == (Source("x", file), Source("y", odd, 4.0))
    assert parse_sources(tmp_path)[0].domain == tmp_path.name


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nowhere.txt", ["nowhere.txt", "does not exist", "PATH"]),
        ("code=nowhere.txt", ["'nowhere.txt'", "'code'"]),
        (["{a}", "a={b}"], ["'a'", "named twice", "b.txt"]),
        ("{a}@heavy", ["weight", "a.txt"]),
        ("{a}@0", ["weight", "above 0"]),
        ("{a}@-1", ["weight"]),
        ("all={a}", ["'all'"]),
        ([], ["no data"]),
    ],
)
def test_bad_specifications(tmp_path, spec, words):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    names = {name: tmp_path / f"{name}.txt" for name in "ab"}
    spec = spec.format(**names) if isinstance(spec, str) else [part.format(**names) for part in spec]
    with pytest.raises(DataError) as error:
        parse_sources(spec)
    assert all(word in str(error.value) for word in words), error.value


# reading


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"document {i}"} for i in range(3)]
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "a.txt").write_text("\f".join(row["text"] for row in rows))
    folder = tmp_path / "folder"
    (folder / "inner" / ".git").mkdir(parents=True)
    (folder / "inner" / ".git" / "index").write_bytes(b"\xff")
    for i, name in enumerate(("a.md", "inner/b.py", "inner/c.txt")):
        (folder / name).write_text(rows[i]["text"])
    for name in ("a.jsonl", "a.json", "a.parquet", "saved", "a.txt", "folder"):
        assert [document.text for document in read_documents(tmp_path / name)] == [row["text"] for row in rows], name


def test_a_pipe_in_a_saved_dataset_is_not_waited_for(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": "a b"}]).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(DataError, match="arrow is not a regular file"):
        list(read_documents(tmp_path / "saved"))


def test_a_dataset_keeps_its_own_splits(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    parts = {name: [{"text": f"{name} {i} " * 9} for i in range(3)] for name in ("train", "test")}
    data = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
    data.save_to_disk(tmp_path / "d")
    decoded = tokenizer.decode(load(tmp_path / "d", tokenizer, split="test").ids_BS.flatten().tolist())
    assert "test" in decoded and "train" not in decoded
    with pytest.raises(DataError, match=r"validation.*test 3, train 3"):
        load(tmp_path / "d", tokenizer, split="validation")


def test_passages_gather_paragraphs_and_keep_all_text():
    paragraphs = [f"paragraph {i}\n    indented" + " and so on" * 30 for i in range(40)]
    parts = list(passages(StringIO("\n\n".join(paragraphs))))
    assert "\n\n".join(parts) == "\n\n".join(paragraphs)
    assert all(2_000 <= len(part) < 2_500 for part in parts[:-1])
    assert len(list(passages(StringIO("a line of text\n" * 1_000)))) == 8
    assert list(passages(StringIO("one\n\ntwo"))) == ["one\n\ntwo"]


def test_split_depends_on_the_document_alone():
    documents = [Document("", f"text {i}") for i in range(2_000)]
    shares = [sum(d.split == name for d in documents) / 2_000 for name in ("train", "validation", "test")]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
    assert Document("here", " text\n 1").split == Document("there", "text 1").split


def test_splits_share_no_document_and_ignore_order(tmp_path, tokenizer):
    rows = [{"text": f"fox {i}"} for i in range(80)]
    whole = {split: load(write_rows(tmp_path / "a.jsonl", rows), tokenizer, split=split, length=8, keep_partial=True)
             for split in ("train", "validation", "test", "all")}  # fmt: skip
    words = {split: set(tokenizer.decode(t.ids_BS[t.attention_BS.bool()].tolist()).split("<|end|>")) - {""}
             for split, t in whole.items()}  # fmt: skip
    assert sum(len(words[split]) for split in ("train", "validation", "test")) == len(words["all"]) == 80
    fewer = load(write_rows(tmp_path / "b.jsonl", rows[:-41:-1]), tokenizer, split="test", length=8, keep_partial=True)
    again = set(tokenizer.decode(fewer.ids_BS[fewer.attention_BS.bool()].tolist()).split("<|end|>")) - {""}
    assert again == words["test"] & {row["text"] for row in rows[40:]}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "", ["a.txt", "no text"]),
        ("a.txt", b"good \xff bad", ["a.txt", "0xff", "offset 5", "UTF-8"]),
        ("a.jsonl", '{"text": "x"}\n{"text": ', ["line 2", "not JSON"]),
        ("a.jsonl", '{"text": "x"}\n5\n', ["line 2", "object"]),
        ("a.jsonl", '{"body": "x", "id": 1}', ["line 1", "'body'", "'id'", "'messages'"]),
        ("a.json", '[{"text": "x"},\n\n{"body": "x"}]', ["row 2", "'body'"]),
        ("a.jsonl", '{"text": null}', ["line 1", "NoneType"]),
        ("a.jsonl", '{"text": "\\ud800"}', ["line 1", "surrogate"]),
        ("a.jsonl", '{"messages": "x"}', ["line 1", "'messages'"]),
        *(
            (
                "a.jsonl",
                json.dumps({"messages": [{"role": role, "content": "x"}]}),
                ["line 1", "roles that are strings"],
            )
            for role in (None, 3, ["user"])
        ),
        ("a.jsonl", '{"messages": []}', ["line 1", "no answer"]),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', ["line 1", "no answer", "user"]),
        ("a.parquet", "not parquet", ["a.parquet", "Parquet"]),
        ("a.ndjson", '{"text": "x"}\n5\n', ["line 2", "object"]),
        ("a.jsonl.txt", '{"text": "x"}\n5\n', ["line 2", "object"]),
        ("a.csv", "label,words\n1,x\n", ["row 1", "'label'", "'words'", "'messages'"]),
        ("a.csv", "text\nx,y\n", ["row 1", "more cells"]),
        ("a.csv", 'text\n"x" y\n', ["a.csv", "table"]),
        ("a.tsv", "label\ttext\n1\n", ["row 1", "NoneType"]),
        ("a.jsonl", '{"text": "x"}\n' + "[" * 100_000 + "\n", ["line 2"]),
        ("a.jsonl", '{"text": "x", "n": ' + "9" * 6_000 + "}", ["line 1", "4300 digits"]),
        ("a.json", '[{"text": ' + "9" * 6_000 + "}]", ["line 1", "4300 digits"]),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "\\ud83d"}]}', ["line 1", "'messages'", "surrogate"]),
        ("a.jsonl", '{"messages": [{"role": "user", "\\ud83d": 1}]}', ["line 1", "'messages'", "surrogate"]),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": ' + "[" * 150 + "]" * 150 + "}]}",
            ["line 1", "levels deep"],
        ),
        ("a.jsonl", '{"messages": [{"role": "a"}], "tools": 5}', ["line 1", "'tools' must be a list"]),
        ("a.jsonl", '{"messages": [{"role": "a"}], "tools": "[5"}', ["line 1", "'tools'", "not JSON"]),
        ("a.jsonl", '{"messages": [{"role": "a"}], "tools": [{"a": "\\udc00"}]}', ["line 1", "'tools'", "surrogate"]),
        ("a.jsonl", '{"messages": [{"role": "a"}], "images": ["x.png"]}', ["line 1", "'images' changes what"]),
        ("a.jsonl", '{"prompt": "a", "completion": "b", "system": "c"}', ["line 1", "'system' changes what"]),
        ("a.jsonl", '{"messages": [{"role": "a"}], "chat_template_kwargs": [1]}', ["line 1", "must be an object"]),
        (
            "a.jsonl",
            '{"messages": [{"role": "a"}], "chat_template_kwargs": {"chat_template": "x"}}',
            ["line 1", "may not set"],
        ),
        ("a.txt", "short", ["'a'", "6 tokens", "64 needed", "lower length"]),
    ],
)
def test_bad_files(tmp_path, tokenizer, name, content, words):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        load(tmp_path / name, tokenizer, length=64)
    assert all(word in str(error.value) for word in words), error.value


def test_bad_options(tmp_path, tokenizer):
    file = many(tmp_path / "a.jsonl", 4)
    for options, word in [({"split": "tests"}, "test"), ({"length": 1}, "length"), ({"tokens": 5}, "one block")]:
        with pytest.raises(OptionError, match=word):
            load(file, tokenizer, **options)
    with pytest.raises(DataError, match="share of the limit"):
        load([f"a={file}@99", f"b={file}"], tokenizer, tokens=32)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="end-of-text"):
        load(file, bare)
    talk = write_rows(tmp_path / "m.jsonl", [{"messages": TALK}])
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>")
    with pytest.raises(DataError, match="chat template, and this tokenizer has none"):
        load(talk, bare)


# bytes


def test_bytes_of_a_document_add_up(tmp_path, tokenizer):
    for i, text in enumerate([WORLD, "plain text", "  leading and trailing  ", "é" * 9, "\n\n\n x"]):
        file = write_rows(tmp_path / f"{i}.jsonl", [{"text": text}])
        tokens = load(file, tokenizer, length=512, keep_partial=True)
        assert tokens.bytes_BS.sum() == len(text.encode())
        assert tokens.bytes_BS[tokens.ids_BS == tokenizer.eos_token_id].sum() == 0


def test_bytes_of_white_space_that_a_tokenizer_drops(tmp_path):
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="[UNK]")
    file = write_rows(tmp_path / "a.jsonl", [{"text": "  één  two \n"}])
    assert load(file, tokenizer, length=4, keep_partial=True).bytes_BS.tolist() == [[7, 7, 0, 0]]


def test_bytes_of_plain_tokens_are_those_of_their_text(tmp_path, tokenizer):
    tokens = load(many(tmp_path / "a.jsonl"), tokenizer)
    for i, count in zip(tokens.ids_BS.flatten().tolist(), tokens.bytes_BS.flatten().tolist(), strict=True):
        assert count == (0 if i == tokenizer.eos_token_id else len(tokenizer.decode([i])))


def test_a_tokenizer_without_offsets(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"text": "plain text"}, {"prompt": "ask ", "completion": "answer"}])
    tokens = load(file, ByT5Tokenizer(), length=64, keep_partial=True)
    assert tokens.bytes_BS.sum() == len("plain textask answer")
    assert text_with_loss(tokens, ByT5Tokenizer()) == "lain text</s>answer</s>"  # no token stands before the first


# packing


def test_blocks_are_the_documents_in_a_row(tmp_path, tokenizer):
    tokens = load(many(tmp_path / "a.jsonl", 9), tokenizer, keep_partial=True)
    row = [i for n in range(9) for i in [*tokenizer(f"fox number {n} ran over the hill").input_ids, 1]]
    assert tokenizer.eos_token_id == 1
    assert tokens.ids_BS[tokens.attention_BS.bool()].tolist() == row
    dropped = load(tmp_path / "a.jsonl", tokenizer)
    assert dropped.ids_BS.flatten().tolist() == row[: len(row) // 16 * 16]
    assert not tokens.loss_mask_BS[:, 0].any()
    assert tokens.loss_mask_BS[:, 1:].equal(tokens.attention_BS[:, 1:].bool())
    assert tokens.ids_BS.dtype == tokens.bytes_BS.dtype == tokens.attention_BS.dtype == torch.int64


def test_a_begin_of_text_token_heads_every_block(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t", bos="<|begin|>")
    tokens = load(many(tmp_path / "a.jsonl", 9), tokenizer, keep_partial=True)
    assert (tokens.ids_BS[:, 0] == tokenizer.bos_token_id).all()
    assert (tokens.ids_BS[:, 1:] != tokenizer.bos_token_id).all()
    assert tokens.bytes_BS.sum() == sum(len(f"fox number {n} ran over the hill") for n in range(9))


def test_one_domain_per_block(tmp_path, tokenizer):
    tokens = load({"a": many(tmp_path / "a.jsonl", 9), "b": many(tmp_path / "b.jsonl", 9, "dog")}, tokenizer)
    for ids, domain in zip(tokens.ids_BS, tokens.domain_B, strict=True):
        text = tokenizer.decode(ids.tolist())
        assert ("dog" in text, "fox" in text) != (domain == 0, domain == 1)
    assert tokens.domains == ("a", "b")
    assert [source["tokens"] for source in tokens.sources] == [16 * int((tokens.domain_B == i).sum()) for i in (0, 1)]


def test_limit_is_shared_by_weight_and_seeded(tmp_path, tokenizer):
    specs = [f"a={many(tmp_path / 'a.jsonl')}@3", f"b={many(tmp_path / 'b.jsonl', 60, 'dog')}"]
    tokens = load(specs, tokenizer, tokens=16 * 8 + 5)
    assert tokens.domain_B.tolist() == [0] * 6 + [1] * 2
    assert load(specs, tokenizer, tokens=16 * 8).fingerprint == tokens.fingerprint
    assert load(specs, tokenizer, tokens=16 * 8, seed=1).fingerprint != tokens.fingerprint
    assert tokens.sources[0]["documents"] < 15  # those that were needed, of 60
    assert load(specs, tokenizer, tokens=101, keep_partial=True).attention_BS.sum() == 101


# chat


def test_loss_on_answers_alone(tmp_path, tokenizer):
    tokens = load(write_rows(tmp_path / "a.jsonl", [{"messages": TALK}]), tokenizer, length=128, keep_partial=True)
    assert text_with_loss(tokens, tokenizer) == "blue it is<|end|>\nred<|end|>\n"
    whole = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False)
    assert tokens.ids_BS[0, : len(whole)].tolist() == whole


def test_a_template_that_edits_history_gives_one_text_per_answer(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t", THINKING)
    tokens = load(write_rows(tmp_path / "a.jsonl", [{"messages": TALK}]), tokenizer, length=256, keep_partial=True)
    answers = "<think></think>\nblue it is<|end|>\n<think></think>\nred<|end|>\n"
    assert text_with_loss(tokens, tokenizer) == answers


def test_prompt_and_completion(tmp_path, tokenizer):
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "red", "completion": " fox"}])
    asked = load(file, tokenizer, length=64, keep_partial=True)
    assert text_with_loss(asked, tokenizer) == " fox<|end|>\n"
    bare = make_tokenizer(tmp_path / "t", None)
    joined = load(file, bare, length=64, keep_partial=True)
    assert text_with_loss(joined, bare) == " fox<|end|>"
    assert bare.decode(joined.ids_BS[joined.attention_BS.bool()].tolist()) == "red fox<|end|>"


# fingerprints and batches


def test_fingerprints(tmp_path, tokenizer):
    other = make_tokenizer(tmp_path / "t", None, bos="<|begin|>")
    assert fingerprint_tokenizer(other) != fingerprint_tokenizer(tokenizer)
    tokenizer.save_pretrained(tmp_path / "u")
    same = PreTrainedTokenizerFast.from_pretrained(tmp_path / "u")
    same("a b", truncation=True, max_length=1)
    assert fingerprint_tokenizer(same) == fingerprint_tokenizer(tokenizer)
    assert len(fingerprint_tokenizer(ByT5Tokenizer())) == 16
    file = many(tmp_path / "a.jsonl", 9)
    cases = [("a", 8), ("a", 8), ("b", 8), ("a", 4)]
    names = [load({name: file}, tokenizer, length=length).fingerprint for name, length in cases]
    assert names[0] == names[1] and len(set(names)) == 3


def test_batches_visit_every_block_once(tmp_path, tokenizer):
    tokens = load(many(tmp_path / "a.jsonl", 20), tokenizer)
    ordered = torch.cat([batch.ids_BS for batch in batches(tokens, 3)])
    assert ordered.equal(tokens.ids_BS)
    shuffled = torch.cat([batch.ids_BS for batch in batches(tokens, 3, seed=0, epochs=2)])
    assert not shuffled[: len(tokens)].equal(ordered)
    assert sorted(shuffled.tolist()) == sorted(ordered.tolist() * 2)


def test_training_resumes_with_the_same_batches(tmp_path, tokenizer):
    specs = {"a": f"{many(tmp_path / 'a.jsonl', 40)}@3", "b": many(tmp_path / "b.jsonl", 20, "dog")}
    tokens = load(specs, tokenizer)
    straight = list(itertools.islice(training_batches(tokens, 7, seed=5), 400))
    for start in (0, 1, 142, 143, 399):  # a round is 1,000 samples: step 142 straddles two
        assert next(training_batches(tokens, 7, 5, start)).ids_BS.equal(straight[start].ids_BS)
    assert not next(training_batches(tokens, 7, 6)).ids_BS.equal(straight[0].ids_BS)
    domain = torch.cat([batch.domain_B for batch in straight])
    assert (domain == 0).float().mean() == pytest.approx(0.75, abs=0.02)
    blocks = int((tokens.domain_B == 1).sum())
    seen = torch.cat([batch.ids_BS for batch in straight])[domain == 1][:blocks]
    assert sorted(seen.tolist()) == sorted(tokens.ids_BS[tokens.domain_B == 1].tolist())
