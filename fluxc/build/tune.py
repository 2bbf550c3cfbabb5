"""`fluxc tune`: which format each layer gets, under a limit of predicted time, memory or measured error.

1. Each fusion group alone is put into each format and the error of the velocity is measured (calibration's prompts and calls);
   squared errors of different groups add up nearly.
2. What a format changes in the time of a step on the GPU that is asked for is predicted (fluxc.predict); it adds up too.
3. So the best choice under a limit is a mixed-integer program, solved exactly; with limits from the fastest choice to the one
   of least error it gives the frontier.
4. Every choice that is shown is measured as a whole, with the prediction of its error beside it.

Layers that the recipe keeps in bf16, by exclude, preset or rules, are not touched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fluxc.base.errors import BuildError, RecipeError
from fluxc.base.progress import StageProgress
from fluxc.build.job import Job
from fluxc.build.preflight import measuring
from fluxc.build.runner import Results, Stage, run, run_steps
from fluxc.build.stages import tuning_inputs, tuning_steps
from fluxc.calibrate import tuning_stage
from fluxc.calibrate.tuning_stage import Choice, Costs
from fluxc.formats.bf16 import BF16
from fluxc.formats.registry import FORMATS, multiplied_in
from fluxc.predict.gpus import Gpu
from fluxc.predict.scaling import Prediction, Subject, predict, recipe_model
from fluxc.quantize.plan import LayerPlan, to_quantize
from fluxc.recipe.load import LoadedRecipe

POINTS = 9
"""Of the frontier, from the fastest choice to the most accurate."""


@dataclass(frozen=True)
class Wish:
    """One limit: of a step's predicted `seconds`, of the predicted bytes of the fullest GPU's `memory`, or of the relative
    `error`, under which there is to be the `least` of time or memory."""

    seconds: float | None = None
    memory: float | None = None
    error: float | None = None
    least: Literal["time", "memory"] = "time"

    @property
    def axis(self) -> Axis:
        """What is weighed against error."""
        return (
            "weights" if self.memory is not None or (self.error is not None and self.least == "memory") else "seconds"
        )


Axis = Literal["seconds", "weights"]


@dataclass(frozen=True)
class Point:
    """A choice: predicted seconds of a step, bytes of the transformer's weights and of the fullest GPU, and the velocity's
    relative error, as the costs of groups add up to and, where it was measured, of the whole."""

    choice: Choice
    seconds: float
    weights: int
    memory: float
    predicted_error: float
    error: float | None = None

    @property
    def formats(self) -> dict[str, int]:
        """How many layers each quantized format has."""
        names = list(self.choice.values())
        return {format: names.count(format) for format in FORMATS if format in names}


@dataclass(frozen=True)
class Tuned:
    """The frontier, the point that meets the wish, and for comparison every layer in bf16; `names`: the layers that
    could be chosen."""

    gpu: Gpu
    gpus: int
    frontier: tuple[Point, ...]
    chosen: Point
    plain: Point
    names: tuple[str, ...]
    measured_on: dict[str, Any]

    @property
    def rules(self) -> dict[str, str]:
        """The format of every layer that could be chosen."""
        return {**dict.fromkeys(self.names, BF16), **self.chosen.choice}


@dataclass(frozen=True)
class Option:
    """A format of a group: what it adds to the squared error, to a step's seconds and to the bytes of weights."""

    format: str
    cost: float
    seconds: float
    weights: float


@dataclass(frozen=True)
class Limits:
    """The most that all groups may add up to; None: no limit."""

    cost: float | None = None
    seconds: float | None = None
    weights: float | None = None


Groups = list[list[Option]]
Picks = list[int]
"""Of each group the number of the option that is taken."""


def tune(
    loaded: LoadedRecipe, on: tuple[Gpu, int], wish: Wish, formats: tuple[str, ...], out: Path, progress: StageProgress
) -> Tuned:
    """Measure, choose, and measure what was chosen, for a number of GPUs of one kind; results are kept beside `out`, as those
    of a build are.

    RecipeError for what the recipe or the wish does not allow, BuildError for a wish that no choice meets.
    """
    _check_formats(formats, on[0])
    if loaded.recipe.calibration.engine != "fluxc":
        raise RecipeError(
            f"calibration.engine: {loaded.recipe.calibration.engine}: formats are measured on the inputs that fluxc's own "
            "calibration sees; leave `engine` out"
        )
    with measuring(loaded, out, progress, f"tune-{len(formats)}") as (cache, job):
        results = Results()
        run_steps(cache, tuning_steps(job, formats), results)
        costs: list[Costs] = results["tune-costs"] or []
        if not costs:
            raise RecipeError(
                "precision.transformer: quantizes no layer, so there is nothing to choose; set its default"
            )
        model = _Model(job, *on)
        groups, names = [model.options(group) for group in costs], [group.layers for group in costs]
        every = [model.point(names, groups, picks) for picks in frontier_of(groups, wish.axis)]
        chosen = choose(groups, model.limits(wish), wish.axis)
        if chosen is None:
            raise BuildError(_not_met(wish, every))
        every.append(model.point(names, groups, chosen))
        inputs = tuning_inputs(job, results, formats, tuple(point.choice for point in every))
        stage = Stage(
            "tune-points", "measure what was chosen", inputs, tuning_stage.run_choices, tuning_stage.load_choices
        )
        errors = run(cache, stage)
    whole = [replace(point, error=error) for point, error in zip(every, errors, strict=True)]
    from fluxc.calibrate.sensitivity import measured_on

    request = inputs.measured.request
    measured = measured_on(len(request["prompts"]), request["steps"])
    return Tuned(
        *on, tuple(whole[:-1]), whole[-1], model.plain, tuple(layer for layers in names for layer in layers), measured
    )


def _check_formats(formats: tuple[str, ...], gpu: Gpu) -> None:
    for format in formats:
        if format == BF16 or multiplied_in(format) not in gpu.gemms:
            able = ", ".join(name for name in FORMATS if multiplied_in(name) in gpu.gemms)
            raise RecipeError(
                f"--formats: {gpu.name} does not multiply {format}; give some of {able} (bf16 is always one)"
            )


class _Model:
    """Predicts what choices of the job's recipe take on so many GPUs of one kind."""

    def __init__(self, job: Job, gpu: Gpu, gpus: int) -> None:
        self._gpu, self._gpus = gpu, gpus
        self._entries = {entry.layer.name: entry for entry in to_quantize(job.original.plans["transformer"])}
        subject = recipe_model(job.loaded, job.original)
        every = [self._in(entry, BF16) if entry.layer.name in self._entries else entry for entry in subject.plan]
        weights = sum(entry.bytes_after for entry in every) - sum(entry.bytes_after for entry in subject.plan)
        self._subject = replace(subject, plan=every, weights=subject.weights + weights, batches=(1,))
        self._base = self._predicted({})

    @staticmethod
    def _in(entry: LayerPlan, format: str) -> LayerPlan:
        return replace(entry, format=format)

    def _predicted(self, choice: Choice) -> tuple[Subject, Prediction]:
        plan = [self._in(entry, choice.get(entry.layer.name, entry.format)) for entry in self._subject.plan]
        weights = self._subject.weights + sum(entry.bytes_after for entry in plan)
        weights -= sum(entry.bytes_after for entry in self._subject.plan)
        subject = replace(self._subject, plan=plan, weights=weights)
        return subject, predict(subject, self._gpu, (self._gpus,)).predictions[0]

    def options(self, group: Costs) -> list[Option]:
        """A group in bf16, then in each format it was measured in."""
        subject, base = self._base
        found = [Option(BF16, 0.0, 0.0, 0.0)]
        for format, cost in group.by_format.items():
            changed, prediction = self._predicted(dict.fromkeys(group.layers, format))
            seconds = prediction.time.seconds - base.time.seconds
            found.append(Option(format, cost, seconds, changed.weights - subject.weights))
        return found

    def point(self, names: list[tuple[str, ...]], groups: Groups, picks: Picks) -> Point:
        """What a choice comes to."""
        taken = [options[pick] for options, pick in zip(groups, picks, strict=True)]
        choice = {
            layer: option.format
            for layers, option in zip(names, taken, strict=True)
            for layer in layers
            if option.format != BF16
        }
        subject, prediction = self._predicted(choice)
        error = math.sqrt(sum(option.cost for option in taken))
        return Point(choice, prediction.time.seconds, subject.weights, prediction.first.total, error)

    @property
    def plain(self) -> Point:
        """Every layer in bf16."""
        subject, prediction = self._base
        return Point({}, prediction.time.seconds, subject.weights, prediction.first.total, 0.0, 0.0)

    def limits(self, wish: Wish) -> Limits:
        """`wish` as what groups may add to everything in bf16."""
        prediction = self._base[1]
        return Limits(
            None if wish.error is None else wish.error**2,
            None if wish.seconds is None else wish.seconds - prediction.time.seconds,
            None if wish.memory is None else wish.memory - prediction.first.total,
        )


def choose(groups: Groups, limits: Limits, axis: Axis = "seconds") -> Picks | None:
    """The choice of least error under limits of time and weights, or, under one of error, of least time or weights (`axis`);
    None where none is under them. A mixed-integer program: one option of each group."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    options = [option for group in groups for option in group]
    values = {name: np.array([getattr(option, name) for option in options]) for name in ("cost", "seconds", "weights")}
    one_each = np.zeros((len(groups), len(options)))
    at = 0
    for number, group in enumerate(groups):
        one_each[number, at : at + len(group)] = 1
        at += len(group)
    constraints = [LinearConstraint(one_each, 1, 1)]
    for name, most in (("cost", limits.cost), ("seconds", limits.seconds), ("weights", limits.weights)):
        if most is not None:
            # Scaled, because the solver's tolerances are absolute.
            scale = np.abs(values[name]).max(initial=1e-30)
            constraints.append(LinearConstraint(values[name] / scale, ub=most / scale))
    aim, other = ("cost", axis) if limits.cost is None else (axis, "cost")
    scaled = {name: values[name] / np.abs(values[name]).max(initial=1e-30) for name in (aim, other)}
    # Of choices that are as good, the one that is also better otherwise.
    found = milp(
        scaled[aim] + 1e-6 * scaled[other],
        constraints=constraints,
        bounds=Bounds(0, 1),
        integrality=np.ones(len(options)),
        options={"mip_rel_gap": 1e-4, "time_limit": 60},
    )
    if found.x is None:
        return None
    picks, at = [], 0
    for group in groups:
        picks.append(int(np.argmax(found.x[at : at + len(group)])))
        at += len(group)
    return picks


def frontier_of(groups: Groups, axis: Axis = "seconds") -> list[Picks]:
    """Choices from the fastest, or smallest, to the one of least error, under limits at even distances."""
    least = sum(min(getattr(option, axis) for option in group) for group in groups)
    best = choose(groups, Limits(), axis)
    assert best is not None
    most = sum(getattr(options[pick], axis) for options, pick in zip(groups, best, strict=True))
    found: list[Picks] = []
    for number in range(POINTS):
        limit = least + (most - least) * number / (POINTS - 1)
        limits = {axis: limit + 1e-9 * max(abs(least), abs(most))}
        picks = choose(groups, Limits(**limits), axis)
        if picks is not None and picks not in found:
            found.append(picks)
    return found


def _not_met(wish: Wish, every: list[Point]) -> str:
    fastest, smallest = min(every, key=lambda point: point.seconds), min(every, key=lambda point: point.memory)
    if wish.seconds is not None:
        return (
            f"--time {1e3 * wish.seconds:g}: no choice of formats is so fast; the fastest takes {1e3 * fastest.seconds:.3g} ms "
            "a step by prediction. More GPUs, other --formats or a smaller size take less"
        )
    if wish.memory is not None:
        return (
            f"--memory {wish.memory / 2**30:g}: no choice of formats is so small; the smallest takes "
            f"{smallest.memory / 2**30:.1f} GiB by prediction, text encoder and VAE included"
        )
    return f"--error {wish.error:g}: no choice of formats is so accurate, not even every layer in bf16"
