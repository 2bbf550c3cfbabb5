"""What work tells of itself: stages, how far each is, and findings. Nothing is shown here; `shown.py` does that.

Every stage imports this module, so it changes rarely: its code is part of every stage's key in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol


class Report(Protocol):
    """Called with what is done, of how much, and a few words that are shown beside the bar."""

    def __call__(self, done: int, total: int, detail: str = "") -> None: ...


class OfSteps:
    """Counts what generating images comes to: so many texts to encode, each as much work as a step, then steps of images."""

    def __init__(self, report: Report | None, texts: int, images: int, steps: int) -> None:
        self._report, self._texts, self._images, self._steps = report, texts, images, steps
        self._encoded = self._stepped = self._furthest = 0

    def text(self) -> None:
        """One more text is encoded."""
        self._encoded += 1
        self._tell()

    def texts_are_done(self) -> None:
        """All texts are encoded, now or before."""
        self._encoded = self._texts
        self._tell()

    def step(self) -> None:
        """One more step of one image is done."""
        self._stepped += 1
        self._tell()

    def images_are_done(self, count: int) -> None:
        """So many more images were made before."""
        self._stepped += count * self._steps
        self._tell()

    def layer(self, share: float, calls: int) -> None:
        """So many texts or steps of images, side by side, have done this share of their layers."""
        self._tell(share * calls)

    def _tell(self, begun: float = 0) -> None:
        if self._report is None:
            return
        detail = f"step {self._stepped}/{self._images * self._steps} of {self._images} images"
        if self._encoded < self._texts:
            detail = f"text {self._encoded}/{self._texts}"
        total = self._texts + self._images * self._steps
        # Calls side by side end one after the other, all of them after their last layer was counted.
        self._furthest = max(self._furthest, int(1000 * (self._encoded + self._stepped + begun)))
        self._report(self._furthest, 1000 * total, detail)


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
