"""What another package may offer, one file each, and that package installed: a folder with entry points."""

from __future__ import annotations

import shutil
from pathlib import Path

HERE = Path(__file__).parent
OFFERS = {
    "locum.criteria": ("spread", HERE / "spread.py"),
    "locum.methods": ("pairs", HERE / "pairs.py"),
    "locum.parts": ("shift", HERE / "shift.py"),
    "locum.policies": ("skip_light", HERE / "skip.py"),
    "locum.ways": ("distilled", HERE / "distilled.py"),
    "locum.exports": ("listing", HERE / "listing.py"),
}


def install(folder: Path) -> Path:
    """A site folder with the package in it, as an installer would leave it: modules and a dist-info."""
    package = folder / "locum_foreign"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('"""Parts of a compressor, from elsewhere."""\n')
    lines = []
    for group, (name, file) in OFFERS.items():
        shutil.copy(file, package / file.name)
        lines.append(f"[{group}]\n{name} = locum_foreign.{file.stem}\n")
    about = folder / "locum_foreign-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: locum-foreign\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("\n".join(lines))
    return folder
