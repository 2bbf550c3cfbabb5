"""The choice of formats of layers under a limit: a mixed-integer program with one option for each group of layers.

Squared errors of groups add up, nearly; so do times and weights. Groups in a format whose inputs are rounded may leave them as
they are at some of the steps, and some steps may be skipped. How many steps these are holds for all groups: each pair of
numbers, a `Setting`, is a program of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from fluxc.base.console import stdout_apart

POINTS = 9
"""Of the frontier, from the fastest choice to the most accurate."""

GAP = 1e-3
"""How far from the best a choice may be, as a part of what it is the least of: far less than what measuring is good for."""

Axis = Literal["seconds", "weights"]


@dataclass(frozen=True)
class Option:
    """A format of a group: what it adds to the squared error, to a step's seconds (on average over steps) and to the bytes of
    weights. `is_exact`: its inputs are left as they are at the steps that are for that."""

    format: str
    cost: float
    seconds: float
    weights: float
    is_exact: bool = False


@dataclass(frozen=True)
class Limits:
    """The most that all groups may add up to; None: no limit."""

    cost: float | None = None
    seconds: float | None = None
    weights: float | None = None


EVERYTHING = Limits()
Groups = list[list[Option]]
Setting = tuple[int, int]
"""How many steps of an image are skipped, and at how many of the others inputs are left as they are."""
Space = Mapping[Setting, Groups]
"""The options of every group."""
Picks = list[int]
"""Of each group the number of the option that is taken."""
Choice = tuple[Setting, Picks]


def choose(groups: Groups, limits: Limits, axis: Axis = "seconds") -> Picks | None:
    """The choice of least error under limits of time and weights, or, under one of error, of least time or weights (`axis`),
    to GAP; None where none is under them."""
    program = _Program(groups, limits, axis)
    found = program.solve()
    if found is None:
        return None
    picks, at = [], 0
    for group in groups:
        picks.append(max(range(len(group)), key=lambda option: float(found[at + option])))
        at += len(group)
    return picks


def choose_of(space: Space, limits: Limits, axis: Axis = "seconds") -> Choice | None:
    """The best choice with any setting; of equal ones that with the fewest steps.

    The same programs in real numbers bound what each setting can come to, so that few of them are solved.
    """
    aim, other = _aims(limits, axis)
    bounds = {setting: _Program(groups, limits, axis).bound() for setting, groups in space.items()}
    open_ones = sorted((bound, setting) for setting, bound in bounds.items() if bound is not None)
    found: list[tuple[float, float, Setting, Picks]] = []
    for bound, setting in open_ones:
        least = min((entry[0] for entry in found), default=None)
        if least is not None and bound > least - GAP * abs(least):
            break
        picks = choose(space[setting], limits, axis)
        if picks is not None:
            sums = [total(space[setting], picks, name) for name in (aim, other)]
            found.append((sums[0], sums[1], setting, picks))
    if not found:
        return None
    least = min(entry[0] for entry in found)
    best = min((e for e in found if e[0] <= least + GAP * abs(least)), key=lambda entry: (entry[1], entry[2]))
    return best[2], best[3]


class _Program:
    """One option of each group, sums under limits, and what is to be the least: in integers, or in real numbers."""

    def __init__(self, groups: Groups, limits: Limits, axis: Axis) -> None:
        import numpy as np
        from scipy.optimize import LinearConstraint

        options = [option for group in groups for option in group]
        values = {n: np.array([getattr(option, n) for option in options]) for n in ("cost", "seconds", "weights")}
        one_each = np.zeros((len(groups), len(options)))
        at = 0
        for number, group in enumerate(groups):
            one_each[number, at : at + len(group)] = 1
            at += len(group)
        self._constraints = [LinearConstraint(one_each, 1, 1)]
        for name, most in (("cost", limits.cost), ("seconds", limits.seconds), ("weights", limits.weights)):
            if most is not None:
                # Scaled, because the solver's tolerances are absolute.
                scale = np.abs(values[name]).max(initial=1e-30)
                self._constraints.append(LinearConstraint(values[name] / scale, ub=most / scale))
        aim, other = _aims(limits, axis)
        self._aim = values[aim]
        scaled = {name: values[name] / np.abs(values[name]).max(initial=1e-30) for name in (aim, other)}
        # Of choices that are as good, the one that is also better otherwise.
        self._least = scaled[aim] + 1e-6 * scaled[other]

    def solve(self) -> Any:
        """What part of each option is taken, 0 or 1; None where nothing is under the limits."""
        return self._run(integers=True)

    def bound(self) -> float | None:
        """What the aim comes to at the least; None where nothing is under the limits."""
        found = self._run(integers=False)
        return None if found is None else float(found @ self._aim)

    def _run(self, *, integers: bool) -> Any:
        import numpy as np
        from scipy.optimize import Bounds, milp

        with stdout_apart():
            return milp(
                self._least,
                constraints=self._constraints,
                bounds=Bounds(0, 1),
                integrality=np.full(len(self._least), int(integers)),
                options={"mip_rel_gap": GAP, "time_limit": 60},
            ).x


def frontier_of(space: Space, axis: Axis = "seconds", within: Limits = EVERYTHING) -> list[Choice]:
    """Choices from the fastest, or smallest, to the one of least error, under limits at even distances; all of them `within`
    limits of the other axis. None where nothing is within those."""
    least = min(_sum(min(getattr(option, axis) for option in group) for group in groups) for groups in space.values())
    best = choose_of(space, within, axis)
    if best is None:
        return []
    most = total(space[best[0]], best[1], axis)
    found: list[Choice] = []
    for number in range(POINTS):
        limit = least + (most - least) * number / (POINTS - 1)
        limits = {axis: limit + 1e-9 * max(abs(least), abs(most))}
        choice = choose_of(space, replace(within, **limits), axis)
        if choice is not None and choice not in found:
            found.append(choice)
    return found


def taken(groups: Groups, picks: Picks) -> list[Option]:
    """The options that were picked."""
    return [options[pick] for options, pick in zip(groups, picks, strict=True)]


def total(groups: Groups, picks: Picks, name: str) -> float:
    """What the picked options add up to in `name`."""
    return _sum(getattr(option, name) for option in taken(groups, picks))


def _sum(values: Iterable[float]) -> float:
    return float(sum(values))


def _aims(limits: Limits, axis: Axis) -> tuple[str, str]:
    """What is to be the least, and what decides among equals."""
    return ("cost", axis) if limits.cost is None else (axis, "cost")
