"""The step cache: which denoising steps reuse the last computed residual instead of running the body.

The dynamic rule is TeaCache's (Liu et al. 2024): a polynomial turns the change of the first block's modulated input into the
change to be expected of the residual; changes add up, and a step is skipped while their sum stays under a threshold.

1. The first and the last steps are computed, and so is a step after as many skipped ones as a run may have.
2. Any other step adds the polynomial's value for its change, which counts as nothing where it is negative, to the sum.
3. While the sum is under the threshold the step is skipped; otherwise it is computed, and the sum starts from nothing again.

The static schedule lists the skipped steps outright. Either way one decision holds for both guidance branches and all ranks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fluxrt.errors import BackendError, RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fluxrt.manifest import CacheRule, StepCache


class Decisions:
    """The decisions of one image of `steps` steps, asked for in order: by `rule`, or by `schedule`, the steps to skip."""

    def __init__(self, steps: int, rule: CacheRule | None, schedule: Iterable[int] = ()) -> None:
        self.steps, self.rule = steps, rule
        self._schedule = frozenset(schedule)
        self._sum, self._run = 0.0, 0

    def needs_change(self, step: int) -> bool:
        """Whether the decision on `step` depends on the change; where it does not, nothing waits for the GPU."""
        rule = self.rule
        if rule is None or step == 0 or step < rule.first or step >= self.steps - rule.last:
            return False
        return rule.max_consecutive_skips is None or self._run < rule.max_consecutive_skips

    def skip(self, step: int, change: float | None) -> bool:
        """Whether `step` is skipped; `change` is the relative change of its signal, not looked at where needs_change says no.

        Raises BackendError for a change that is not a number.
        """
        if self.rule is None:
            return step in self._schedule
        if not self.needs_change(step):
            self._sum, self._run = 0.0, 0
            return False
        if change is None or not math.isfinite(change):
            raise BackendError(
                f"step {step}: the change of the step cache's signal is {change}; the image has gone wrong, or the bundle; "
                "generate it with --no-step-cache and check the bundle with `fluxc verify`"
            )
        self._sum += self._expected(change, self.rule)
        if self._sum < self.rule.threshold:
            self._run += 1
            return True
        self._sum, self._run = 0.0, 0
        return False

    def _expected(self, change: float, rule: CacheRule) -> float:
        value = evaluate(rule.coefficients, change)
        if rule.negative == "absolute":
            # VisualGen also caps the sum at twice the threshold, which no decision depends on.
            return abs(value)
        return max(value, 0.0) if rule.negative == "zero" else value


def evaluate(coefficients: tuple[float, ...], x: float) -> float:
    """A polynomial, highest degree first, at `x` (Horner)."""
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


def skipped_steps(rule: CacheRule, changes: list[float]) -> list[int]:
    """The steps `rule` skips of an image whose steps changed so much; the first change is not looked at."""
    decisions = Decisions(len(changes), rule)
    return [step for step, change in enumerate(changes) if decisions.skip(step, change)]


def decisions_for(
    cache: StepCache | None,
    steps: int,
    size: tuple[int, int],
    enabled: bool | None = None,
    threshold: float | None = None,
) -> tuple[Decisions | None, str | None]:
    """How a request is cached, or None; and a note for who asked, or None.

    `enabled` None takes the cache where the bundle has one; `threshold` asks for the dynamic rule with another one. A static
    schedule holds for the steps and size it was made for; elsewhere the rule decides, if the bundle lets it. Raises
    RequestError.
    """
    import msgspec

    if enabled is False or (cache is None and not enabled and threshold is None):
        return None, None
    if cache is None:
        raise RequestError(
            "this bundle has no step cache; leave --threshold out, or add step_cache to the recipe and build again"
        )
    note = None
    fitted = steps == cache.steps and tuple(size) == tuple(cache.size)
    if not fitted:
        height, width = cache.size
        what = f"the step cache was fitted to {cache.steps} steps at {height}x{width}, not to {steps} at {size[0]}x{size[1]}"
        if cache.on_mismatch == "refuse":
            raise RequestError(f"{what}; ask for those, or give --no-step-cache")
        if cache.on_mismatch == "warn":
            note = f"{what}: its rule decides all the same, and how well it does so there was not measured"
    if cache.mode == "static" and fitted and threshold is None:
        return Decisions(steps, None, cache.schedule), note
    rule = cache.rule if threshold is None else msgspec.structs.replace(cache.rule, threshold=threshold)
    return Decisions(steps, rule), note
