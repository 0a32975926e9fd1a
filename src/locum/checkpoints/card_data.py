"""The head of a model card, as hubs read it: what the model is made from, its licence and task, what was measured.

It is read and written by huggingface_hub. What the original's card says is carried over where it holds for what was made
of it; a folder's card may be anybody's, so entries of another kind than a hub has are left out.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id

from ..errors import LocumError
from ..files import NOTES
from ..places import bare
from .inside import read_json
from .notes import named_original

CARD = "README.md"
MOST_BYTES = 2**22  # of a card
TAGS = ("mixture-of-experts", "compressed", "locum")
TASKS = {  # of hubs, by the class that opens a model
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMultimodalLM": "any-to-any",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForTokenClassification": "token-classification",
}
LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")
LICENCE_FILE = re.compile(r"(licen[cs]e|copying)(\.(txt|md))?", re.IGNORECASE)
logger = logging.getLogger(__name__)


def card_data(
    source: Path,
    opens: str,
    *,
    relation: str | None = None,
    over: Path | None = None,
    data: Iterable[Path] = (),
    results: Sequence[EvalResult] = (),
    name: str = "",
) -> ModelCardData:
    """The head of the card of what is made from the folder `source` and opened by the class `opens`.

    `relation` is what it is to its base, such as finetune; None where a hub has no word for it, as for experts that became
    smaller. An adapter is one `over` a folder. `data` is what it was trained on, which is named where it is a hub's.
    Results need a `name`.
    """
    line = _line(source)
    heads = [metadata_of(folder) for folder in line]
    base = _base_model(line, heads) if over is None else hub_id(over)
    relation = relation if over is None else "adapter"
    datasets = (in_hub_cache(path, "datasets") for path in data)
    return ModelCardData(
        library_name="transformers" if over is None else "locum",
        base_model=base,
        base_model_relation=relation if base else None,
        **_licence(line, heads),
        pipeline_tag=TASKS.get(opens) or _first(heads, "pipeline_tag", re.compile("[a-z0-9-]+")),
        language=_first(heads, "language", LANGUAGE),
        tags=[*(_texts(heads[0].get("tags")) or ()), *TAGS],
        datasets=list(dict.fromkeys(filter(None, datasets))) or None,
        **({"model_name": name, "eval_results": list(results)} if results else {}),
    )


def _line(source: Path) -> list[Path]:
    """A folder and, where Locum made it, the original that it comes from, if that is there."""
    original = named_original(source).place if (source / NOTES).is_file() else None
    return [source, *([original] if original is not None else [])]


def metadata_of(folder: Path) -> dict[str, Any]:
    """What the head of a folder's card says; empty, with a word, where it cannot be read."""
    card = folder / CARD
    if not card.is_file():
        return {}
    try:
        if card.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        return metadata_load(card) or {}
    except Exception as error:  # YAML can be wrong in many ways
        said = str(error).split("\n")[0]
        logger.warning("%s: its metadata cannot be read (%s), so nothing of it is carried over", card, said)
        return {}


# --- what it is made from ---------------------------------------------------------------------------------------------


def _base_model(line: list[Path], heads: list[dict[str, Any]]) -> str | None:
    """The hub's id of the original. A folder's name is none: with it, a card would point to somebody else's model."""
    said = heads[0].get("base_model") if (line[0] / NOTES).is_file() else None
    return said if isinstance(said, str) and _is_id(said) else hub_id(line[-1])


def hub_id(folder: Path) -> str | None:
    """The id that a checkpoint has on a hub, as far as its folder tells: by its place in the hub's cache, by its own name
    in its card, or as its config says."""
    if (cached := in_hub_cache(folder, "models")) is not None:
        return cached
    real = Path(os.path.realpath(folder))
    named = re.escape(real.name)
    of_its_name = rf"(?:huggingface\.co/|from_pretrained\(\s*[\"'])([\w.-]+/{named})(?![\w/-])"
    if (found := re.search(of_its_name, _text_of(folder / CARD))) and _is_id(found[1]):
        return found[1]
    try:
        said = read_json(folder / "config.json").get("_name_or_path")
    except LocumError:
        return None
    is_one = isinstance(said, str) and said.count("/") == 1 and _is_id(said)
    return said if is_one and not Path(said).exists() else None


def _text_of(card: Path) -> str:
    with contextlib.suppress(OSError):
        if card.stat().st_size <= MOST_BYTES:
            return card.read_text(encoding="utf-8", errors="replace")
    return ""


def in_hub_cache(path: Path, kind: str) -> str | None:
    """The id of what a path lies in, if that is a snapshot in the cache of huggingface_hub; kind is models or datasets."""
    parts = Path(os.path.abspath(path)).parts
    for part, below in itertools.pairwise(parts):
        if part.startswith(f"{kind}--") and below == "snapshots":
            name = part.removeprefix(f"{kind}--").replace("--", "/")
            return name if _is_id(name) else None
    return None


def _is_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _licence(line: list[Path], heads: list[dict[str, Any]]) -> dict[str, Any]:
    """The licence that the first card in the line states, else a file of it, else nothing."""
    for head in heads:
        if stated := _texts(head.get("license")):
            more = {key: _texts(head.get(key)) for key in ("license_name", "license_link")}
            said = {"license": stated[0] if len(stated) == 1 else stated}
            return said | {key: bare(value[0]) for key, value in more.items() if value}
    for folder in line:
        files = sorted(file.name for file in folder.iterdir() if LICENCE_FILE.fullmatch(file.name) and file.is_file())
        if files:
            return {"license": "other", "license_name": "license-of-the-original", "license_link": files[0]}
    return {}


def _first(heads: list[dict[str, Any]], key: str, form: re.Pattern[str]) -> Any:
    """The first entry of a name whose texts all have a form: a text, or a list of them."""
    for head in heads:
        if (said := _texts(head.get(key))) and all(map(form.fullmatch, said)):
            return said[0] if len(said) == 1 else said
    return None


def _texts(said: Any) -> list[str]:
    """Short lines of text that an entry holds, alone or in a list; none where it holds anything else."""
    said = [said] if isinstance(said, str) else said
    if not isinstance(said, list) or not all(isinstance(x, str) for x in said):
        return []
    return [x for x in said if x.strip() and len(x) <= 200 and x.isprintable()]


# --- what was measured ------------------------------------------------------------------------------------------------


def result(
    measured_on: str, split: str, metric: str, value: float, words: str, task: bool = False, **more: Any
) -> EvalResult:
    """One number measured on a domain of text, or on a task. `more` stands beside it: the original's value, and the ends of
    its interval."""
    return EvalResult(
        task_type="text-generation",
        dataset_type=measured_on if task else "text",
        dataset_name=measured_on,
        dataset_config=measured_on,
        dataset_split=split,
        metric_type=metric,
        metric_name=words,
        metric_value=_short(value),
        metric_args={key: _short(x) for key, x in more.items() if x is not None} or None,
    )


def validated(recovery: dict[str, Any]) -> list[EvalResult]:
    """The validation of a recovery at both ends, from its summary."""
    before, after = (recovery.get(key) for key in ("validation_loss_before", "validation_loss"))
    if not all(isinstance(x, float) and math.isfinite(x) for x in (before, after)):
        return []
    words = "loss on the validation text of the recovery, nats per token"
    return [result("validation text of the recovery", "validation", "loss", after, words, before=before)]


def _short(value: float) -> float:
    return float(f"{value:.6g}")
