"""Fits the polynomial from a step's change to the change of its residual: robust least squares, if asked without a fall.

Published polynomials fall over part of their range, so a smaller change can cost more, and a floor under them keeps low
thresholds from ever skipping. The constrained fit is non-negative and non-decreasing between the smallest and the largest
change observed: its Bernstein coefficients there, after degree elevation, start at or above zero and never fall, which
suffices (a Bernstein polynomial's derivative has the coefficients' differences as its own). Least squares under linear
inequalities is solved exactly, as the least distance problem it comes to (Lawson and Hanson 1974, chapter 23).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import Polynomial

ELEVATED = 24
HUBER = 1.345
"""Residuals beyond this many standard deviations count linearly; 95 % as efficient as plain least squares on clean data."""


@dataclass(frozen=True)
class Fit:
    """`coefficients`, highest degree first, and the `range` of changes they were fitted on."""

    coefficients: tuple[float, ...]
    range: tuple[float, float]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        values: np.ndarray = np.polyval(np.array(self.coefficients), x)
        return values


@dataclass(frozen=True)
class Quality:
    """How a fit does on points: share of the variance it explains, root mean square error, largest error."""

    r2: float
    rmse: float
    worst: float


def fit_polynomial(x: np.ndarray, y: np.ndarray, degree: int, constrained: bool) -> Fit:
    """The polynomial of `degree` through points (x, y), float64 [n]; outliers pull linearly (Huber's weights, reiterated).

    Raises ValueError where there are fewer different x than coefficients.
    """
    low, high = float(x.min()), float(x.max())
    if len(np.unique(x)) <= degree:
        raise ValueError(
            f"{len(np.unique(x))} different changes cannot fix the {degree + 1} coefficients of degree {degree}"
        )
    basis = _bernstein((x - low) / (high - low), degree)
    solve = _monotone if constrained else _plain
    weights = np.ones_like(y)
    for _ in range(50):
        root = np.sqrt(weights)
        solution = solve(basis * root[:, None], y * root)
        residual = np.abs(y - basis @ solution)
        spread = 1.4826 * float(np.median(residual))
        if spread < 1e-12 * max(float(np.abs(y).max()), 1e-300):
            break
        new = np.minimum(1.0, HUBER * spread / np.maximum(residual, 1e-300))
        if np.abs(new - weights).max() < 1e-9:
            break
        weights = new
    return Fit(_power_form(solution, low, high), (low, high))


def quality(fit: Fit, x: np.ndarray, y: np.ndarray) -> Quality:
    """How well `fit` predicts `y` from `x`; R2 is relative to the mean of these very points, and 0 where `y` is
    constant."""
    errors = y - fit(x)
    total = float(np.square(y - y.mean()).sum())
    r2 = 1 - float(np.square(errors).sum()) / total if total > 0 else 0.0
    return Quality(r2, float(np.sqrt(np.square(errors).mean())), float(np.abs(errors).max()))


def _bernstein(u: np.ndarray, degree: int) -> np.ndarray:
    """The Bernstein polynomials of `degree` at `u` in 0..1: [n, degree + 1]."""
    ks = np.arange(degree + 1)
    choose = np.array([math.comb(degree, k) for k in ks], np.float64)
    basis: np.ndarray = choose * u[:, None] ** ks * (1 - u[:, None]) ** (degree - ks)
    return basis


def _plain(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    solution: np.ndarray = np.linalg.lstsq(matrix, target, rcond=None)[0]
    return solution


def _monotone(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Bernstein coefficients c that minimise |matrix c - target| while the elevated ones start at 0 or more and never fall."""
    from scipy.optimize import nnls

    elevated = _elevation(matrix.shape[1] - 1, ELEVATED)
    bounds = np.vstack([elevated[:1], np.diff(elevated, axis=0)])
    q, r = np.linalg.qr(matrix)
    # With z = r c - q'target: the shortest z for which bounds c >= 0.
    inverse = np.linalg.inv(r)
    unbounded = inverse @ (q.T @ target)
    g, h = bounds @ inverse, -(bounds @ unbounded)
    system, ask = np.vstack([g.T, h]), np.zeros(g.shape[1] + 1)
    ask[-1] = 1.0
    multipliers, distance = nnls(system, ask)
    if distance < 1e-14:
        raise ValueError("no polynomial of this degree is non-negative and non-decreasing on the range")
    gap = system @ multipliers - ask
    shortest: np.ndarray = -gap[:-1] / gap[-1]
    return unbounded + inverse @ shortest


def _elevation(degree: int, to: int) -> np.ndarray:
    """The matrix from Bernstein coefficients of `degree` to those of the same polynomial at degree `to`."""
    matrix = np.eye(degree + 1)
    for n in range(degree, to):
        step = np.zeros((n + 2, n + 1))
        for i in range(n + 2):
            if i > 0:
                step[i, i - 1] = i / (n + 1)
            if i <= n:
                step[i, i] = 1 - i / (n + 1)
        matrix = step @ matrix
    return matrix


def _power_form(coefficients: np.ndarray, low: float, high: float) -> tuple[float, ...]:
    """Bernstein coefficients on low..high as plain ones, highest degree first."""
    degree = len(coefficients) - 1
    u = Polynomial([-low / (high - low), 1 / (high - low)])
    total = Polynomial([0.0])
    for k, coefficient in enumerate(coefficients):
        total = total + coefficient * math.comb(degree, k) * u**k * (1 - u) ** (degree - k)
    plain = np.zeros(degree + 1)
    plain[: len(total.coef)] = total.coef
    return tuple(float(value) for value in plain[::-1])
