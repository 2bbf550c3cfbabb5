"""At which states of which images errors of the velocity are measured: a few prompts of calibration, a few steps of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

PROMPTS, STEPS = 4, 4


def evenly(count: int, wanted: int) -> list[int]:
    """At most `wanted` numbers below `count`, from the first to the last at even distances."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, wanted)).round()})


def measured_on(prompts: int, steps: int, most_steps: int = STEPS) -> dict[str, Any]:
    """How many prompts, and which steps, are measured of so many; of steps at most `most_steps`."""
    return {"prompts": len(evenly(prompts, PROMPTS)), "steps": evenly(steps, most_steps)}


def at_every_step(values: Sequence[float] | np.ndarray, measured: Sequence[int], steps: int) -> np.ndarray:
    """What was found at the `measured` ones of `steps` steps, at each of them; between those linear in the step."""
    return np.interp(np.arange(steps), measured, values)
