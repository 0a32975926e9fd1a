"""What `--data` names, and the documents in it: files of any common kind, read in pieces.

A document's split depends on its own normalised text alone (rows.py): neither order nor other documents move it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import DataError
from .rows import Document, dataset_rows, reader_of
from .text import MOST_CHARACTERS, documents_in, pieces


@dataclass(frozen=True)
class Source:
    """One `--data` specification."""

    domain: str
    path: Path
    weight: float = 1.0


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
    if not (path.is_file() or path.is_dir()):
        raise DataError(
            f"data path {str(path)!r} of domain {domain!r} is neither a file nor a folder; write it to a file"
        )
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


def read_documents(path: Path) -> Iterator[Document]:
    """Every document of a file or folder, in a fixed order, one after another. Raises DataError where there is none."""
    if path.is_dir():
        saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
        documents = dataset_rows(path) if saved else _folder(path)
    elif reader := reader_of(path):
        documents = reader(path)
    else:
        documents = (Document(f"{path}, passage {i + 1}", part) for i, part in enumerate(documents_in(path)))
    found = False
    for document in documents:
        if document.messages is not None or document.text.strip():
            found = True
            yield document
    if not found:
        raise DataError(f"{path} holds no text; give a file or folder with text in it")


def _folder(path: Path) -> Iterator[Document]:
    """The rows of files that have rows, every other file as one text; hidden files and folders are not data."""
    for file in sorted(path.rglob("*")):
        if not file.is_file() or any(part.startswith(".") for part in file.relative_to(path).parts):
            continue
        if (reader := reader_of(file)) and file.suffix.lower() != ".json":  # a .json file among code is text
            yield from reader(file)
        else:
            yield from _one_text(file)


def _one_text(file: Path) -> Iterator[Document]:
    """A file as one document; one of many million characters as several."""
    held: list[str] = []
    size = 0
    for text in pieces(file):
        held.append(text)
        size += len(text)
        if size >= MOST_CHARACTERS:
            yield Document(str(file), "".join(held))
            held, size = [], 0
    yield Document(str(file), "".join(held))
