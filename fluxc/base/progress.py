"""What work tells of itself: stages, how far each is, and findings. Nothing is shown here; `shown.py` does that.

Every stage imports this module, so it changes rarely: its code is part of every stage's key in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol


class Report(Protocol):
    """Called with what is done, of how much, and a few words that are shown beside the bar."""

    def __call__(self, done: int, total: int, detail: str = "") -> None: ...


def of_prompts(report: Report | None, number: int, prompts: int, steps: int) -> Callable[[int], None]:
    """What reports that so many steps of prompt `number` are done, where there are `prompts` prompts of `steps` steps."""

    def on_step(done: int) -> None:
        if report:
            report(number * steps + done, prompts * steps, f"{number + done // steps}/{prompts} prompts")

    return on_step


class StageProgress:
    """Takes what a command tells, and shows nothing of it."""

    def expect(self, stages: int, predicted: Sequence[float] = ()) -> None:
        """So many stages are to come, cached ones included, with those that were; `predicted`: seconds of each, where known."""

    @contextmanager
    def stage(self, title: str) -> Iterator[Report]:
        """The stage `title` runs while the body does, which may call the yielded `report(done, total)`."""
        yield lambda done, total, detail="": None

    def cached(self, title: str) -> None:
        """The result of the stage `title` was already there."""

    def say(self, line: str) -> None:
        """A finding that must be seen."""

    def note(self, line: str) -> None:
        """What is good to know, and no finding."""

    def explain(self, line: str) -> None:
        """What only those want to see who look into the work."""
