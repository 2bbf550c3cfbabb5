"""`fluxc tune`: which format each layer gets, under a limit of predicted time, memory or measured error.

1. Each fusion group alone is put into each format and the error of the velocity is measured (calibration's prompts and calls);
   squared errors of different groups add up nearly.
2. What a format changes in the time of a step on the GPU that is asked for is predicted (fluxc.predict); it adds up too.
3. Where the recipe's targets can, groups in NVFP4 may leave their inputs as they are at some steps: those at which that gains
   most. What a step costs then is measured step by step, and its time is a share of both bodies'.
4. So the best choice under a limit is a mixed-integer program (choice.py), solved exactly; with limits from the fastest choice
   to the one of least error it gives the frontier.
5. Every choice that is shown is measured as a whole, with the prediction of its error beside it.

Layers that the recipe keeps in bf16, by exclude, preset or rules, are not touched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fluxc.base.errors import BuildError, RecipeError
from fluxc.base.progress import StageProgress
from fluxc.build.choice import Axis, Choice, Groups, Limits, Option, choose_of, frontier_of, taken
from fluxc.build.job import Job
from fluxc.build.preflight import measuring
from fluxc.build.runner import Results, Stage, run, run_steps
from fluxc.build.stages import tuning_inputs, tuning_steps
from fluxc.calibrate import tuning_stage
from fluxc.calibrate.tuning_stage import Costs, Wanted
from fluxc.formats.bf16 import BF16
from fluxc.formats.registry import FORMATS, multiplied_in
from fluxc.predict.gpus import Gpu
from fluxc.predict.scaling import Prediction, Subject, predict, recipe_model
from fluxc.quantize.plan import LayerPlan, to_quantize
from fluxc.recipe.load import LoadedRecipe

FEW_STEPS, MANY_STEPS = 4, 8
"""Steps of an image that are measured: where all steps are alike, and where they may differ."""
SHARES = (0, 1 / 24, 1 / 12, 1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 5 / 6)
"""Parts of an image's steps that are tried for leaving inputs as they are."""


@dataclass(frozen=True)
class Wish:
    """Limits of a step's predicted `seconds` and of the predicted bytes of the fullest GPU's `memory`, one or both; or one of
    the relative `error`, under which there is to be the `least` of time or memory."""

    seconds: float | None = None
    memory: float | None = None
    error: float | None = None
    least: Literal["time", "memory"] = "time"

    @property
    def axis(self) -> Axis:
        """What is weighed against error."""
        if self.seconds is not None:
            return "seconds"
        return "weights" if self.memory is not None or self.least == "memory" else "seconds"


@dataclass(frozen=True)
class Point:
    """A choice: the formats of layers, and at `exact_steps` (from 0) the layers that leave their inputs as they are; predicted
    seconds of a step (the average over steps), bytes of the transformer's weights and of the fullest GPU, and the velocity's
    relative error, as the costs of groups add up to and, where it was measured, of the whole."""

    choice: dict[str, str]
    seconds: float
    weights: int
    memory: float
    predicted_error: float
    error: float | None = None
    exact_layers: tuple[str, ...] = ()
    exact_steps: tuple[int, ...] = ()

    @property
    def wanted(self) -> Wanted:
        """What is to be measured of it."""
        return Wanted(self.choice, self.exact_layers, self.exact_steps)

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
    note: str = ""
    """Why all steps are alike, where that was not chosen."""

    @property
    def steps(self) -> list[dict[str, Any]]:
        """`precision.steps` of the choice."""
        if not self.chosen.exact_steps:
            return []
        able = {layer for layer, format in self.chosen.choice.items() if FORMATS[format].weights_alone}
        layers = {} if able == set(self.chosen.exact_layers) else {"layers": list(self.chosen.exact_layers)}
        return [{"at": [step + 1 for step in self.chosen.exact_steps], **layers}]

    @property
    def rules(self) -> dict[str, str]:
        """The format of every layer that could be chosen."""
        return {**dict.fromkeys(self.names, BF16), **self.chosen.choice}


@dataclass(frozen=True)
class Candidates:
    """What there is to choose from: `formats` of layers, and with `steps` also steps."""

    formats: tuple[str, ...]
    steps: bool = True


def tune(
    loaded: LoadedRecipe, on: tuple[Gpu, int], wish: Wish, candidates: Candidates, out: Path, progress: StageProgress
) -> Tuned:
    """Measure, choose, and measure what was chosen, for a number of GPUs of one kind; results are kept beside `out`, as those
    of a build are.

    RecipeError for what the recipe or the wish does not allow, BuildError for a wish that no choice meets.
    """
    formats = candidates.formats
    _check_formats(formats, on[0])
    if loaded.recipe.calibration.engine != "fluxc":
        raise RecipeError(
            f"calibration.engine: {loaded.recipe.calibration.engine}: formats are measured on the inputs that fluxc's own "
            "calibration sees; leave `engine` out"
        )
    if candidates.steps and loaded.recipe.precision.steps:
        raise RecipeError("precision.steps: tune chooses steps itself; leave it out, or give --no-steps")
    note = _why_alike(loaded, candidates)
    measured_steps = FEW_STEPS if note else MANY_STEPS
    with measuring(loaded, out, progress, f"tune-{len(formats) * measured_steps // FEW_STEPS}") as (cache, job):
        results = Results()
        run_steps(cache, tuning_steps(job, formats, measured_steps), results)
        costs: list[Costs] = results["tune-costs"] or []
        if not costs:
            raise RecipeError(
                "precision.transformer: quantizes no layer, so there is nothing to choose; set its default"
            )
        model = _Model(job, on, costs, steps=not note)
        limits = model.limits(wish)
        within = replace(limits, cost=None, **{wish.axis: None})
        every = [model.point(choice) for choice in frontier_of(model.space, wish.axis, within)]
        chosen = choose_of(model.space, limits, wish.axis)
        if chosen is None:
            smallest = [model.point(choice) for choice in frontier_of(model.space, "weights")[:1]]
            raise BuildError(_not_met(wish, every or smallest))
        every.append(model.point(chosen))
        inputs = tuning_inputs(job, results, formats, measured_steps, tuple(point.wanted for point in every))
        stage = Stage(
            "tune-points", "measure what was chosen", inputs, tuning_stage.run_choices, tuning_stage.load_choices
        )
        errors = run(cache, stage)
    whole = [replace(point, error=error) for point, error in zip(every, errors, strict=True)]
    from fluxc.calibrate.sensitivity import measured_on

    request = inputs.measured.request
    measured = measured_on(len(request["prompts"]), request["steps"], measured_steps)
    names = tuple(layer for group in costs for layer in group.layers)
    return Tuned(*on, tuple(whole[:-1]), whole[-1], model.plain, names, measured, note)


def _why_alike(loaded: LoadedRecipe, candidates: Candidates) -> str:
    """Why steps are not chosen; empty where they are."""
    recipe, formats = loaded.recipe, candidates.formats
    if not candidates.steps:
        return "all steps are alike, as asked"
    if not any(FORMATS[name].weights_alone in formats for name in formats):
        return "all steps are alike: no two of the formats differ in their inputs alone"
    unable = [target for target in recipe.targets if target.one_precision]
    if unable:
        return f"all steps are alike: {unable[0].name}: {unable[0].one_precision}"
    if not any(target.rounds_inputs and target.runs_graphs for target in recipe.targets):
        return "all steps are alike: no target of the recipe rounds inputs"
    return ""


def _check_formats(formats: tuple[str, ...], gpu: Gpu) -> None:
    for format in formats:
        if format == BF16 or multiplied_in(format) not in gpu.gemms:
            able = ", ".join(name for name in FORMATS if multiplied_in(name) in gpu.gemms)
            raise RecipeError(
                f"--formats: {gpu.name} does not multiply {format}; give some of {able} (bf16 is always one)"
            )


class _Model:
    """Predicts what choices of the job's recipe take on so many GPUs of one kind; `costs` are those of its groups of layers.

    `space` are the options of each group, by how many steps leave inputs as they are.
    """

    def __init__(self, job: Job, on: tuple[Gpu, int], costs: list[Costs], *, steps: bool) -> None:
        self._gpu, self._gpus = on
        self._entries = {entry.layer.name: entry for entry in to_quantize(job.original.plans["transformer"])}
        subject = recipe_model(job.loaded, job.original)
        every = [self._in(entry, BF16) if entry.layer.name in self._entries else entry for entry in subject.plan]
        weights = sum(entry.bytes_after for entry in every) - sum(entry.bytes_after for entry in subject.plan)
        self._subject = replace(subject, plan=every, weights=subject.weights + weights, batches=(1,), bodies={})
        self._base = self._predicted({})
        self._costs, self._steps = costs, subject.steps
        self._ranked = self._steps_by_gain()
        counts = sorted({round(share * self._steps) for share in SHARES}) if steps else [0]
        alone = [self._options(group) for group in costs]
        self.space: dict[int, Groups] = {
            count: [
                [*options, *self._exact(group, options, count)] for group, options in zip(costs, alone, strict=True)
            ]
            for count in counts
        }

    @staticmethod
    def _in(entry: LayerPlan, format: str) -> LayerPlan:
        return replace(entry, format=format)

    def _predicted(self, choice: dict[str, str]) -> tuple[Subject, Prediction]:
        plan = [self._in(entry, choice.get(entry.layer.name, entry.format)) for entry in self._subject.plan]
        weights = self._subject.weights + sum(entry.bytes_after for entry in plan)
        weights -= sum(entry.bytes_after for entry in self._subject.plan)
        subject = replace(self._subject, plan=plan, weights=weights)
        return subject, predict(subject, self._gpu, (self._gpus,)).predictions[0]

    def _options(self, group: Costs) -> list[Option]:
        """A group in bf16, then in each format it was measured in."""
        subject, base = self._base
        found = [Option(BF16, 0.0, 0.0, 0.0)]
        for format, cost in group.by_format.items():
            changed, prediction = self._predicted(dict.fromkeys(group.layers, format))
            seconds = prediction.time.seconds - base.time.seconds
            found.append(Option(format, float(cost.mean()), seconds, changed.weights - subject.weights))
        return found

    def _exact(self, group: Costs, options: list[Option], count: int) -> list[Option]:
        """The same in formats whose inputs are left as they are at `count` steps."""
        of_format = {option.format: option for option in options}
        found = []
        for option in options if count else ():
            twin = FORMATS[option.format].weights_alone if option.format in FORMATS else ""
            if twin in of_format:
                cost, steps = group.by_format[option.format].copy(), self._ranked[:count]
                cost[steps] = group.by_format[twin][steps]
                share = count / self._steps
                seconds = (1 - share) * option.seconds + share * of_format[twin].seconds
                found.append(Option(option.format, float(cost.mean()), seconds, option.weights, is_exact=True))
        return found

    def _steps_by_gain(self) -> list[int]:
        """Steps, those first at which inputs that are left as they are gain most over all groups."""
        import numpy as np

        gains = np.zeros(self._steps)
        for group in self._costs:
            for format, cost in group.by_format.items():
                twin = FORMATS[format].weights_alone
                if twin in group.by_format:
                    gains += cost - group.by_format[twin]
        return [int(step) for step in np.argsort(-gains, kind="stable")]

    def point(self, choice: Choice) -> Point:
        """What a choice comes to."""
        count, picks = choice
        options = taken(self.space[count], picks)
        formats: dict[str, str] = {}
        exact: list[str] = []
        for group, option in zip(self._costs, options, strict=True):
            formats |= {layer: option.format for layer in group.layers if option.format != BF16}
            exact += group.layers if option.is_exact else ()
        subject, prediction = self._predicted(formats)
        seconds, memory, steps = prediction.time.seconds, prediction.first.total, tuple(sorted(self._ranked[:count]))
        if exact:
            alone = {layer: FORMATS[formats[layer]].weights_alone for layer in exact}
            other = self._predicted(formats | alone)[1]
            seconds += count / self._steps * (other.time.seconds - seconds)
            memory = max(memory, other.first.total)
        error = math.sqrt(sum(option.cost for option in options))
        return Point(
            formats,
            seconds,
            subject.weights,
            memory,
            error,
            exact_layers=tuple(exact),
            exact_steps=steps if exact else (),
        )

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


def _not_met(wish: Wish, every: list[Point]) -> str:
    fastest, smallest = min(every, key=lambda point: point.seconds), min(every, key=lambda point: point.memory)
    if wish.memory is not None and smallest.memory > wish.memory:
        return (
            f"--gpu-memory {wish.memory / 2**30:g}: no choice of formats is so small; the smallest takes "
            f"{smallest.memory / 2**30:.1f} GiB by prediction, text encoder and VAE included"
        )
    if wish.seconds is not None:
        both = "" if wish.memory is None else " of those that are small enough"
        return (
            f"--time {1e3 * wish.seconds:g}: no choice of formats is so fast; the fastest{both} takes "
            f"{1e3 * fastest.seconds:.3g} ms a step by prediction. More GPUs, other --formats or a smaller size take less"
        )
    return f"--error {wish.error:g}: no choice of formats is so accurate, not even every layer in bf16"
