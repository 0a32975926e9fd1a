"""A live progress line for each stage, on stderr."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .. import ranks
from ..stages.options import Progress as Report
from .shown import shown

console = Console(stderr=True)


class progress_lines:
    """A live progress line per stage on a terminal; silent elsewhere, and but for the first of several ranks."""

    def __enter__(self) -> Report:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console, disable=ranks.is_spare() or not console.is_terminal)
        self.tasks: dict[str, Any] = {}
        self.bar.start()
        return self.report

    def report(self, stage: str, done: int, total: int) -> None:
        stage = shown(stage)
        head = stage.split(":")[0]
        if head not in self.tasks:
            self.tasks[head] = self.bar.add_task(stage, total=total)
        self.bar.update(self.tasks[head], completed=done, total=total, description=stage)

    def __exit__(self, *exception: Any) -> None:
        self.bar.stop()
