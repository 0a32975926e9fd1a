"""Files of any common kind into documents, and the split that each document belongs to.

A document's split depends on its own normalised text alone: neither order nor other documents move it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..json_text import parse_json

PASSAGE_CHARACTERS = 2_000
COLUMNS = ("text", "messages", "prompt", "completion")


@dataclass(frozen=True)
class Source:
    """One `--data` specification."""

    domain: str
    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Document:
    """One text. `prompt` is context without loss; `messages`, where given, replaces both."""

    where: str
    text: str = ""
    prompt: str = ""
    messages: tuple[dict[str, Any], ...] | None = None
    own_split: str | None = None  # of a dataset that comes with splits

    @property
    def key(self) -> str:
        """Equal for documents that differ in white space or Unicode form alone."""
        turns = [str(m.get("content")) for m in self.messages] if self.messages else [self.prompt + self.text]
        normal = [" ".join(unicodedata.normalize("NFKC", turn).split()) for turn in turns]
        return hashlib.sha256("\x1e".join(normal).encode()).hexdigest()

    @property
    def split(self) -> str:
        bucket = int(self.key, 16) % 100
        return self.own_split or ("train" if bucket < 80 else "validation" if bucket < 90 else "test")


def parse_sources(specs: Any) -> tuple[Source, ...]:
    """`[domain=]PATH[@WEIGHT]`, a Path, a Source, a list of these, or a dict from domain to path."""
    if isinstance(specs, Mapping):
        sources = tuple(replace(_source(path), domain=str(domain)) for domain, path in specs.items())
    else:
        items = [specs] if isinstance(specs, str | Path | Source) else list(specs)
        sources = tuple(_source(item) for item in items)
    if not sources:
        raise DataError("no data given; name at least one text file, folder, .jsonl or .parquet file")
    for source in sources:
        _check_source(source, [other.path for other in sources if other.domain == source.domain])
    return sources


def _check_source(source: Source, paths: list[Path]) -> None:
    domain, path = source.domain, source.path
    if not path.exists():
        raise DataError(f"data path {str(path)!r} of domain {domain!r} does not exist; write [domain=]PATH[@WEIGHT]")
    if not 0 < source.weight < math.inf:
        raise DataError(f"bad weight of data {path}: after '@' write a number above 0, such as {path}@2")
    if domain == "all":
        raise DataError(f"domain 'all' is the name of all domains together; write another: name={path}")
    if len(paths) > 1:
        raise DataError(f"domain {domain!r} is named twice, by {' and '.join(map(str, paths))}; write name=PATH")


def _source(spec: str | Path | Source) -> Source:
    if isinstance(spec, Source):
        return spec
    text = os.path.expanduser(spec)
    named = re.fullmatch(r"([^/\\=]+)=(.+)", text, re.DOTALL)
    for domain, rest in [("", text)] + ([(named[1], named[2])] if named else []):
        before, _, after = rest.rpartition("@")
        for path, weight in ((rest, "1"), (before, after)):
            if path and Path(path).exists():
                stem = Path(path).stem if Path(path).is_file() else Path(path).resolve().name
                number = float(weight) if re.fullmatch(r"\d*\.?\d+", weight) else math.nan
                return Source(domain or stem, Path(path), number)
    return Source(named[1], Path(named[2])) if named else Source(Path(text).stem, Path(text))


def read_documents(path: Path) -> list[Document]:
    """Every document of a file or folder, in a fixed order."""
    if path.is_dir():
        saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
        documents = _dataset(path) if saved else _folder(path)
    elif path.suffix.lower() == ".parquet":
        documents = _parquet(path)
    elif path.suffix.lower() in (".jsonl", ".json"):
        documents = _json_rows(path)
    else:
        documents = (Document(f"{path}, passage {i + 1}", part) for i, part in enumerate(passages(_text(path))))
    documents = [document for document in documents if document.messages is not None or document.text.strip()]
    if not documents:
        raise DataError(f"{path} holds no text; give a file or folder with text in it")
    return documents


def passages(text: str) -> list[str]:
    """Cut at form feeds if there are any, else gather paragraphs (or their lines) to about 2,000 characters."""
    if "\f" in text:
        return [part for part in text.split("\f") if part.strip()]
    pieces: list[tuple[str, str]] = []  # what joins a piece to the one before it, and the piece
    for paragraph in re.split(r"\n(?:[ \t]*\n)+", text.strip("\n")):
        lines = paragraph.split("\n") if len(paragraph) > 2 * PASSAGE_CHARACTERS else [paragraph]
        pieces += [("\n" if i else "\n\n", line) for i, line in enumerate(lines)]
    parts = [""]
    for joint, piece in pieces:
        if len(parts[-1]) >= PASSAGE_CHARACTERS:
            parts.append("")
        parts[-1] += (joint if parts[-1] else "") + piece
    return [part for part in parts if part.strip()]


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        byte = f"byte {data[error.start]:#04x} at offset {error.start}"
        raise DataError(f"{path} is not UTF-8: {byte}; convert it (iconv -t UTF-8) or take it out") from None


def _folder(path: Path) -> Iterator[Document]:
    """One document per text file, the rows of .jsonl and .parquet files; hidden files and folders are not data."""
    for file in sorted(path.rglob("*")):
        if not file.is_file() or any(part.startswith(".") for part in file.relative_to(path).parts):
            continue
        if file.suffix.lower() in (".jsonl", ".parquet"):  # a .json file among code is text
            yield from read_documents(file)
        else:
            yield Document(str(file), _text(file))


def _json_rows(path: Path) -> Iterator[Document]:
    text = _text(path)
    parts = [text] if text.lstrip().startswith("[") else text.split("\n")
    for i, part in enumerate(parts):
        try:
            value = parse_json(part) if part.strip() else []
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {i + error.lineno}: not JSON ({error.msg}); one object per line") from None
        rows = value if isinstance(value, list) else [value]
        unit = "row" if rows is value else "line"
        yield from (_document(row, f"{path}, {unit} {i + n + 1}") for n, row in enumerate(rows))


def _parquet(path: Path) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from None
    names = [name for name in file.schema_arrow.names if name in COLUMNS] or file.schema_arrow.names
    rows = (row for batch in file.iter_batches(columns=names) for row in batch.to_pylist())
    yield from (_document(row, f"{path}, row {i + 1}") for i, row in enumerate(rows))


def _dataset(path: Path) -> Iterator[Document]:
    import datasets

    data = datasets.load_from_disk(str(path))
    parts = data if isinstance(data, datasets.DatasetDict) else {"rows": data}
    for name, part in parts.items():
        # One split alone says nothing about what to hold out, so it is split by document like anything else.
        own = name if len(parts) > 1 else None
        yield from (_document(row, f"{path}/{name}, row {i + 1}", own) for i, row in enumerate(part))


def _document(row: Any, where: str, own_split: str | None = None) -> Document:
    if not isinstance(row, dict):
        raise DataError(f"{where}: {type(row).__name__} where an object is needed, such as {{'text': ...}}")
    if row.get("messages") is not None:
        if not (
            isinstance(row["messages"], list) and all(isinstance(m, dict) and "role" in m for m in row["messages"])
        ):
            raise DataError(f"{where}: 'messages' must be a list of {{'role': ..., 'content': ...}}")
        # Parquet gives every message the keys of all of them; templates test for presence.
        turns = tuple({key: value for key, value in m.items() if value is not None} for m in row["messages"])
        return Document(where, messages=turns, own_split=own_split)
    names = ("prompt", "completion") if "prompt" in row and "completion" in row else ("text",)
    if names[0] not in row:
        allowed = "'text', or 'messages', or 'prompt' and 'completion'"
        raise DataError(f"{where}: needs {allowed}; found the columns {', '.join(map(repr, row)) or '(none)'}")
    for name in names:
        if not isinstance(row[name], str):
            raise DataError(f"{where}: {name!r} is {type(row[name]).__name__}, not a string")
        if re.search("[\ud800-\udfff]", row[name]):
            raise DataError(f"{where}: {name!r} has half a surrogate pair, which is not Unicode text")
    return Document(where, row[names[-1]], row["prompt"] if len(names) == 2 else "", own_split=own_split)
