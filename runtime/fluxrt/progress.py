"""How far `fluxrt generate` is: one bar where a person reads stderr, a line a stage where something else does.

The stages are to load the bundle and to generate each of the images. The time that is left is known from the first step on,
and counts from that step: what came before it, reading weights above all, does not come again.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
import time
from typing import TYPE_CHECKING

from fluxrt.log import write, write_to_stderr
from fluxrt.memory import resident

if TYPE_CHECKING:
    from typing import Self

    from fluxrt.log import Logs

LOG = logging.getLogger("fluxrt")
TICK = 0.5
"""Seconds between two looks of the bar."""
QUIET = 30.0
"""Seconds after which a line says that a stage still goes on."""
BAR = 20
"""Characters of the bar."""


class Progress:
    """Shows the progress of a request for `images` images while it is used in a `with` statement; `logs` is the command's.

    A thread moves the clock and looks at the memory while a step takes its time.
    """

    def __init__(self, logs: Logs, images: int) -> None:
        self._logs, self._images = logs, images
        self.draws = not logs.as_json and logs.threshold <= logging.INFO and _is_terminal()
        self.processes: list[int] = []
        self.most_memory = 0
        self._began = self._stage_began = self._said = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._image = self._done = self._total = 0
        self._is_loaded = self._drawn = False
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Self:
        if self.draws:
            self._logs.write = self._write_above
        self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._clock.join()
        self._logs.write = write_to_stderr
        self._clear()

    def loaded(self) -> None:
        """The bundle is loaded."""
        self._is_loaded = True
        self._end_stage("load", "load")

    def on_step(self, done: int, total: int) -> None:
        """So many of all steps of all images are done."""
        with self._lock:
            self._done, self._total = done, total
            self._first = self._first or (done, time.monotonic())
            self._draw()

    def on_image(self, name: str) -> None:
        """The next image is made and saved as `name`."""
        self._image += 1
        self._end_stage("image", f"image {self._image} of {self._images}: {name}")

    def print(self, text: str) -> None:
        """Print a line on stdout, not into the bar."""
        with self._lock:
            self._clear()
            write(text, sys.stdout)
            self._draw()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    def seconds_left(self) -> float | None:
        """Until the last step is done, at the pace since the first; None before the second."""
        if self._first is None or self._done <= self._first[0]:
            return None
        done, when = self._first
        pace = (time.monotonic() - when) / (self._done - done)
        return pace * (self._total - self._done)

    def _end_stage(self, stage: str, what: str) -> None:
        now = time.monotonic()
        number, count, took = self._image + 1, self._images + 1, now - self._stage_began
        fields = {"stage": stage, "number": number, "count": count, "seconds": round(took, 3)}
        self._stage_began = self._said = now
        # Where there is a bar it says as much; a log file gets the line all the same.
        level = logging.DEBUG if self.draws else logging.INFO
        LOG.log(level, "%d/%d %s, %s", number, count, what, shown_time(took), extra={"fields": fields})

    def _tick(self) -> None:
        while not self._ended.wait(TICK):
            with self._lock:
                self.most_memory = max(self.most_memory, resident(self.processes))
                if self.draws:
                    self._draw()
                elif time.monotonic() - self._said > QUIET:
                    self._said = time.monotonic()
                    LOG.info("%s", self._state(), extra={"fields": {"step": self._done, "steps": self._total}})

    def _state(self) -> str:
        """Where it is, in words."""
        stage = f"image {self._image + 1} of {self._images}" if self._is_loaded else "load"
        if self._image >= self._images:
            return "close"
        if not self._total:
            return f"{stage}, {_clock_time(self.seconds)}"
        left = self.seconds_left()
        rest = f", {_clock_time(left)} left" if left is not None else ""
        return f"{stage}, step {self._done} of {self._total}, {_clock_time(self.seconds)}{rest}"

    def _draw(self) -> None:
        if not self.draws or self._ended.is_set():
            return
        filled = BAR * self._done // self._total if self._total else 0
        memory = f", {self.most_memory / 2**30:.1f} GiB" if self.most_memory else ""
        line = f"[{'#' * filled}{'-' * (BAR - filled)}] {self._state()}{memory}"
        write("\r" + line[: shutil.get_terminal_size().columns - 1] + "\x1b[K", sys.stderr, end="")
        self._drawn = True

    def _clear(self) -> None:
        if self._drawn:
            write("\r\x1b[K", sys.stderr, end="")
            self._drawn = False

    def _write_above(self, text: str) -> None:
        with self._lock:
            self._clear()
            write_to_stderr(text)
            self._draw()


def shown_time(seconds: float) -> str:
    """0.42 s, 4.2 s, 42 s, 7:05, 1:02:03."""
    if seconds >= 59.5:
        return _clock_time(seconds)
    return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
