"""Shows the progress of a command: every event is a line of the logger `fluxc`, and a bar shows the stage that runs.

Lines go wherever the command sends them: to stderr, to a log file, as text or as JSON (fluxrt.log).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

from fluxc.base.estimate import Estimate, WholeEstimate, in_words
from fluxc.base.memory import bytes_in_words, memory_now, memory_peak
from fluxc.base.progress import Report, StageProgress

Name = Literal["begins", "runs", "done", "cached", "failed", "finished"]
LIFE_SECONDS = 60.0
"""A stage that runs longer gives a sign of life so often."""


@dataclass(frozen=True)
class Event:
    """What happened to the stage `title`, number `stage` of `stages` (0: not known).

    `done` of `total` units (0: not known) and `text`, where it stands in words; `seconds` since it began and, where known,
    those that are `left`, of the stage and of all stages; memory of the process in bytes.
    """

    name: Name
    title: str
    stage: int = 0
    stages: int = 0
    done: int = 0
    total: int = 0
    text: str = ""
    seconds: float = 0.0
    left: float | None = None
    all_left: float | None = None
    memory: int | None = field(default_factory=memory_now)
    peak: int = field(default_factory=memory_peak)

    @property
    def counted(self) -> str:
        """Which stage of how many: "[ 3/18] ", "[3] " where their number is not known."""
        width = len(str(self.stages))
        return f"[{self.stage:>{width}}/{self.stages}] " if self.stages else f"[{self.stage}] "

    @property
    def place(self) -> str:
        """Where it stands: "3/8 prompts"."""
        return self.text or (f"{self.done}/{self.total}" if self.total else "")

    def line(self) -> str:
        """The event as text."""
        memory = [bytes_in_words(self.memory)] if self.memory else []
        took = in_words(self.seconds)
        left = [f"about {in_words(self.left)} left"] if self.left is not None else []
        left += [f"about {in_words(self.all_left)} for all stages"] if self.all_left is not None else []
        said = {
            "begins": ["begins"],
            "runs": [self.place or "runs", f"{took} so far", *left, *memory],
            "done": [f"done in {took}", *memory],
            "cached": ["cached"],
            "failed": [f"ended without a result after {took}"],
        }
        return f"{self.counted}{self.title}: {', '.join(said[self.name])}"

    def fields(self) -> dict[str, object]:
        """The event for JSON; docs/cli.md says what they mean."""
        units = {"done": self.done, "total": self.total} if self.total else {}
        left = {} if self.left is None else {"seconds_left": round(self.left, 1)}
        left |= {} if self.all_left is None else {"all_seconds_left": round(self.all_left, 1)}
        return {
            "event": self.name,
            "title": self.title,
            "stage": self.stage,
            "stages": self.stages or None,
            **units,
            "seconds": round(self.seconds, 3),
            **left,
            "memory_bytes": self.memory,
            "peak_memory_bytes": self.peak,
        }


Bar = Callable[[Callable[[], Event]], AbstractContextManager[None]]
"""Shows the stage that runs, whose standing the function tells at any moment."""


class ShownProgress(StageProgress):
    """Writes what happens to `logger`. `bar` shows the stage that runs; without one, lines do. `clock` gives seconds."""

    def __init__(
        self,
        logger: logging.Logger,
        bar: Bar | None = None,
        clock: Callable[[], float] = time.perf_counter,
        life_seconds: float = LIFE_SECONDS,
    ) -> None:
        self._logger, self._bar, self._clock, self._life_seconds = logger, bar, clock, life_seconds
        self._began = clock()
        self._stage = self._stages = 0
        self._whole = WholeEstimate()
        self.ran = self.found = 0

    def expect(self, stages: int, predicted: Sequence[float] = ()) -> None:
        """So many stages are to come, cached ones included, with those that were; `predicted`: seconds of each, where known."""
        self._stages = stages
        self._whole = WholeEstimate(predicted if len(predicted) == stages else ())

    @contextmanager
    def stage(self, title: str) -> Iterator[Report]:
        """Show the stage `title` while the body runs, which may call the yielded `report(done, total)`."""
        number = self._next()
        began = self._clock()
        estimate, place = Estimate(began), ""

        def report(done: int, total: int, detail: str = "") -> None:
            nonlocal place
            place = detail
            estimate.report(self._clock(), done, total)

        def event(name: Name) -> Event:
            now = self._clock()
            if name != "runs":
                return Event(name, title, number, self._stages, seconds=now - began)
            left, elapsed = estimate.left(now), now - began
            all_left = self._whole.left(number, elapsed, left)
            done, total = estimate.done, estimate.total
            return Event(name, title, number, self._stages, done, total, place, elapsed, left, all_left)

        # A bar says all of this; then the lines are for the log file.
        level = logging.DEBUG if self._bar else logging.INFO
        self._write(level, event("begins"))
        bar = self._bar(lambda: event("runs")) if self._bar else nullcontext()
        completed = False
        try:
            with bar, _repeated(lambda: self._write(level, event("runs")), self._life_seconds):
                yield report
            completed = True
            self._whole.finished(number, self._clock() - began)
        finally:
            self._write(logging.INFO, event("done" if completed else "failed"))
        self.ran += 1

    def cached(self, title: str) -> None:
        """Show that the result of the stage `title` was already there."""
        number = self._next()
        self.found += 1
        self._write(logging.INFO, Event("cached", title, number, self._stages))

    def say(self, line: str) -> None:
        """Show a finding that must be seen."""
        self._logger.warning("%s", line)

    def note(self, line: str) -> None:
        """Show what is good to know, unless quiet."""
        self._logger.info("%s", line)

    def explain(self, line: str) -> None:
        """Show what only those want to see who look into the work."""
        self._logger.debug("%s", line)

    def finish(self, what: str, *next_steps: str) -> None:
        """Show what was done, how long it took and how much memory, and what can be done next, a line each."""
        stages = f"{self._stage} stages, {self.found} of them cached; " if self.found else ""
        peak = memory_peak()
        fields = {"event": "finished", "seconds": round(self.seconds, 3), "peak_memory_bytes": peak}
        line = f"{what} in {in_words(self.seconds)} ({stages}at most {bytes_in_words(peak)} of memory)"
        self._logger.info("%s", line, extra={"fields": fields})
        for step in next_steps:
            self._logger.info("%s", step)

    @property
    def seconds(self) -> float:
        """Seconds since the command began."""
        return self._clock() - self._began

    def _next(self) -> int:
        self._stage += 1
        self._stages = max(self._stages, self._stage) if self._stages else 0
        return self._stage

    def _write(self, level: int, event: Event) -> None:
        self._logger.log(level, "%s", event.line(), extra={"fields": event.fields()})


@contextmanager
def _repeated(tell: Callable[[], None], every: float) -> Iterator[None]:
    """Call `tell` every so many seconds while the body runs."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(every):
            tell()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
