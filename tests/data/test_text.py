"""Text in pieces: every character comes, at its place, and little of a large file is held."""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import os
import tracemalloc

import pytest

from locum.data.documents import parse_sources, read_documents
from locum.data.text import MOST_CHARACTERS, documents_in, lines
from locum.errors import DataError
from making.data import load, make_tokenizer, many


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_text_of_any_line_endings_and_sizes_comes_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("locum.data.text.CHUNK", 7)
    text = "\ufeffGrüße, 世界\r\n\r\na lone \r stays 🎉\n\n" + "no end " * 40
    (tmp_path / "a.txt").write_bytes(text.encode())
    plain = text.removeprefix("\ufeff").replace("\r\n", "\n")
    assert list(lines(tmp_path / "a.txt")) == [
        *plain.splitlines(keepends=True)[:2],
        "a lone \r stays 🎉\n",
        "\n",
        "no end " * 40,
    ]
    assert list(documents_in(tmp_path / "a.txt")) == [plain]
    cut = list(lines(tmp_path / "a.txt", most=20))
    assert "".join(cut) == plain and max(map(len, cut)) < 40
    (tmp_path / "a.txt").write_bytes(b"123456\xc3\xbc78\xff")
    with pytest.raises(DataError, match="byte 0xff at offset 10"):
        list(lines(tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_bytes(b"123456789\xc3")
    with pytest.raises(DataError, match="byte 0xc3 at offset 9"):
        list(lines(tmp_path / "a.txt"))


def test_a_line_without_end_is_cut_and_nothing_is_lost(tmp_path):
    text = "x" * (MOST_CHARACTERS + 5) + "\nand a line\n"
    (tmp_path / "a.txt").write_text(text)
    assert "".join(documents_in(tmp_path / "a.txt")) == text.removesuffix("\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").rename(tmp_path / "folder" / "a.txt")
    assert "".join(document.text for document in read_documents(tmp_path / "folder")) == text


@pytest.mark.parametrize(
    "kind", ["a.txt", *(pytest.param(x, marks=pytest.mark.journeys) for x in ("a.jsonl", "a.csv"))]
)
def test_what_a_few_tokens_are_drawn_from_is_not_held(tmp_path, tokenizer, kind):
    passage = "the red fox ran over the hill " * 80
    row = {"a.txt": passage + "\n\n", "a.jsonl": json.dumps({"text": passage}) + "\n", "a.csv": f'1,"{passage}"\n'}[
        kind
    ]
    with (tmp_path / kind).open("w") as file:
        file.write("n,text\n" if kind == "a.csv" else "")
        file.writelines(itertools.repeat(row, 12 * 2**20 // len(row)))
    tracemalloc.start()
    try:
        found = load(tmp_path / kind, tokenizer, tokens=64)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == 4
    assert most < 8 * 2**20, f"{most:,} bytes held of a file of {(tmp_path / kind).stat().st_size:,}"


def test_drawing_takes_the_first_of_the_seeds_order_however_few_are_held(tmp_path, tokenizer, monkeypatch):
    file = many(tmp_path / "a.jsonl", 60)
    whole = load(file, tokenizer, tokens=400, seed=3)
    monkeypatch.setattr("locum.data.tokens.CHARACTERS", 1e-3)  # far too few to begin with: it has to come back for more
    again = load(file, tokenizer, tokens=400, seed=3)
    assert again.fingerprint == whole.fingerprint and again.sources == whole.sources


def test_what_is_neither_file_nor_folder_is_refused_before_it_is_opened(tmp_path):
    """A pipe that nobody writes to would be waited for without end."""
    os.mkfifo(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        parse_sources([str(tmp_path / "rows.parquet")])


@pytest.mark.parametrize(("packer", "name"), [(gzip, "gzip"), (lzma, "xz"), (bz2, "bzip2")])
def test_what_is_compressed_is_said_to_be(packer, name, tmp_path):
    file = tmp_path / "t.jsonl.packed"
    file.write_bytes(packer.compress(b"text " * 1000))
    with pytest.raises(DataError, match=rf"is compressed \({name}\); unpack it first"):
        list(lines(file))
