"""Write the held-out text that is bundled with the reference model: `src/locum/reference/text/<domain>.txt`.

    python -m benchmarks.reference.text

The text comes from documents of the validation and test splits alone. That none of it was trained on is asserted
here, by document hashes and by paragraphs, before anything is written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from benchmarks.corpora.corpora import DOMAINS, archive, fingerprint, load
from benchmarks.corpora.readers import debian_files, html_text, zip_files

TEXT = Path(__file__).resolve().parents[2] / "src" / "locum" / "reference" / "text"
SEPARATOR = "\n\f\n"
LEAST_BYTES, MOST_BYTES = 360_000, 392_000
CAPS = (4_000, 6_000, 8_000, 10_000, 12_000, 16_000, 32_000, 10**9)  # characters taken from one document
LONG = 200  # paragraphs from this length on must not occur in the training text


def notices() -> str:
    """Copyright notices and licences of the bundled text, word for word from the packages."""
    code = zip_files(
        archive(DOMAINS["code"]), lambda name: re.search(r"(licenses/.*|gis/.*/LICENSE|license\.txt)$", name)
    )
    docs = debian_files(archive(DOMAINS["docs"]), lambda name: name.endswith("/html/legalnotice.html"))
    glosses = debian_files(archive(DOMAINS["dictionary"]), lambda name: name.endswith("/wordnet/data.adv"))
    parts = ["plays, speeches, novels, scripture: in the public domain. math: generated, Apache-2.0 as this project.\n"]
    parts += [f"code.txt: {name}\n\n{data.decode()}" for name, data in code]
    parts += [f"docs.txt: PostgreSQL manual\n\n{html_text(data.decode())}" for _, data in docs]
    for _, data in glosses:
        lines = [line[5:].rstrip() for line in data.decode("ascii").splitlines() if line.startswith("  ")]
        parts.append("dictionary.txt: WordNet 3.0\n\n" + "\n".join(lines))
    return f"\n\n{'=' * 79}\n\n".join(part.strip() for part in parts) + "\n"


def _head(text: str, most: int) -> str:
    """The beginning of a document, cut at the end of a paragraph or of a line."""
    if len(text) <= most:
        return text
    cut = text.rfind("\n\n", most // 2, most)
    cut = cut if cut > 0 else text.rfind("\n", 0, most)
    return text[: cut if cut > 0 else most].rstrip()


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def choose(parts: dict[str, list[str]]) -> list[str]:
    """Documents of the held-out splits in the order of their hashes, up to the size of one bundled file.

    Long documents are cut to the least cap that still fills the file, so that a file holds many documents.
    """
    training = _folded("\n".join(parts["train"]))
    known = set(map(fingerprint, parts["train"]))
    held = sorted({fingerprint(text): text for text in parts["validation"] + parts["test"]}.items())
    for cap in CAPS:
        chosen, size = [], 0
        for mark, text in held:
            piece = _head(text, cap)
            need = len((piece + SEPARATOR).encode())
            if mark in known or size + need > MOST_BYTES or _repeats(piece, training):
                continue
            chosen.append(piece)
            size += need
        if size >= LEAST_BYTES:
            break
    assert not known & set(map(fingerprint, chosen)), "a bundled document is in the training split"
    assert not any(_repeats(text, training) for text in chosen), "a bundled paragraph is in the training text"
    return chosen


def _repeats(text: str, training: str) -> bool:
    paragraphs = (_folded(paragraph) for paragraph in text.split("\n\n"))
    return any(len(paragraph) >= LONG and paragraph in training for paragraph in paragraphs)


def _questions(texts: list[str]) -> set[str]:
    return {fingerprint(text.split("\nAnswer:")[0]) for text in texts}


def write_text(target: Path) -> None:
    """Write all bundled files and their README into a new folder, then put it in the place of the old one."""
    made = target.with_name(f".{target.name}.new-{os.getpid()}")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    rows = []
    for name, domain in DOMAINS.items():
        if not domain.redistributable:
            continue
        parts = load(domain)
        chosen = choose(parts)
        if name == "math":
            assert not _questions(chosen) & _questions(parts["train"]), "a bundled question is in the training split"
        data = SEPARATOR.join(chosen).encode() + b"\n"
        assert all("\f" not in text for text in chosen), f"a document of {name} holds the separator"
        (made / f"{name}.txt").write_bytes(data)
        rows.append(
            f"| {name} | {len(chosen)} | {len(data)} | {domain.source} | `{domain.package}` {domain.version} "
            f"| {domain.licence} | `{hashlib.sha256(data).hexdigest()[:16]}` |"
        )
        print(json.dumps({"domain": name, "documents": len(chosen), "bytes": len(data)}))
    table = "\n".join(rows)
    text = f"""# Bundled text

Held-out text of the reference model, one UTF-8 file per domain. The reference model was not trained on any of it: the
documents are from its validation and test splits (split by a hash of each document), and
`benchmarks/reference/text.py`, which wrote these files, asserts that no document and no paragraph of {LONG} or more
characters occurs in the training text, and for the generated arithmetic that no question does.

Documents are separated by a line that holds only a form feed, where `--data` cuts a text file into documents; blank
lines inside a document are its own. Long documents are cut at the end of a paragraph.

| domain | documents | bytes | text | package | licence of the text | sha256 (first 16) |
|---|---|---|---|---|---|---|
{table}

The notices that go with the text, word for word, are in `LICENSES.txt`.
"""
    (made / "README.md").write_text(text, encoding="ascii")
    (made / "LICENSES.txt").write_text(notices(), encoding="utf-8")
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        os.rename(target, old)
    os.rename(made, target)
    shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TEXT)
    write_text(parser.parse_args().out)
