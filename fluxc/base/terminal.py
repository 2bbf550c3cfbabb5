"""The bar of a stage that runs, on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.text import Text

from fluxc.base.estimate import as_clock
from fluxc.base.memory import bytes_in_words
from fluxc.base.shown import Bar, Event
from fluxrt.log import printable

BAR_WIDTH, LEAST_WIDTH = 40, 8
SPARE = 3
"""Columns that stay free for the ^C that a terminal shows: a line more would not be taken away with the bar."""


def bar_on(console: Console) -> Bar:
    """A bar at the bottom of `console`, below the lines that are printed there; it goes when the stage ends."""

    @contextmanager
    def bar(running: Callable[[], Event]) -> Iterator[None]:
        shown = Live(get_renderable=lambda: _Standing(running()), console=console, transient=True, refresh_per_second=5)
        with shown:
            yield

    return bar


def print_line(console: Console, line: str) -> None:
    """Print a line of the log above the bar: of a stage without the tool's name, and dim where its result was there."""
    rest = line.partition(": ")[2]
    line = rest if rest.startswith("[") else line
    console.print(Text(line, "dim" if line.endswith(": cached") else ""), soft_wrap=True)


class _Standing:
    """Two lines: what runs and where it stands; the bar with times and memory, as far as there is room for it."""

    def __init__(self, event: Event) -> None:
        self._event = event

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        event = self._event
        head = Text(printable(": ".join(part for part in (event.counted + event.title, event.place) if part)))
        width = options.max_width - SPARE
        head.truncate(width, overflow="ellipsis")
        yield head
        share = [f"{100 * event.done // event.total} %"] if event.total else []
        left = f", about {as_clock(event.left)} left" if event.left is not None else ""
        left += f", {as_clock(event.all_left)} for all stages" if event.all_left is not None else ""
        memory = [bytes_in_words(event.memory)] if event.memory else []
        told = "  ".join([*share, as_clock(event.seconds) + left, *memory])
        indent = len(event.counted)
        room = min(BAR_WIDTH, width - indent - len(told) - 2)
        if room >= LEAST_WIDTH:
            yield Segment(" " * indent)
            yield ProgressBar(total=event.total or None, completed=event.done, width=room, pulse=not event.total)
            told = f"  {told}"
        rest = Text(told)
        rest.truncate(options.max_width - SPARE, overflow="ellipsis")
        yield rest
