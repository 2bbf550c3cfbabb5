"""`fluxc tune`: which format each layer gets, under a limit of predicted time, memory or measured error.

1. Each fusion group alone is put into each format and the error of the velocity is measured (calibration's prompts and calls);
   squared errors of different groups add up nearly.
2. What a format changes in the time of a step on the GPU that is asked for is predicted (fluxc.predict); it adds up too.
3. Where the recipe's targets can, groups in NVFP4 may leave their inputs as they are at some steps: those at which that gains
   most. What a step costs then is measured step by step, and its time is a share of both bodies'.
4. Where the recipe can have a step cache, steps may be skipped: so many as a schedule that is the best of the checkpoint's own
   trace on the same prompts. A skipped step takes no time, and costs what its old residual costs, and what the layers cost at
   the step that this is of.
5. So the best choice under a limit is a mixed-integer program (choice.py), solved exactly; with limits from the fastest choice
   to the one of least error it gives the frontier.
6. Every choice that is shown is measured as a whole, with the prediction of its error beside it.

Layers that the recipe keeps in bf16, by exclude, preset or rules, are not touched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msgspec import structs

from fluxc.base.errors import BuildError, RecipeError
from fluxc.base.progress import StageProgress
from fluxc.build.job import Job, check_targets
from fluxc.build.preflight import measuring
from fluxc.build.requests import trace_request
from fluxc.build.runner import Results, Stage, run, run_steps
from fluxc.build.stages import tuning_inputs, tuning_steps
from fluxc.build.tuning_space import Model, Point, StepChoices, Wish
from fluxc.calibrate import tuning_stage
from fluxc.calibrate.choice import choose_of, frontier_of
from fluxc.calibrate.costs_stage import read_costs
from fluxc.calibrate.states import STEPS, measured_on
from fluxc.formats.bf16 import BF16
from fluxc.formats.registry import FORMATS, multiplied_in
from fluxc.predict.gpus import Gpu
from fluxc.recipe.checks import faults_between
from fluxc.recipe.load import LoadedRecipe
from fluxc.recipe.structs import StepCache
from fluxc.targets.base import TargetContext

MANY_STEPS = 8
"""Steps of an image that are measured where they may differ; STEPS where all are alike."""


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
    notes: tuple[str, ...] = ()
    """Why all steps are alike, and why none is skipped, where that was not chosen."""
    may_skip: bool = False
    """Whether skipped steps were a part of the choice."""

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
    """What there is to choose from: `formats` of layers, with `steps` also steps that leave inputs as they are, and with
    `skips` steps that are skipped."""

    formats: tuple[str, ...]
    steps: bool = True
    skips: bool = True


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
    if candidates.skips:
        _check_step_cache(loaded)
    why_alike, why_none = _why_alike(loaded, candidates), _why_none_skipped(loaded, candidates)
    measured_steps = STEPS if why_alike and why_none else MANY_STEPS
    units = f"tune-{len(formats) * measured_steps // STEPS}"
    if not why_none:
        units += f"-{-(-loaded.recipe.sampling.steps // STEPS)}"
    with measuring(loaded, out, progress, units) as (cache, job):
        why_none = why_none or _why_no_target_skips(job)
        results = Results()
        run_steps(cache, tuning_steps(job, formats, measured_steps, skips=not why_none), results)
        costs = read_costs(results["tune-costs"]) if results["tune-costs"] else []
        if not costs:
            raise RecipeError(
                "precision.transformer: quantizes no layer, so there is nothing to choose; set its default"
            )
        steps = StepChoices(not why_alike, results.get("tune-skips"), loaded.recipe.step_cache or StepCache())
        model = Model(loaded, job.original, on, costs, steps)
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
    request = inputs.measured.request
    measured = measured_on(len(request["prompts"]), request["steps"], measured_steps)
    names = tuple(layer for group in costs for layer in group.layers)
    notes = tuple(note for note in (why_alike, why_none) if note)
    return Tuned(*on, tuple(whole[:-1]), whole[-1], model.plain, names, measured, notes, not why_none)


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


def _check_step_cache(loaded: LoadedRecipe) -> None:
    """Refuse what says how many steps are skipped, which is to be chosen."""
    cache = loaded.recipe.step_cache
    if cache is None:
        return
    given = next((name for name in ("skip", "max_error") if getattr(cache, name) not in (None, "auto")), None)
    if given:
        raise RecipeError(
            f"step_cache.{given}: tune chooses how many steps are skipped itself; leave it out, or give --no-skips"
        )
    if cache.trace is not None and cache.traced == "quantized":
        raise RecipeError(
            "step_cache.trace: is of the model in the formats of this recipe, which are to be chosen; leave it out, or give "
            "--no-skips"
        )


def _why_none_skipped(loaded: LoadedRecipe, candidates: Candidates) -> str:
    """Why no steps are skipped, as far as the recipe says; empty where they are."""
    if not candidates.skips:
        return "no step is skipped, as asked"
    with_cache = _with_step_cache(loaded)
    faults = faults_between(with_cache.recipe, [])
    if faults:
        return f"no step is skipped: {faults[0].text}"
    try:
        trace_request(with_cache)
    except RecipeError as error:
        return f"no step is skipped: {error}"
    return ""


def _why_no_target_skips(job: Job) -> str:
    """The same, as far as its targets say."""
    recipe = _with_step_cache(job.loaded).recipe
    try:
        check_targets(TargetContext(recipe, job.original))
    except RecipeError as error:
        return f"no step is skipped: {error}"
    return ""


def _with_step_cache(loaded: LoadedRecipe) -> LoadedRecipe:
    """The recipe with a step cache, its own or the default."""
    cache = loaded.recipe.step_cache or StepCache()
    return structs.replace(loaded, recipe=structs.replace(loaded.recipe, step_cache=cache))


def _check_formats(formats: tuple[str, ...], gpu: Gpu) -> None:
    for format in formats:
        if format == BF16 or multiplied_in(format) not in gpu.gemms:
            able = ", ".join(name for name in FORMATS if multiplied_in(name) in gpu.gemms)
            raise RecipeError(
                f"--formats: {gpu.name} does not multiply {format}; give some of {able} (bf16 is always one)"
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
            f"--time {1e3 * wish.seconds:g}: no choice is so fast; the fastest{both} takes "
            f"{1e3 * fastest.seconds:.3g} ms a step by prediction. More GPUs, other --formats or a smaller size take less"
        )
    return f"--error {wish.error:g}: no choice is so accurate, not even every layer in bf16"
