"""The same folder with a file that imports Locum, for tools that can do no more than trust_remote_code=True."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..checkpoints.inside import check_link, read_json
from ..checkpoints.notes import notes_for_another
from ..checkpoints.weight_files import is_adapter
from ..errors import CheckpointError
from ..files import NOTES, whole
from ..places import bare
from .stock import has_stock_layout, merged_first
from .target import target

LOADER = Path(__file__).with_name("remote_code.py")  # transformers loads it by this name
HIDDEN = shutil.ignore_patterns(".*")  # such as .git: no part of the checkpoint


@target("remote-code")
@dataclass(frozen=True)
class RemoteCode:
    """The same folder, which also loads with trust_remote_code=True where Locum is installed."""

    kind: ClassVar[str] = "folder"

    def fault(self, model: Path) -> str:
        if has_stock_layout(model):
            return "it has the stock layout already; it loads without Locum"
        if is_adapter(model):
            return merged_first(model)
        return ""

    def write(self, model: Path, out: Path) -> str:
        config = read_json(model / "config.json") | {"auto_map": {"AutoConfig": f"{LOADER.stem}.Config"}}
        _check_files(model)
        with whole(out, "folder") as folder:
            shutil.copytree(model, folder, dirs_exist_ok=True, ignore=HIDDEN)
            shutil.copyfile(LOADER, folder / LOADER.name)
            if (folder / NOTES).is_file():  # those of an earlier version hold paths
                notes = bare(notes_for_another(model))
                (folder / NOTES).write_text(json.dumps(notes, indent=1), encoding="utf-8")
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            with (folder / "README.md").open("a", encoding="utf-8") as card:
                card.write(
                    f"\nIt also loads without `import locum` before, where Locum is installed: `trust_remote_code=True` lets "
                    f"transformers run `{LOADER.name}`, which imports it.\n"
                )
        return "the same folder, which also loads with trust_remote_code=True"


def _check_files(model: Path) -> None:
    """Refuse a folder that cannot be copied as it is: links that lead out of it, and what is neither file nor folder."""
    for file in sorted(model.rglob("*")):
        if any(part.startswith(".") for part in file.relative_to(model).parts):
            continue
        check_link(file, model)
        if not (file.is_file() or file.is_dir()):
            raise CheckpointError(f"{file} is neither a file nor a folder; remove it from the checkpoint")
