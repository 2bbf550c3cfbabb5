"""From a trace to the bundle's step cache: fits judged on held-out images, threshold and schedule for what was asked.

1. Every fourth image is held out: the polynomials and the threshold are found without it, and judged on it.
2. How many steps to skip comes from the recipe: a number, the most under an accumulated error, or the knee of the curve.
3. The rule's threshold skips that many on average; the schedule skips just that many. The mode says which of them serves.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from fluxc.base.errors import BuildError
from fluxc.base.numbers import significant
from fluxc.recipe.structs import StepCache as Settings
from fluxc.stepcache.fit import Fit, fit_polynomial, quality
from fluxc.stepcache.policy import accumulated_error, average, best_schedules, find_threshold, knee, skipped_by
from fluxc.stepcache.trace import StepTrace
from fluxrt.manifest import CacheRule, StepCache

HELD_OUT = 4
BINS = 10


def make_step_cache(settings: Settings, trace: StepTrace, size: tuple[int, int], mode: str | None = None) -> StepCache:
    """The step cache of images of `size` (height, width) in as many steps as `trace` has.

    Raises BuildError where the fit explains too little, or nothing can be skipped under `max_error`.
    """
    held = [number for number in range(trace.images) if number % HELD_OUT == HELD_OUT - 1]
    known = trace.of([number for number in range(trace.images) if number not in held])
    unknown = trace.of(held)
    residual, residual_quality = _fit(settings, known, unknown, "residual_change")
    latent, latent_quality = _fit(settings, known, unknown, "latent_change")
    if not residual_quality["r2"] >= settings.min_r2:
        raise BuildError(
            f"step cache: the fit explains too little: on {len(held)} held-out prompts its R2 is {residual_quality['r2']}, "
            f"under step_cache.min_r2 {settings.min_r2}. Give more prompts, another step_cache.degree, or lower min_r2; "
            "step_cache.mode: static does not use the polynomial where steps and size are those traced"
        )
    limits = (settings.first, settings.last, settings.max_consecutive_skips)
    rule = CacheRule(residual.coefficients, 0.0, *limits)
    schedules = best_schedules(known.residual_error, *limits)
    mode = mode or settings.mode
    if mode == "static":
        curve = [error for _, error in schedules.values()]
    else:
        rules = [find_threshold(rule, known.change, count) for count in schedules]
        curve = [accumulated_error(skipped_by(r, known.change), known.residual_error) for r in rules]
    count = _asked(settings, curve)
    rule = find_threshold(rule, known.change, count)
    schedule = schedules[round(count)][0]
    visual_gen = find_threshold(
        CacheRule(latent.coefficients, 0.0, first=1, last=1, negative="absolute"), known.change, count
    )
    dynamic = skipped_by(rule, unknown.change)
    fixed = [list(schedule)] * len(held)
    fit = {
        "degree": settings.degree,
        "kind": settings.fit,
        "prompts": {"fitted": known.images, "held_out": unknown.images},
        "range": [significant(bound) for bound in residual.range],
        "residual": residual_quality,
        "latent": latent_quality,
        "asked": {"skip": settings.skip, "max_error": settings.max_error},
        "skipped": {
            "dynamic": {
                "fitted": round(average(skipped_by(rule, known.change)), 2),
                "held_out": round(average(dynamic), 2),
            },
            "static": len(schedule),
            "visual_gen": {"held_out": round(average(skipped_by(visual_gen, unknown.change)), 2)},
        },
        "accumulated_error": {
            "dynamic": significant(accumulated_error(dynamic, unknown.residual_error)),
            "static": significant(accumulated_error(fixed, unknown.residual_error)),
        },
        "curve": [significant(error) for error in curve],
        "occurrences": occurrences(trace),
    }
    return StepCache(
        mode="static" if mode == "static" else "dynamic",
        rule=rule,
        schedule=schedule,
        steps=trace.steps,
        size=size,
        on_mismatch=settings.on_mismatch,
        visual_gen=visual_gen,
        fit=fit,
    )


def with_reference(cache: StepCache, settings: Settings, trace: StepTrace, other: StepTrace) -> StepCache:
    """`cache`, which was made of `trace`, with what `other`, the trace of the checkpoint's own model, makes for as many skipped
    steps: in `fit["reference"]`, with the error that skipping so has on the held-out images of `trace`.

    BuildError where nothing can be fitted to `other` either; how well it fits is not held to `min_r2`.
    """
    asked = msgspec.structs.replace(settings, skip=float(len(cache.schedule)), max_error=None, min_r2=-1e9)
    found = make_step_cache(asked, other, cache.size, cache.mode)
    unknown = trace.of([number for number in range(trace.images) if number % HELD_OUT == HELD_OUT - 1])
    dynamic, fixed = skipped_by(found.rule, unknown.change), [list(found.schedule)] * unknown.images
    reference = {
        "residual": found.fit["residual"],
        "latent": found.fit["latent"],
        "rule": msgspec.to_builtins(found.rule),
        "visual_gen": msgspec.to_builtins(found.visual_gen),
        "schedule": list(found.schedule),
        "skipped": {"dynamic": round(average(dynamic), 2), "static": len(found.schedule)},
        "accumulated_error": {
            "dynamic": significant(accumulated_error(dynamic, unknown.residual_error)),
            "static": significant(accumulated_error(fixed, unknown.residual_error)),
        },
    }
    return msgspec.structs.replace(cache, fit=cache.fit | {"reference": reference})


def points(trace: StepTrace, level: str) -> tuple[np.ndarray, np.ndarray]:
    """(changes, changes of the residual as the mean over branches) of every step but the first, float64 [n] each."""
    return trace.change[:, 1:].ravel(), getattr(trace, level)[:, 1:].mean(axis=-1).ravel()


def occurrences(trace: StepTrace) -> list[dict[str, Any]]:
    """How often changes of each size occurred, in bins of equal ratio, and the residuals' mean change there by branch."""
    changes = trace.change[:, 1:].ravel()
    residual = trace.residual_change[:, 1:].reshape(len(changes), -1)
    edges = np.geomspace(max(float(changes.min()), 1e-9), max(float(changes.max()), 2e-9), BINS + 1)
    bins = np.digitize(changes, edges[1:-1])
    return [
        {
            "change": [significant(float(edges[at])), significant(float(edges[at + 1]))],
            "count": int((bins == at).sum()),
            "residual": [significant(float(value)) for value in residual[bins == at].mean(axis=0)],
        }
        for at in range(BINS)
        if (bins == at).any()
    ]


def _fit(settings: Settings, known: StepTrace, unknown: StepTrace, level: str) -> tuple[Fit, dict[str, Any]]:
    """The fit of `level` on the known images, and how it does on the unknown ones, also by branch."""
    try:
        fit = fit_polynomial(*points(known, level), settings.degree, settings.fit == "constrained")
    except ValueError as error:
        raise BuildError(f"step cache: {error}; lower step_cache.degree, or give more prompts") from error
    x, y = points(unknown, level)
    found = quality(fit, x, y)
    branches = getattr(unknown, level)[:, 1:].reshape(len(x), -1).T
    return fit, {
        "coefficients": list(fit.coefficients),
        **{name: significant(value) for name, value in found.__dict__.items()},
        "r2_by_branch": [significant(quality(fit, x, branch).r2) for branch in branches],
    }


def _asked(settings: Settings, curve: list[float]) -> float:
    """How many steps to skip; `curve` is the accumulated error for 0, 1, 2, ... of them."""
    if settings.max_error is not None:
        under = [count for count, error in enumerate(curve) if error <= settings.max_error]
        if under[-1] == 0:
            raise BuildError(
                f"step cache: nothing can be skipped under step_cache.max_error {settings.max_error}: one step alone costs "
                f"{curve[1] if len(curve) > 1 else float('nan'):.3g}; raise it, or leave step_cache out"
            )
        return under[-1]
    if settings.skip is None or settings.skip == "auto":
        return knee(curve)
    if round(settings.skip) >= len(curve):
        raise BuildError(
            f"step cache: step_cache.skip {settings.skip} is more than can be skipped with these first, last and "
            "max_consecutive_skips: "
            f"{len(curve) - 1}"
        )
    return float(settings.skip)
