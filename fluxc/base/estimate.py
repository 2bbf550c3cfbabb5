"""How long a stage has left, from what it reported, and all stages, from what was predicted of them."""

from __future__ import annotations

from collections.abc import Sequence

MANY = 20
DOUBT_SECONDS = 30.0
"""So long must stages have taken before what they took counts as much as the prediction."""
MOST_WRONG = 4.0


class Estimate:
    """Times are seconds of one clock, `began` that of the stage's begin.

    The pace is that of the later half of the time so far: what was there already and took no time, such as prompts that an
    interrupted run had finished, does not count for long. The first unit has what is done once with it, such as loading the
    model; it counts only until there is a second one, and of MANY units not at all.
    """

    def __init__(self, began: float) -> None:
        self.done, self.total = 0, 0
        self._began = began
        self._samples = [(began, 0)]

    def report(self, now: float, done: int, total: int) -> None:
        """`done` of `total` units are done at `now`."""
        self.total = total
        if done != self.done:
            self.done = done
            self._samples.append((now, done))
        middle = (self._began + now) / 2
        while len(self._samples) > 2 and (self._samples[0][1] == 0 or self._samples[1][0] <= middle):
            del self._samples[0]

    def left(self, now: float) -> float | None:
        """Seconds that are left at `now`; None where nothing is known."""
        (first, before), (last, done) = self._samples[0], self._samples[-1]
        if done <= before or last <= first or (before == 0 and self.total >= MANY):
            return None
        return max(0.0, (self.total - done) * (last - first) / (done - before) - (now - last))


class WholeEstimate:
    """What is left of stages that were `predicted` to take so many seconds, corrected by what those that ran took.

    Stages are numbered from 1. Without a prediction for each stage nothing is known.
    """

    def __init__(self, predicted: Sequence[float] = ()) -> None:
        self._predicted = list(predicted)
        self._took = self._expected = DOUBT_SECONDS

    def finished(self, number: int, seconds: float) -> None:
        """Stage `number` ran and took so long."""
        if number <= len(self._predicted):
            self._took += seconds
            self._expected += self._predicted[number - 1]

    def left(self, number: int, elapsed: float, stage_left: float | None) -> float | None:
        """Seconds until the last stage is done, while stage `number` has run for `elapsed` and has `stage_left` to go.

        `stage_left` is None where it is not known; so is the result, and in the last stage, whose own time left says it.
        """
        if not 1 <= number < len(self._predicted):
            return None
        factor = min(MOST_WRONG, max(1 / MOST_WRONG, self._took / self._expected))
        if stage_left is None:
            stage_left = max(0.0, factor * self._predicted[number - 1] - elapsed)
        return stage_left + factor * sum(self._predicted[number:])


def in_words(seconds: float) -> str:
    """A duration as people say it: "0.4 s", "48 s", "3 min 5 s", "2 h 10 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def as_clock(seconds: float) -> str:
    """A duration for a place where it changes: "0:48", "3:05", "2:10:00"."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
