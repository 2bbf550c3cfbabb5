"""Progress on the terminal: a line a stage with a bar while it works; nothing when stderr is not a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from fluxc.base.console import new_console


class Report(Protocol):
    """Called with what is done, of how much, and a few words that are shown beside the bar."""

    def __call__(self, done: int, total: int, detail: str = "") -> None: ...


class StageProgress:
    """Shows stages as they run."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or new_console(stderr=True)

    @contextmanager
    def stage(self, title: str) -> Iterator[Report]:
        """Show `title` while the body runs; the body may call the yielded `report(done, total)`."""
        if not self._console.is_terminal:
            yield lambda done, total, detail="": None
            return
        began = time.perf_counter()
        with Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=self._console,
            transient=True,
        ) as progress:
            task = progress.add_task(title, total=None, detail="")
            yield lambda done, total, detail="": progress.update(task, completed=done, total=total, detail=detail)
        took = f"{time.perf_counter() - began:.1f} s"
        self._console.print(Text.assemble(("done", "green"), f"   {title}  ", (took, "dim")))

    def say(self, line: str) -> None:
        """Print a finding that must be seen, terminal or not."""
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def cached(self, title: str) -> None:
        """Say that a stage's result was already there."""
        if self._console.is_terminal:
            self._console.print(Text(f"cached {title}", "dim"))
