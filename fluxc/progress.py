"""Progress on the terminal: a line a stage with a bar while it works; nothing when stderr is not a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Report = Callable[[int, int], None]


class StageProgress:
    """Shows stages as they run."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)

    @contextmanager
    def stage(self, title: str) -> Iterator[Report]:
        """Show `title` while the body runs; the body may call the yielded `report(done, total)`."""
        if not self._console.is_terminal:
            yield lambda done, total: None
            return
        began = time.perf_counter()
        with Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        ) as progress:
            task = progress.add_task(title, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
        self._console.print(f"[green]done[/]   {title}  [dim]{time.perf_counter() - began:.1f} s[/]")

    def cached(self, title: str) -> None:
        """Say that a stage's result was already there."""
        if self._console.is_terminal:
            self._console.print(f"[dim]cached {title}[/]")
