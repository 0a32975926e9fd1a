"""Damages, registered by what they damage: each changes a file in place and says in words what it did.

A damage takes the file and a random generator, and raises `NotHere` where there is nothing of its kind to damage. Here
are those of any file; those of JSON are in json_damages.py, of tensors in tensor_damages.py, of text in text_damages.py.
Nothing here computes with torch: damages are done in the process that forks.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

Damage = Callable[[Path, Random], str]
DAMAGES: dict[str, list[Damage]] = {}  # by content
SHARES = {
    "own": 60,
    "bytes": 25,
    "place": 15,
}  # of damages that the content knows, of any bytes, of what is at the path


class NotHere(Exception):
    """The file has nothing that this damage could change."""


def damages(*contents: str) -> Callable[[Damage], Damage]:
    """Registers a damage for these contents."""

    def register(damage: Damage) -> Damage:
        for content in contents:
            DAMAGES.setdefault(content, []).append(damage)
        return damage

    return register


def damage(path: Path, content: str, draw: Random) -> str:
    """Damage a file, one time in four twice; what was done, in words."""
    if draw.random() < 0.25:
        return ", then ".join(_once(path, content, "own", draw) for _ in range(2))
    return _once(path, content, draw.choices(list(SHARES), list(SHARES.values()))[0], draw)


def _once(path: Path, content: str, share: str, draw: Random) -> str:
    """One damage of a share; of any bytes where the file has nothing that the share could damage."""
    known = DAMAGES.get(content, DAMAGES["bytes"]) if share == "own" else DAMAGES[share]
    for chosen in (*draw.sample(known, len(known)), longer):
        try:
            return f"{path.name}: {chosen(path, draw)}"
        except (NotHere, RecursionError):  # the second: nested too deep by the first of two damages
            continue
    raise AssertionError("any file can be made longer")


def somewhere(size: int, draw: Random) -> int:
    """A place in so many bytes; the beginning, where formats say what they are, is drawn more often."""
    if size == 0:
        raise NotHere
    return draw.randrange(min(size, draw.choice((16, 256, size))))


# --- any bytes --------------------------------------------------------------------------------------------------------


@damages("bytes")
def bits_flipped(path: Path, draw: Random) -> str:
    data, count = bytearray(path.read_bytes()), draw.choice((1, 3, 30))
    for _ in range(count):
        data[somewhere(len(data), draw)] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return f"{count} bits flipped"


@damages("bytes")
def cut_short(path: Path, draw: Random) -> str:
    data = path.read_bytes()
    left = draw.choice((1, 7, 8, len(data) // 2, int(len(data) * draw.random()), len(data) - 1))
    path.write_bytes(data[: max(0, left)])
    return f"cut to {left} of {len(data)} bytes"


@damages("bytes")
def emptied(path: Path, draw: Random) -> str:
    path.write_bytes(b"")
    return "emptied"


@damages("bytes")
def longer(path: Path, draw: Random) -> str:
    more = draw.choice((b"\0" * 4096, b"}\n", path.read_bytes(), draw.randbytes(999)))
    with path.open("ab") as file:
        file.write(more)
    return f"{len(more)} bytes appended"


@damages("bytes")
def block_changed(path: Path, draw: Random) -> str:
    data = path.read_bytes()
    start, name = somewhere(len(data), draw), draw.choice(("zeros", "ones", "noise", "nothing"))
    length = min(draw.choice((8, 512, 4096)), len(data) - start)
    new = {"zeros": b"\0" * length, "ones": b"\xff" * length, "noise": draw.randbytes(length), "nothing": b""}[name]
    path.write_bytes(data[:start] + new + data[start + length :])
    return f"{length} bytes from {start} on are now {name}"


@damages("bytes")
def prefixed(path: Path, draw: Random) -> str:
    prefix = draw.choice(
        (b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\n\n", b"version https://git-lfs.github.com/spec/v1\n")
    )
    path.write_bytes(prefix + path.read_bytes())
    return f"{prefix!r} put before it"


@damages("bytes")
def something_else(path: Path, draw: Random) -> str:
    new = draw.choice(
        (b"<html><body>404 Not Found</body></html>", b"null", b"[]", b"{}", b"\x80\x04.", b"PK\3\4", b"0")
    )
    path.write_bytes(new)
    return f"holds {new!r} alone"


# --- what is at the path ----------------------------------------------------------------------------------------------


@damages("place")
def gone(path: Path, draw: Random) -> str:
    path.unlink()
    return "removed"


@damages("place")
def folder(path: Path, draw: Random) -> str:
    path.unlink()
    path.mkdir()
    return "an empty folder in its place"


@damages("place")
def pipe(path: Path, draw: Random) -> str:
    path.unlink()
    os.mkfifo(path)
    return "a FIFO in its place, and nobody writes"


@damages("place")
def link(path: Path, draw: Random) -> str:
    target = draw.choice((path.name, "nowhere", "."))
    path.unlink()
    path.symlink_to(target)
    return f"a link to {'itself' if target == path.name else repr(target)} in its place"


@damages("place")
def other_file(path: Path, draw: Random) -> str:
    """Another one of the world: from its top folder, or from its own folder."""
    top = next((p for p in path.parents if (p / "words.txt").is_file()), path.parent)
    others = sorted(p for where in {top, path.parent} for p in where.iterdir() if p.is_file() and p != path)
    if not others:
        raise NotHere
    chosen = draw.choice(others)
    shutil.copyfile(chosen, path)
    return f"replaced by {chosen.relative_to(top)}"
