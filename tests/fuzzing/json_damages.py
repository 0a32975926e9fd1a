"""Damages of JSON: of whole files, of a part of one, of a line of JSON lines, of headers and notes in safetensors files.

A change takes a container of the document and a key in it; it is drawn by walking down from the root, so that what is
near the root is changed more often than the many leaves. What JSON libraries would not write is put in as raw text.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from .damages import NotHere, damages
from .tensor_damages import read_parts, write_parts

RAW = "@@raw@@"  # stands in a document for text that is put in as it is
NOTHING_LIKE = (None, True, False, 0, 1, -1, 0.5, "", "x", "0", [], {}, [0], {"x": 1}, [[]], [None])
LARGE = (2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 1e308, -1e308, 1e-320)
RAW_TEXTS = {
    "NaN": "NaN",
    "Infinity": "Infinity",
    "-Infinity": "-Infinity",
    "1e999": "1e999",
    "a number of 5,000 digits": "9" * 5000,
    "100,000 nested lists": "[" * 100_000 + "]" * 100_000,
    "900 nested objects": '{"x":' * 900 + "0" + "}" * 900,
    "half a surrogate pair": '"\\ud800"',
}
TEXTS = (
    "\0",
    "\u202eabc",
    "🦊" * 500,
    "a" * 100_000,
    "[red]x[/red]",
    "\x1b[31mred",
    "a\nb",
    "../model",
    "é\u0301",
    "{}",
    "%s",
)

Change = Callable[[Any, Any, Random], tuple[str, str]]  # container, key: words, and raw text or ""
CHANGES: list[Change] = []


def change(function: Change) -> Change:
    CHANGES.append(function)
    return function


def changed(document: Any, draw: Random) -> tuple[str, str]:
    """The text of a document after one change, and the change in words."""
    document = copy.deepcopy(document)
    while True:
        container, key, where = _walk(document, draw)
        try:
            words, raw = draw.choice(CHANGES)(container, key, draw)
        except NotHere:
            continue
        return json.dumps(document).replace(f'"{RAW}"', raw), f"{where}: {words}"


def _walk(document: Any, draw: Random) -> tuple[Any, Any, str]:
    """A container, a key in it, and the path to it."""
    if not document or not isinstance(document, (dict, list)):
        raise NotHere
    container, where = document, ""
    while True:
        key = draw.choice(sorted(container)) if isinstance(container, dict) else draw.randrange(len(container))
        where += f".{key}" if isinstance(container, dict) else f"[{key}]"
        below = container[key]
        if not isinstance(below, (dict, list)) or not below or draw.random() < 0.3:
            return container, key, where.lstrip(".")
        container = below


def short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:30]}... ({len(text)} characters)"


# --- changes ----------------------------------------------------------------------------------------------------------


@change
def retyped(container: Any, key: Any, draw: Random) -> tuple[str, str]:
    old, new = container[key], draw.choice(NOTHING_LIKE)
    container[key] = copy.deepcopy(new)
    return f"{short(old)} becomes {short(new)}", ""


@change
def large(container: Any, key: Any, draw: Random) -> tuple[str, str]:
    old, container[key] = container[key], draw.choice(LARGE)
    return f"{short(old)} becomes {container[key]}", ""


@change
def nudged(container: Any, key: Any, draw: Random) -> tuple[str, str]:
    old = container[key]
    if isinstance(old, bool) or not isinstance(old, (int, float)):
        raise NotHere
    container[key] = draw.choice((old + 1, old - 1, -old, old * 2, old * 1000, old + 0.5, str(old), [old]))
    return f"{old} becomes {container[key]!r}", ""


@change
def strange(container: Any, key: Any, draw: Random) -> tuple[str, str]:
    old, (name, raw) = container[key], draw.choice(list(RAW_TEXTS.items()))
    container[key] = RAW
    return f"{short(old)} becomes {name}", raw


@change
def strange_text(container: Any, key: Any, draw: Random) -> tuple[str, str]:
    old, container[key] = container[key], draw.choice(TEXTS)
    return f"{short(old)} becomes {short(container[key])}", ""


@change
def deleted(container: Any, key: Any, draw: Random) -> tuple[str, str]:
    return f"{short(container.pop(key))} deleted", ""


@change
def doubled(container: Any, key: Any, draw: Random) -> tuple[str, str]:
    """A list has the item twice, an object the key twice."""
    old = container[key]
    if isinstance(container, list):
        container.insert(key, copy.deepcopy(old))
        return "listed twice", ""
    container[key] = RAW
    return "its key is there twice", f"{json.dumps(draw.choice(NOTHING_LIKE))}, {json.dumps(key)}: {json.dumps(old)}"


@change
def renamed(container: Any, key: Any, draw: Random) -> tuple[str, str]:
    if isinstance(container, list):
        raise NotHere
    new = draw.choice((key + "x", key[:-1], key.upper(), "", f" {key}", *sorted(container)))
    container[new] = container.pop(key)
    return f"its key becomes {new!r}", ""


@change
def added(container: Any, key: Any, draw: Random) -> tuple[str, str]:
    if isinstance(container, list):
        container.append(copy.deepcopy(draw.choice(NOTHING_LIKE)))
        return f"{container[-1]!r} added at the end of its list", ""
    new = draw.choice(("x", "", "__class__", "auto_map", "_attn_implementation"))
    container[new] = copy.deepcopy(draw.choice(NOTHING_LIKE))
    return f"{new!r}: {container[new]!r} added beside it", ""


@change
def swapped(container: Any, key: Any, draw: Random) -> tuple[str, str]:
    other = draw.choice(sorted(container) if isinstance(container, dict) else range(len(container)))
    if other == key:
        raise NotHere
    container[key], container[other] = container[other], container[key]
    return f"changes places with {other!r}", ""


@change
def without_content(container: Any, key: Any, draw: Random) -> tuple[str, str]:
    if not isinstance(container[key], (dict, list)):
        raise NotHere
    container[key] = type(container[key])()
    return "emptied", ""


# --- where JSON lies --------------------------------------------------------------------------------------------------


def _load(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise NotHere from None  # damaged already


@damages("json")
def in_json(path: Path, draw: Random) -> str:
    text, words = changed(_load(path.read_bytes()), draw)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return words


@damages("layout")
def in_layout(path: Path, draw: Random) -> str:
    """In the entry of config.json that lays out the containers."""
    config = _load(path.read_bytes())
    if not isinstance(config, dict) or "quantization_config" not in config:
        raise NotHere
    text, words = changed(config["quantization_config"], draw)
    whole = json.dumps(config | {"quantization_config": RAW}).replace(f'"{RAW}"', text)
    path.write_text(whole, encoding="utf-8", errors="surrogatepass")
    return f"quantization_config, {words}"


@damages("lines")
def in_a_line(path: Path, draw: Random) -> str:
    lines = path.read_bytes().splitlines()
    index = somewhere_in(lines, draw)
    text, words = changed(_load(lines[index]), draw)
    lines[index] = text.encode("utf-8", errors="surrogatepass")
    path.write_bytes(b"\n".join([*lines, b""]))
    return f"line {index + 1}, {words}"


@damages("lines")
def lines_moved(path: Path, draw: Random) -> str:
    lines = path.read_bytes().splitlines()
    index = somewhere_in(lines, draw)
    name = draw.choice(("removed", "there twice", "blank", "joined with the next", "a list", "a number", "Latin-1"))
    line = lines[index]
    new = {"removed": [], "there twice": [line] * 2, "blank": [b""], "a list": [b"[" + line + b"]"], "a number": [b"3"]}
    new |= {
        "joined with the next": [line + b"".join(lines[index + 1 : index + 2])],
        "Latin-1": [line[:-3] + b"\xfc" + line[-3:]],
    }
    lines[index : index + 1] = new[name]
    path.write_bytes(b"\n".join([*lines, b""]))
    return f"line {index + 1} is {name}"


@damages("weights")
def in_header(path: Path, draw: Random) -> str:
    """Of a safetensors file; the tensors' bytes stay."""
    header, body = read_parts(path)
    text, words = changed(header, draw)
    write_parts(path, text.encode("utf-8", errors="surrogatepass"), body)
    return f"header, {words}"


@damages("notes")
def in_notes(path: Path, draw: Random) -> str:
    """In JSON that is an entry of a safetensors file's metadata."""
    header, body = read_parts(path)
    metadata = header.get("__metadata__")
    names = sorted(k for k, v in metadata.items() if str(v).startswith("{")) if isinstance(metadata, dict) else []
    key = names[somewhere_in(names, draw)]
    metadata[key], words = changed(_load(metadata[key]), draw)
    write_parts(path, json.dumps(header).encode(), body)
    return f"{key}, {words}"


def somewhere_in(items: list[Any], draw: Random) -> int:
    if not items:
        raise NotHere
    return draw.choice((0, len(items) - 1, draw.randrange(len(items))))
