"""Tables that fit a narrow terminal: less important columns are left out, names stay whole, and the rest goes on in the next
line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from fluxc.base.console import new_table

BORDERS = 3
"""Characters that a column takes besides its text in a table with lines; one more at the end."""


@dataclass(frozen=True)
class Column:
    """A column: `rank` 0 stays whatever the width, of the others the highest rank goes first; `whole` is never wrapped."""

    header: str
    rank: int = 0
    whole: bool = False


def fitted_table(console: Console, columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str) -> Table:
    """The table for the console's width. Where columns with rank 0 alone do not fit, its lines are left out too."""
    widths = [
        max(cell_len(text) for text in (column.header, *cells)) for column, *cells in zip(columns, *rows, strict=True)
    ]
    shown = list(range(len(columns)))

    def needed() -> int:
        return sum(widths[at] + BORDERS for at in shown) + 1

    while needed() > console.width and any(columns[at].rank for at in shown):
        shown.remove(max(shown, key=lambda at: columns[at].rank))
    table = new_table(*(columns[at].header for at in shown), title=title)
    if needed() > console.width:
        table.box, table.show_edge, table.padding = box.SIMPLE_HEAD, False, (0, 1, 0, 0)
    for column, at in zip(table.columns, shown, strict=True):
        column.no_wrap = columns[at].whole and widths[at] <= console.width // 2 + console.width // 5
    for row in rows:
        table.add_row(*(row[at] for at in shown))
    left_out = [columns[at].header for at in range(len(columns)) if at not in shown]
    if left_out:
        table.caption = f"not shown at this width: {', '.join(left_out)}"
        table.caption_justify = "left"
    return table
