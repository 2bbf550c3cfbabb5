"""The terminal: text from recipes, checkpoints and bundles is shown as it is, never read as markup."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def stdout_apart() -> Iterator[None]:
    """Within it what a library in C prints to standard output is dropped: that is for results alone.

    Of HiGHS in scipy 1.18, which prints a line for itself now and then.
    """
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
