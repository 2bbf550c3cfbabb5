"""The step cache's parts: the rule against published ones, the fit, thresholds, schedules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from conftest import ROOT
from fluxc.base.errors import BuildError, CheckpointError
from fluxc.base.measured import Origin, write_measured
from fluxc.recipe.structs import LAGS, StepCache, most_skipped
from fluxc.stepcache.choose import make_step_cache
from fluxc.stepcache.file import KIND, read_trace
from fluxc.stepcache.fit import fit_polynomial, quality
from fluxc.stepcache.policy import (
    PUBLISHED,
    accumulated_error,
    average,
    best_schedules,
    find_threshold,
    knee,
    skipped_by,
)
from fluxc.stepcache.trace import StepTrace
from fluxrt.errors import BackendError, RequestError
from fluxrt.manifest import CacheRule
from fluxrt.stepcache import Decisions, decisions_for, skipped_steps

FLUX1 = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)


def nano_changes(which: str, field: str = "change") -> np.ndarray:
    """flux2-nano's changes over 50 steps, traced in fp32: 40 known prompts, 64 that the model never saw."""
    with np.load(ROOT / "tests" / "data" / "flux2-nano-changes.npz") as recorded:
        return recorded[f"{which}_{field}"].astype(np.float64)


def nano_trace(which: str = "known") -> StepTrace:
    changes = {field: nano_changes(which, field) for field in ("change", "residual_change", "latent_change")}
    images, steps = changes["change"].shape
    error = np.full((images, steps, LAGS), np.inf)
    for lag in range(LAGS):
        error[:, lag + 1 :, lag] = changes["residual_change"][:, lag + 1 :].mean(-1) * (lag + 1) ** 2 * 1e-2
    return StepTrace(**changes, residual_error=error, latent_error=error)


def with_changes(trace: StepTrace, **changes: np.ndarray) -> StepTrace:
    return StepTrace(**{**trace.__dict__, **changes})


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, request: tensors.pop("change"),
        lambda tensors, request: tensors.update(stray=np.zeros(1)),
        lambda tensors, request: tensors.update(images=np.array([7])),
        lambda tensors, request: tensors.update(change=np.zeros((1, 3))),
        lambda tensors, request: tensors.update(latent_error=np.zeros((2, 3))),
        lambda tensors, request: tensors.update(latent_change=np.full((2, 3, 1), np.nan)),
        lambda tensors, request: request.pop("prompts"),
        lambda tensors, request: request.update(prompts=3),
        lambda tensors, request: request.update(steps=4),
    ],
)
def test_a_trace_file_that_does_not_hold_together_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]
) -> None:
    request: dict[str, Any] = {"prompts": ["a", "b"], "steps": 3}
    tensors: dict[str, Any] = {name: np.zeros((2, 3, 1)) for name in ("residual_change", "latent_change")}
    tensors |= {name: np.zeros((2, 3, LAGS)) for name in ("residual_error", "latent_error")}
    tensors |= {"change": np.zeros((2, 3)), "images": np.arange(2)}
    write_measured(tmp_path / "trace", KIND, Origin({}, request, "cpu", {}), tensors)
    assert read_trace(tmp_path / "trace").images == [0, 1]
    change(tensors, request)
    write_measured(tmp_path / "trace", KIND, Origin({}, request, "cpu", {}), tensors)
    with pytest.raises(CheckpointError, match="trace: damaged: its trace is incomplete"):
        read_trace(tmp_path / "trace")


def authors_rule(coefficients: tuple[float, ...], threshold: float, changes: list[float]) -> list[int]:
    """TeaCache for FLUX.1, as its authors published it."""
    total, skipped = 0.0, []
    for step, change in enumerate(changes):
        if step in (0, len(changes) - 1):
            total = 0.0
            continue
        total += float(np.poly1d(coefficients)(change))
        if total < threshold:
            skipped.append(step)
        else:
            total = 0.0
    return skipped


def visual_gen_rule(coefficients: tuple[float, ...], threshold: float, changes: list[float], ret: bool) -> list[int]:
    """TensorRT-LLM VisualGen's: five or one warm-up steps, none or one at the end, the sum of magnitudes, capped."""
    warm_up, cutoff = (5, len(changes)) if ret else (1, len(changes) - 1)
    total, skipped = 0.0, []
    for step, change in enumerate(changes):
        if step < warm_up:
            total = 0.0
        elif step < cutoff:
            total = min(total + abs(float(np.poly1d(coefficients)(change))), 2.0 * threshold)
            if total < threshold:
                skipped.append(step)
            else:
                total = 0.0
    return skipped


def our_rule(rule: CacheRule, changes: list[float]) -> list[int]:
    """Ours: nothing below zero is added, and runs end after so many."""
    skipped: list[int] = []
    total = 0.0
    for step, change in enumerate(changes):
        window = set(range(step - (rule.max_consecutive_skips or len(changes)), step))
        free = rule.first <= step < len(changes) - rule.last and step > 0 and not window <= set(skipped)
        total = total + max(0.0, float(np.poly1d(rule.coefficients)(change))) if free else 0.0
        if free and total < rule.threshold:
            skipped.append(step)
        else:
            total = 0.0
    return skipped


@pytest.mark.parametrize("threshold", [0.02, 0.05, 0.2, 0.3, 1.0])
@pytest.mark.parametrize("coefficients", [PUBLISHED.coefficients, FLUX1, (-25.0, 9.0, 0.2, -0.004)])
def test_decisions_are_those_of_the_published_rules(coefficients: tuple[float, ...], threshold: float) -> None:
    signed = CacheRule(coefficients, threshold, negative="signed")
    warm = CacheRule(coefficients, threshold, first=5, last=0, negative="absolute")
    cold = CacheRule(coefficients, threshold, negative="absolute")
    ours = CacheRule(coefficients, threshold, first=2, last=3, max_consecutive_skips=2)
    for changes in nano_changes("unseen").tolist():
        assert skipped_steps(signed, changes) == authors_rule(coefficients, threshold, changes)
        assert skipped_steps(warm, changes) == visual_gen_rule(coefficients, threshold, changes, True)
        assert skipped_steps(cold, changes) == visual_gen_rule(coefficients, threshold, changes, False)
        assert skipped_steps(ours, changes) == our_rule(ours, changes)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 0.4), min_size=1, max_size=30),
    st.lists(st.floats(-5, 5), min_size=2, max_size=5),
    st.floats(0.001, 2.0),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(1, 4),
)
def test_our_rule_holds_for_any_changes(
    changes: list[float], coefficients: list[float], threshold: float, first: int, last: int, run: int
) -> None:
    rule = CacheRule(tuple(coefficients), threshold, first, last, run)
    assert skipped_steps(rule, changes) == our_rule(rule, changes)


def test_the_published_floor_keeps_low_thresholds_from_skipping() -> None:
    """The minimum of NVIDIA's cubic is .0453 (facts): under it nothing is skipped, with .05 never two in a row."""
    low = msgspec.structs.replace(PUBLISHED, threshold=0.0452)
    assert skipped_by(low, nano_changes("unseen")) == [[]] * 64
    for steps in skipped_by(msgspec.structs.replace(PUBLISHED, threshold=0.05), nano_changes("unseen")):
        assert all(later - step > 1 for step, later in itertools.pairwise(steps))


def test_a_change_that_is_not_a_number_ends_the_image() -> None:
    decisions = Decisions(10, CacheRule((1.0, 0.0), 0.1))
    assert decisions.skip(0, None) is False
    with pytest.raises(BackendError, match=r"step 1: the change .* is nan.*--no-step-cache"):
        decisions.skip(1, math.nan)


def test_the_fit_recovers_a_polynomial_from_noisy_points_with_outliers() -> None:
    random = np.random.default_rng(0)
    truth = (104.582360, 3.1, 0.4, 0.0137600252)
    x = random.uniform(0.01, 0.25, 2000)
    y = np.polyval(truth, x)
    y += random.normal(0, 0.002, len(x))
    y[:100] += random.uniform(0.5, 2.0, 100)
    grid = np.linspace(0.01, 0.25, 200)
    for constrained in (False, True):
        fit = fit_polynomial(x, y, 3, constrained)
        assert np.abs(fit(grid) - np.polyval(truth, grid)).max() < 0.002
    least_squares = np.polyval(np.polyfit(x, y, 3), grid)
    assert np.abs(least_squares - np.polyval(truth, grid)).max() > 0.02


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5])
def test_without_outliers_a_plain_fit_is_numpys(degree: int) -> None:
    x = np.linspace(0.01, 0.3, 40)
    y = np.polyval((3.0, -1.0, 0.5, 0.02), x) + 0.01 * np.sign(np.sin(np.arange(40) * 2.4))
    # Noise of one size keeps every point within Huber's bound where the degree suffices.
    fit = fit_polynomial(x, y, degree, False)
    if degree >= 3:
        np.testing.assert_allclose(fit(x), np.polyval(np.polyfit(x, y, degree), x), atol=1e-9)
    assert len(fit.coefficients) == degree + 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_the_constrained_fit_never_falls_and_is_never_negative(seed: int, degree: int) -> None:
    random = np.random.default_rng(seed)
    x = np.concatenate([random.uniform(0.005, 0.3, 60), random.choice([0.1, 0.2], 3)])
    y = np.polyval(random.normal(0, 3, degree + 1), x) + random.normal(0, 0.05, len(x))
    fit = fit_polynomial(x, y, degree, True)
    values = fit(np.linspace(*fit.range, 2000))
    size = max(np.abs(values).max(), np.abs(y).max())
    assert values.min() >= -1e-9 * size
    assert np.diff(values).min() >= -1e-9 * size


def test_the_constrained_fit_is_the_best_one_that_does_not_fall() -> None:
    """Against a general solver with the derivative bounded from below on a dense grid."""
    random = np.random.default_rng(3)
    x = np.sort(random.uniform(0.01, 0.2, 80))
    y = 0.05 + 0.02 * np.sin(30 * x) + 0.1 * x
    ours = fit_polynomial(x, y, 3, True)
    u, dense = (x - x[0]) / (x[-1] - x[0]), np.linspace(0, 1, 400)
    found = minimize(
        lambda c: float(np.square(np.polyval(c, u) - y).sum()),
        np.array([0.0, 0.0, 0.01, 0.05]),
        method="SLSQP",
        constraints=[{"type": "ineq", "fun": lambda c: np.polyval(np.polyder(np.poly1d(c)).coef, dense)}],
        options={"maxiter": 500, "ftol": 1e-14},
    )
    error = float(np.square(ours(x) - y).sum())
    assert error <= found.fun * 1.02
    assert np.square(np.polyval(np.polyfit(x, y, 3), x) - y).sum() < error


def test_quality_is_what_scikit_learn_would_say() -> None:
    x, y = np.arange(4.0), np.array([3.0, -0.5, 2.0, 7.0])
    fit = fit_polynomial(np.arange(4.0), np.array([2.5, 0.0, 2.0, 8.0]), 3, False)
    found = quality(fit, x, y)
    assert found.r2 == pytest.approx(0.9486081370449679)  # the example in sklearn.metrics.r2_score's documentation
    assert found.rmse == pytest.approx(math.sqrt(0.375))
    assert found.worst == pytest.approx(1.0)


def test_too_few_different_changes_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"3 different changes cannot fix the 4 coefficients"):
        fit_polynomial(np.array([0.1, 0.2, 0.3, 0.3]), np.ones(4), 3, True)


@pytest.mark.parametrize("skip", [8, 12, 16, 19, 25, 28])
@pytest.mark.parametrize("kind", ["constrained", "plain"])
def test_a_threshold_skips_as_many_steps_as_asked_on_prompts_it_never_saw(skip: float, kind: str) -> None:
    cache = make_step_cache(StepCache(skip=float(skip), fit=kind), nano_trace(), (64, 64), "dynamic")
    assert abs(average(skipped_by(cache.rule, nano_changes("unseen"))) - skip) <= 0.5
    assert abs(average(skipped_by(cache.visual_gen, nano_changes("unseen"))) - skip) <= 0.5
    assert cache.fit["residual"]["r2"] > 0.9
    assert cache.fit["prompts"] == {"fitted": 30, "held_out": 10}


def test_coefficients_for_visual_gen_reproduce_its_decisions() -> None:
    cache = make_step_cache(StepCache(skip=16.0), nano_trace(), (64, 64))
    rule = cache.visual_gen
    for changes in nano_changes("unseen").tolist():
        theirs = visual_gen_rule(rule.coefficients, rule.threshold, changes, False)
        assert skipped_steps(rule, changes) == theirs
        assert len(theirs) > 10


def test_thresholds_have_no_more_digits_than_decisions_need() -> None:
    changes = nano_changes("known")
    rule = find_threshold(PUBLISHED, changes, 16)
    found = average(skipped_by(rule, changes))
    assert abs(found - 16) < 0.5
    digits = len(repr(rule.threshold).lstrip("0.")) - 1
    shorter = msgspec.structs.replace(rule, threshold=float(f"{rule.threshold:.{digits}g}"))
    assert average(skipped_by(shorter, changes)) != found


def test_the_best_schedule_is_the_best_of_all() -> None:
    """Against every set of steps there is."""
    random = np.random.default_rng(1)
    steps, first, last, run = 9, 2, 1, 3
    error = random.uniform(0.1, 1.0, (5, steps, LAGS)) * np.arange(1, LAGS + 1)
    found = best_schedules(error, first, last, run)
    every: dict[int, float] = {}
    for count in range(steps):
        for skipped in itertools.combinations(range(first, steps - last), count):
            on = [step in skipped for step in range(steps)]
            runs = [len(list(group)) for skips, group in itertools.groupby(on) if skips]
            if not runs or max(runs) <= run:
                cost = accumulated_error([list(skipped)] * 5, error)
                every[count] = min(every.get(count, math.inf), cost)
    assert {count: round(total, 9) for count, (_, total) in found.items()} == {c: round(e, 9) for c, e in every.items()}
    for count, (schedule, total) in found.items():
        assert len(schedule) == count
        assert accumulated_error([list(schedule)] * 5, error) == pytest.approx(total)
    assert max(found) == most_skipped(steps, first, last, run)


def test_the_knee_is_where_the_curve_turns_up() -> None:
    assert knee([0, 1, 2, 3, 4, 5, 15, 25, 35]) == 5
    assert knee([0.0]) == 0


def test_what_cannot_be_fitted_or_skipped_is_said() -> None:
    trace = nano_trace()
    shuffled = with_changes(trace, residual_change=np.random.default_rng(0).permuted(trace.residual_change, axis=1))
    with pytest.raises(BuildError, match=r"fit explains too little: on 10 held-out prompts its R2 is .*min_r2 0\.3"):
        make_step_cache(StepCache(skip=16.0), shuffled, (64, 64))
    with pytest.raises(BuildError, match=r"nothing can be skipped under step_cache\.max_error 1e-09: one step alone"):
        make_step_cache(StepCache(max_error=1e-9), trace, (64, 64))


def test_max_error_and_auto_choose_on_the_curve() -> None:
    trace = nano_trace()
    by_error = make_step_cache(StepCache(max_error=0.01), trace, (64, 64))
    curve = by_error.fit["curve"]
    assert curve[len(by_error.schedule)] <= 0.01 < curve[len(by_error.schedule) + 1]
    auto = make_step_cache(StepCache(skip="auto"), trace, (64, 64))
    assert len(auto.schedule) == knee(auto.fit["curve"])
    dynamic = make_step_cache(StepCache(max_error=0.05, mode="dynamic"), trace, (64, 64))
    assert dynamic.mode == "dynamic"
    assert 0 < dynamic.fit["skipped"]["dynamic"]["fitted"] < 40


def test_requests_that_the_cache_was_not_fitted_for_do_as_the_bundle_says() -> None:
    cache = make_step_cache(StepCache(skip=16.0), nano_trace(), (64, 64))
    served, note = decisions_for(cache, 50, (64, 64))
    assert served is not None
    assert served.rule is None
    assert note is None
    served, note = decisions_for(cache, 30, (64, 64))
    assert served is not None
    assert served.rule == cache.rule
    assert note == (
        "the step cache was fitted to 50 steps at 64x64, not to 30 at 64x64: its rule decides all the same, and how well "
        "it does so there was not measured"
    )
    silent = msgspec.structs.replace(cache, on_mismatch="allow")
    assert decisions_for(silent, 50, (64, 128))[1] is None
    strict = msgspec.structs.replace(cache, on_mismatch="refuse")
    with pytest.raises(RequestError, match=r"not to 30 at 64x64; ask for those, or give --no-step-cache"):
        decisions_for(strict, 30, (64, 64))
    assert decisions_for(strict, 30, (64, 64), enabled=False) == (None, None)
    assert decisions_for(None, 30, (64, 64)) == (None, None)
    served, _ = decisions_for(cache, 50, (64, 64), threshold=0.07)
    assert served is not None
    assert served.rule == msgspec.structs.replace(cache.rule, threshold=0.07)
    with pytest.raises(RequestError, match="this bundle has no step cache"):
        decisions_for(None, 50, (64, 64), threshold=0.1)
