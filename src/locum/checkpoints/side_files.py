"""What a checkpoint folder has besides weights: it goes along, as it is, into the folders that are made of it.

Processors, vocabularies, licences and whatever else there is, but for what is written anew, code, and weights of any kind.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ..files import NOTES
from .inside import check_link

ANEW = ("config.json", "README.md", "plan.json", "recovery.jsonl", NOTES)
OVER_WEIGHTS = ("adapter_config.json",)  # says that there are weights, which are not copied
# Names that weights, their lists, and code end in.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".npy", ".pkl")
LISTS, CODE = (".index.json",), (".py", ".pyc", ".so", ".sh")


def side_files(source: Path) -> list[Path]:
    """The files of a checkpoint folder that go along. Raises CheckpointError for a link that leads out of the folder."""
    found = []
    for file in sorted(Path(source).iterdir()):
        name = file.name.lower()
        if name.startswith(".") or file.name in ANEW + OVER_WEIGHTS or name.endswith(WEIGHTS + LISTS + CODE):
            continue
        if file.is_file():
            check_link(file, Path(source))
            found.append(file)
    return found


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy what goes along, except for what is there already."""
    for file in side_files(source):
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
