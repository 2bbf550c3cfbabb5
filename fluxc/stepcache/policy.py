"""From a trace and a rule to a policy: thresholds for an average number of skipped steps, the best fixed schedule, the knee.

Every policy is judged on the trace by the same figure, the accumulated error: the sum over skipped steps of how far each
throws the latents off (root mean square), averaged over images. It bounds the error of the final latents to first order.
"""

from __future__ import annotations

import msgspec
import numpy as np

from fluxrt.manifest import CacheRule
from fluxrt.stepcache import skipped_steps

BISECTIONS = 32
PUBLISHED = CacheRule((104.582360, -6.87605554, -0.0861659379, 0.0537600252), 0.05, negative="signed")
"""NVIDIA's rule for FLUX.2-dev (TensorRT-LLM, January 2026)."""


def skipped_by(rule: CacheRule, change: np.ndarray) -> list[list[int]]:
    """The steps `rule` skips of each image; `change` float64 [images, steps]."""
    return [skipped_steps(rule, [float(value) for value in row]) for row in change]


def average(skipped: list[list[int]]) -> float:
    """Skipped steps an image."""
    return float(np.mean([len(steps) for steps in skipped]))


def find_threshold(rule: CacheRule, change: np.ndarray, skip: float) -> CacheRule:
    """`rule` with the threshold whose average of skipped steps over the images is nearest to `skip`, the lowest of equals."""
    found: dict[float, float] = {}

    def at(threshold: float) -> float:
        if threshold not in found:
            found[threshold] = average(skipped_by(msgspec.structs.replace(rule, threshold=threshold), change))
        return found[threshold]

    low, high = 0.0, 1e-3
    while at(high) < skip and high < 1e6:
        low, high = high, high * 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle) < skip else (low, middle)
    # Digits that no decision depends on would only differ between machines.
    nearest = min(found, key=lambda threshold: (abs(at(threshold) - skip), threshold))
    for digits in range(3, 17):
        short = float(f"{nearest:.{digits}g}")
        if at(short) == at(nearest):
            return msgspec.structs.replace(rule, threshold=short)
    return msgspec.structs.replace(rule, threshold=nearest)


def accumulated_error(skipped: list[list[int]], error: np.ndarray) -> float:
    """The accumulated error of these decisions; `error` [images, steps, lags] as in StepTrace, `skipped` by image."""
    totals = []
    for steps, of_image in zip(skipped, error, strict=True):
        total, last = 0.0, -2
        lag = 0
        for step in steps:
            lag = lag + 1 if step == last + 1 else 1
            total += float(of_image[step, lag - 1]) if lag <= of_image.shape[1] else float("inf")
            last = step
        totals.append(total)
    return float(np.mean(totals))


def best_schedules(
    error: np.ndarray, first: int, last: int, max_consecutive_skips: int
) -> dict[int, tuple[tuple[int, ...], float]]:
    """By number of skipped steps, the schedule with the least accumulated error, and that error.

    `error` [images, steps, lags]. A shortest path from computed step to computed step, exact: the cost of a run of skips
    depends on nothing but where it starts and ends.
    """
    mean = error.mean(axis=0)
    steps = len(mean)
    first = max(first, 1)
    # best[step][skipped]: least cost of reaching the computed `step`, and the computed step before it.
    best: list[dict[int, tuple[float, int]]] = [{} for _ in range(steps + 1)]
    best[0] = {0: (0.0, -1)}
    for step in range(steps):
        cost = 0.0
        for to in range(step + 1, min(step + max_consecutive_skips + 1, steps) + 1):
            between = to - step - 1
            if between:
                skipped = to - 1
                if skipped < first or skipped >= steps - last:
                    break
                cost += float(mean[skipped, between - 1])
            for count, (before, _) in best[step].items():
                candidate = (before + cost, step)
                if count + between not in best[to] or candidate < best[to][count + between]:
                    best[to][count + between] = candidate
    found = {}
    for count, (total, _) in sorted(best[steps].items()):
        computed, at, left = [], steps, count
        while at > 0:
            before = best[at][left][1]
            left -= at - before - 1
            computed.append(before)
            at = before
        found[count] = (tuple(step for step in range(steps) if step not in computed), total)
    return found


def knee(errors: list[float]) -> int:
    """Where the curve of accumulated errors for 0, 1, 2, ... skipped steps turns up: furthest under its chord
    (Satopaa et al. 2011, on the whole range)."""
    curve = np.array(errors)
    if len(curve) < 3 or not curve[-1] > 0:
        return len(curve) - 1
    chord = np.linspace(curve[0], curve[-1], len(curve))
    return int(np.argmax(chord - curve))
