"""What comes with the package: the reference model and held-out text."""

from __future__ import annotations

from pathlib import Path

REFERENCE = Path(__file__).parent / "reference"
MODEL = REFERENCE / "model"


def text_files() -> list[Path]:
    """The bundled held-out text, one domain a file."""
    return sorted(path for path in (REFERENCE / "text").glob("*.txt") if path.stem.islower())


def reference_data() -> list[str]:
    """The same as `--data` takes it."""
    return [f"{path.stem}={path}" for path in text_files()]


def sample_texts(count: int, characters: int = 400) -> list[str]:
    """Stretches of the bundled text, its domains in turn."""
    texts = [file.read_text(encoding="utf-8") for file in text_files()]
    starts = [5000 + characters * (i // len(texts)) for i in range(count)]
    return [texts[i % len(texts)][start : start + characters] for i, start in enumerate(starts)]
