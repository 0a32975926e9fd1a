"""config.json announces what the folder has: entries of what was not written are taken back.

transformers leaves multi-token-prediction layers out when it loads a model, so no checkpoint that is made of one has them;
converters and engines look for their tensors where the config counts them. Code is not copied (side_files.py), and an
`auto_map` that names it would lead nowhere.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .inside import read_json
from .read import read_headers

COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules")
PREDICTS = re.compile(r"(^|\.)(mtp\w*|nextn\w*|eh_proj)(\.|$)")
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def settle_config(folder: Path) -> None:
    """Take back what the config.json of a folder announces and the folder does not have."""
    file, names = folder / "config.json", list(read_headers(folder))
    entries = read_json(file)
    settled = _settled(entries, folder, names)
    if settled != entries:
        file.write_text(json.dumps(settled, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _settled(entries: dict[str, Any], folder: Path, names: list[str]) -> dict[str, Any]:
    kept = {}
    for key, value in entries.items():
        if key == "auto_map" and isinstance(value, dict):
            value = {what: where for what, where in value.items() if _is_there(where, folder)}
            if not value:
                continue
        elif isinstance(value, dict) and key != "quantization_config":
            value = _settled(value, folder, names)
        elif key in COUNTS and type(value) is int and not _predicts(names, entries.get("num_hidden_layers")):
            value = 0
        kept[key] = value
    return kept


def _is_there(where: Any, folder: Path) -> bool:
    """Whether a folder has the code that one entry, or one of a pair of entries, names."""
    named = [one for one in (where if isinstance(where, list) else [where]) if isinstance(one, str)]
    return any((folder / f"{one.partition('.')[0]}.py").is_file() for one in named)


def _predicts(names: list[str], layers: Any) -> bool:
    """Whether there are tensors of prediction layers, which some families number after the others."""
    after = (int(found[1]) for name in names if (found := LAYER.search(name)))
    return any(map(PREDICTS.search, names)) or (type(layers) is int and any(number >= layers for number in after))
