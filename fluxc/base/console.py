"""The terminal: text from recipes, checkpoints and bundles is shown as it is, never read as markup."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def new_console(width: int = 180, stderr: bool = False) -> Console:
    """A console that prints strings as they are. Off a terminal, tables are `width` characters wide, so that they can be
    searched."""
    console = Console(stderr=stderr, markup=False, emoji=False)
    if not (stderr or console.is_terminal):
        console.width = width
    return console


def new_table(*headers: str, title: str = "") -> Table:
    """A table with its title at the left, in whose cells long words go on in the next line instead of being cut."""
    table = Table(*headers, title=title or None, title_justify="left")
    for column in table.columns:
        column.overflow = "fold"
    return table
