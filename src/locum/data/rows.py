"""Rows of data files, JSON lines, tables, Parquet and saved datasets, and what a row may hold.

A row is `text`, or `messages`, or `prompt` and `completion`. What else tells a chat template what to show goes to it
(`tools`, `chat_template_kwargs`), or the row is refused; other columns say nothing that a model is shown.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..json_text import parse_json
from .text import lines

TEXT = ("text", "messages", "prompt", "completion")
FOR_TEMPLATES = ("tools", "chat_template_kwargs")
NOT_READ = ("functions", "documents", "system", "images", "image", "videos", "video", "audios", "audio")
FIXED = (  # what is asked of `apply_chat_template` itself
    *(
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
    ),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    "tokenizer_kwargs",
)
ROW_CHARACTERS = 2**28  # the most of one line of JSON
LIST_BYTES = 2**30  # the most of a JSON list, which cannot be read in pieces
MOST_DEEP = 100  # levels of a row
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """One text. `prompt` is context without loss; `messages`, where given, replaces both."""

    where: str
    text: str = ""
    prompt: str = ""
    messages: tuple[dict[str, Any], ...] | None = None
    own_split: str | None = None  # of a dataset that comes with splits
    tools: tuple[Any, ...] | None = None  # for the chat template
    template_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def turns(self) -> list[str]:
        return [str(m.get("content")) for m in self.messages] if self.messages else [self.prompt + self.text]

    @property
    def characters(self) -> int:
        return sum(map(len, self.turns))

    @functools.cached_property
    def key(self) -> str:
        """Equal for documents that differ in white space or Unicode form alone."""
        normal = [" ".join(unicodedata.normalize("NFKC", turn).split()) for turn in self.turns]
        return hashlib.sha256("\x1e".join(normal).encode()).hexdigest()

    @property
    def split(self) -> str:
        bucket = int(self.key, 16) % 100
        return self.own_split or ("train" if bucket < 80 else "validation" if bucket < 90 else "test")


# --- files -----------------------------------------------------------------------------------------------------------


def json_rows(path: Path) -> Iterator[Document]:
    """One object a line, or one list of them."""
    numbered, begun = enumerate(lines(path, ROW_CHARACTERS), 1), False
    for number, line in numbered:
        if not begun and line.lstrip().startswith("["):
            if (size := path.stat().st_size) > LIST_BYTES:
                raise DataError(
                    f"{path} is a JSON list of {size:,} bytes; write it as JSON lines, which are read one by one"
                )
            line = "".join([line, *(more for _, more in numbered)])
        elif len(line) >= ROW_CHARACTERS and not line.endswith("\n"):
            raise DataError(f"{path}, line {number}: more than {ROW_CHARACTERS:,} characters; one object per line")
        begun = begun or bool(line.strip())
        if line.strip():
            yield from _rows_of(line, path, number)


def _rows_of(text: str, path: Path, number: int) -> Iterator[Document]:
    try:
        value = parse_json(text, halves=True)
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        raise DataError(f"{path}, line {line}: not JSON ({error.msg}); one object per line") from None
    where = f"{path}, line {number}"
    if isinstance(value, list):
        yield from (document_of(row, f"{where}, row {n + 1}") for n, row in enumerate(value))
    else:
        yield document_of(value, where)


def table_rows(path: Path) -> Iterator[Document]:
    """The rows of a table with the names of its columns in the first line."""
    table = csv.DictReader(lines(path), delimiter="\t" if ".tsv" in path.name.lower() else ",", strict=True)
    for i, row in enumerate(_reading(path, "a table", table)):
        if None in row:
            raise DataError(
                f"{path}, row {i + 1}: more cells than the first line names; quote text that has separators"
            )
        yield document_of(row, f"{path}, row {i + 1}")


def parquet_rows(path: Path) -> Iterator[Document]:
    def rows() -> Iterator[Any]:
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if any(name in TEXT for name in names):
            names = [name for name in names if name in TEXT + FOR_TEMPLATES + NOT_READ]
        for batch in file.iter_batches(batch_size=1024, columns=names):
            yield from batch.to_pylist()

    found = enumerate(_reading(path, "Parquet", rows()))
    return (document_of(row, f"{path}, row {i + 1}", padded=True) for i, row in found)


def dataset_rows(path: Path) -> Iterator[Document]:
    """The rows of a folder that `datasets` saved."""

    def rows() -> Iterator[tuple[str, str | None, Any]]:
        import datasets

        for file in path.rglob("*"):  # a pipe would be waited for
            if not (file.is_file() or file.is_dir()):
                raise DataError(f"{file} is not a regular file; a saved dataset has no others")
        data = datasets.load_from_disk(str(path))
        parts = data if isinstance(data, datasets.DatasetDict) else {"rows": data}
        for name, part in parts.items():
            # One split alone says nothing about what to hold out, so it is split by document like anything else.
            own = name if len(parts) > 1 else None
            yield from ((f"{path}/{name}, row {i + 1}", own, row) for i, row in enumerate(part))

    found = _reading(path, "a saved dataset", rows())
    return (document_of(row, where, own, padded=True) for where, own, row in found)


def _reading(path: Path, what: str, rows: Iterable[Any]) -> Iterator[Any]:
    """What a library reads; its errors, whichever they are, name the file."""
    try:
        yield from rows
    except DataError:
        raise
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} cannot be read as {what}: {said[:300]}") from None


READERS: dict[str, Callable[[Path], Iterator[Document]]] = {  # by the ends of names
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".json"), json_rows),
    **dict.fromkeys((".csv", ".tsv"), table_rows),
    ".parquet": parquet_rows,
}


def reader_of(path: Path) -> Callable[[Path], Iterator[Document]] | None:
    """What reads a file of rows, by its name (one ".txt" more is passed over); None for text."""
    ends = [suffix.lower() for suffix in path.suffixes]
    if ends[-1:] == [".txt"] and ends[-2:-1] and ends[-2] in READERS:
        ends.pop()
    return READERS.get(ends[-1]) if ends else None


# --- one row ---------------------------------------------------------------------------------------------------------


def document_of(row: Any, where: str, own_split: str | None = None, padded: bool = False) -> Document:
    """A row as a document. `padded`: it comes from Arrow, which gives every struct the keys of all others, as nulls."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: {type(row).__name__} where an object is needed, such as {{'text': ...}}")
    if row.get("messages") is not None:
        return _conversation(row, where, own_split, padded)
    names = ("prompt", "completion") if "prompt" in row and "completion" in row else ("text",)
    if names[0] not in row:
        allowed = "'text', or 'messages', or 'prompt' and 'completion'"
        raise DataError(f"{where}: needs {allowed}; found the columns {', '.join(map(repr, row)) or '(none)'}")
    for name in names:
        if not isinstance(row[name], str):
            raise DataError(f"{where}: {name!r} is {type(row[name]).__name__}, not a string")
        _check_value(name, row[name], where)
    prompt = row["prompt"] if len(names) == 2 else ""
    tools, options = _for_template(row, where, padded) if prompt else (None, {})
    return Document(where, row[names[-1]], prompt, None, own_split, tools, options)


def _conversation(row: dict[str, Any], where: str, own_split: str | None, padded: bool) -> Document:
    messages = row["messages"]
    if not (
        isinstance(messages, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
    ):
        raise DataError(
            f"{where}: 'messages' must be a list of {{'role': ..., 'content': ...}} with roles that are strings"
        )
    _check_value("messages", messages, where)
    messages = _without_nulls(messages) if padded else messages
    # Templates test for presence.
    turns = tuple({key: value for key, value in m.items() if value is not None} for m in messages)
    tools, options = _for_template(row, where, padded)
    return Document(where, messages=turns, own_split=own_split, tools=tools, template_options=options)


def _for_template(row: dict[str, Any], where: str, padded: bool) -> tuple[tuple[Any, ...] | None, dict[str, Any]]:
    """What a row has for the chat template besides messages."""
    for name in NOT_READ:
        if row.get(name) not in (None, [], {}, ""):
            known = " and ".join(map(repr, FOR_TEMPLATES))
            raise DataError(
                f"{where}: {name!r} changes what a model is shown, and Locum shows it messages, {known} alone; put it into the "
                f"messages, or take the column out"
            )
    tools, options = (_parsed(name, row.get(name), where) for name in FOR_TEMPLATES)
    if padded:
        tools, options = _without_nulls(tools), _without_nulls(options)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"{where}: 'tools' must be a list of objects, such as {{'type': 'function', 'function': ...}}")
    if options is not None and not isinstance(options, dict):
        raise DataError(f"{where}: 'chat_template_kwargs' must be an object, such as {{'enable_thinking': false}}")
    if fixed := [name for name in options or () if name in FIXED]:
        raise DataError(f"{where}: 'chat_template_kwargs' may not set {fixed[0]!r}, which is not the template's")
    return tuple(tools) if tools else None, options or {}


def _parsed(name: str, value: Any, where: str) -> Any:
    """A value, or what its JSON says: tables have no other way to hold tools of any form."""
    if isinstance(value, str):
        try:
            value = parse_json(value, halves=True) if value.strip() else None
        except ValueError as error:
            raise DataError(f"{where}: {name!r} is a string that is not JSON ({error})") from None
    _check_value(name, value, where)
    return value


def _check_value(name: str, value: Any, where: str) -> None:
    """Refuse what is no Unicode text, or nested without end, anywhere in a value."""
    level = [value]
    for _ in range(MOST_DEEP):
        if any(isinstance(x, str) and SURROGATE.search(x) for x in level):
            raise DataError(f"{where}: {name!r} has half a surrogate pair, which is not Unicode text")
        level = [inner for x in level for inner in _inside(x)]
        if not level:
            return
    raise DataError(f"{where}: {name!r} is nested more than {MOST_DEEP} levels deep")


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, list) else ()


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
