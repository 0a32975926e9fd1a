"""Text files in pieces: decoded, in lines, in passages. Of a file of any size no more is held than a piece.

A text of which no end is in sight is cut after some four million characters.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import DataError

CHUNK = 2**20  # bytes read at a time
PACKED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7z",
}
MOST_CHARACTERS = 2**22  # of a piece
PASSAGE_CHARACTERS = 2_000


def pieces(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file; lines end in \\n alone."""
    decoder, read, carried = codecs.getincrementaldecoder("utf-8")(), 0, ""
    try:
        with path.open("rb") as stream:
            while data := stream.read(CHUNK):
                text = carried + _decode(decoder, data, read, path)
                text = text if read else text.removeprefix("\ufeff")
                carried = "\r" if text.endswith("\r") else ""  # a \n may follow
                yield text.removesuffix("\r").replace("\r\n", "\n")
                read += len(data)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); take it out, or make it readable") from None
    yield carried + _decode(decoder, b"", read, path)


def _decode(decoder: codecs.IncrementalDecoder, data: bytes, read: int, path: Path) -> str:
    begun = len(decoder.getstate()[0])
    try:
        return decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
        if (packed := _packed(path)) is not None:
            raise DataError(f"{path} is compressed ({packed}); unpack it first") from None
        byte = f"byte {error.object[error.start]:#04x} at offset {read - begun + error.start}"
        raise DataError(f"{path} is not UTF-8: {byte}; convert it (iconv -t UTF-8) or take it out") from None


def _packed(path: Path) -> str | None:
    """How a file is compressed, by its first bytes; None where it is not, as far as is known."""
    with path.open("rb") as stream:
        begin = stream.read(max(map(len, PACKED)))
    return next((name for mark, name in PACKED.items() if begin.startswith(mark)), None)


def lines(path: Path, most: int = MOST_CHARACTERS, end: str = "\n") -> Iterator[str]:
    """The lines of a file with their ends; the last may have none, and neither has a part of a longer one than `most`."""
    held: list[str] = []
    size = 0
    for text in pieces(path):
        *whole, last = text.split(end)
        for line in whole:
            yield "".join([*held, line, end])
            held, size = [], 0
        held.append(last)
        size += len(last)
        if size >= most:
            yield "".join(held)
            held, size = [], 0
    if rest := "".join(held):
        yield rest


def documents_in(path: Path) -> Iterator[str]:
    """The texts of a file: cut at form feeds if there are any, else its passages."""
    parts = (
        (part.removesuffix("\f") for part in lines(path, end="\f")) if _has_form_feed(path) else passages(lines(path))
    )
    return (part for part in parts if part.strip())


def _has_form_feed(path: Path) -> bool:
    return any("\f" in text for text in pieces(path))


def passages(lines: Iterable[str]) -> Iterator[str]:
    """Gather paragraphs (of long ones the lines) to about 2,000 characters."""
    gathered = ""
    for joint, piece in _paragraphs(lines):
        if len(gathered) >= PASSAGE_CHARACTERS:
            yield gathered
            gathered = ""
        gathered += (joint if gathered else "") + piece
    if gathered:
        yield gathered


def _paragraphs(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """What joins a paragraph, or a line of a long one, to the one before it, and the piece itself."""
    short: list[str] = []  # the lines of a paragraph that is not long yet
    joint = "\n\n"
    for line in lines:
        text = line.removesuffix("\n")
        is_cut = text == line and len(line) >= MOST_CHARACTERS
        if joint and not text.strip(" \t"):
            if short:
                yield "\n\n", "\n".join(short)
            short, joint = [], "\n\n"
            continue
        if joint != "\n\n":  # in a long one
            yield joint, text
        else:
            short.append(text)
            if sum(map(len, short)) + len(short) - 1 <= 2 * PASSAGE_CHARACTERS:
                continue
            yield from (("\n" if i else "\n\n", part) for i, part in enumerate(short))
            short = []
        joint = "" if is_cut else "\n"
    if short:
        yield "\n\n", "\n".join(short)
