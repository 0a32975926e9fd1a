"""Damages of text, of chat templates and of Parquet files: other texts of the same kind."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

from .damages import damages

TEXTS = {
    "blank": " \n\t\n",
    "one word": "word",
    "one line of a million characters": "a" * 1_000_000,
    "one word of 200,000 letters": "é" * 200_000,
    "zero bytes": "words \0 and \0 more " * 200,
    "form feeds alone": "\f" * 5000,
    "one paragraph again and again": "The same words.\n\n" * 5000,
    "right-to-left marks": "\u202eabc \u2066 def " * 2000,
    "combining marks": "e" + "\u0301" * 20_000,
    "emoji": "🦊🏽\u200d🚀 " * 3000,
    "special tokens": "<|end|><|pad|>" * 2000,
    "old Mac line ends": "Some words here.\r" * 3000,
}
TEMPLATES = {
    "unbalanced": "{% for message in messages %}{{ message.content }}",
    "an unknown filter": "{{ messages | nowhere }}",
    "an unknown name": "{{ nowhere.at.all }}",
    "an error of its own": "{{ raise_exception('two\nlines') }}",
    "an endless loop": "{% for i in range(10**12) %}{% endfor %}",
    "a long text": "{{ 'a' * 10**8 }}",
    "a text that is too long": "{{ 'a' * 10**12 }}",
    "endless recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a look at what is forbidden": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "no text": "{# nothing #}",
    "no message": "the same for every conversation",
    "half a surrogate pair": "{{ '\\ud800' }}",
    "a division by zero": "{{ 1 // 0 }}",
    "a wrong type": "{{ messages + 1 }}",
    "a missing key": "{{ messages[99].content }}",
    "a file of its own": "{% include 'config.json' %}",
}


@damages("text")
def other_text(path: Path, draw: Random) -> str:
    name = draw.choice(sorted(TEXTS))
    path.write_text(TEXTS[name], encoding="utf-8", newline="")
    return name


@damages("text")
def other_encoding(path: Path, draw: Random) -> str:
    encoding = draw.choice(("utf-16", "utf-32", "latin-1", "cp1252"))
    words = "Grüße aus Köln. " + path.read_text(encoding="utf-8", errors="ignore")[:9000]
    path.write_bytes(words.encode(encoding, errors="replace"))
    return f"in {encoding}"


@damages("template")
def other_template(path: Path, draw: Random) -> str:
    name = draw.choice(sorted(TEMPLATES))
    path.write_text(TEMPLATES[name], encoding="utf-8")
    return name


@damages("parquet")
def other_columns(path: Path, draw: Random) -> str:
    """One of the files in `odd/`."""
    chosen = draw.choice(sorted((path.parent / "odd").iterdir()))
    shutil.copyfile(chosen, path)
    return f"its rows are {chosen.stem}"
