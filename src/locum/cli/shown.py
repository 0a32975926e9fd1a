"""Text that may come from files, as a terminal shows it: never a command to it.

Names of models, domains and layers are anybody's. Control characters would move the cursor or rewrite the screen, and rich
reads brackets as its markup.
"""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console
from rich.table import Table


def shown(text: Any, keep: str = "") -> str:
    """Text with what cannot be printed written out, such as \\x1b; but for the characters in `keep`."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in str(text))


def say(text: Any, err: bool = False) -> None:
    """Lines of text on the terminal."""
    click.echo(shown(text, keep="\n"), err=err)


def add_row(table: Table, *cells: Any) -> None:
    table.add_row(*map(shown, cells))


def print_table(table: Table, width: int | None = None) -> None:
    """A table whose cells and heads are text and nothing else, at least so wide."""
    console = Console(markup=False, emoji=False)
    if width is not None:
        console = Console(markup=False, emoji=False, width=max(width, console.width))
    console.print(table)
