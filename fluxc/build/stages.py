"""The list: every stage of a build in order, each with the inputs it is given."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from fluxc.base.cache import Made, StageCache, UnknownDigestError, tool_versions
from fluxc.base.progress import StageProgress
from fluxc.build.job import Job
from fluxc.build.requests import (
    attributed_prompts,
    cache_settings,
    calibration_request,
    judges_of,
    trace_request,
    trace_size,
)
from fluxc.build.runner import Results, Stage, Step, plan_steps
from fluxc.calibrate import (
    attribution_stage,
    costs_stage,
    modelopt_stage,
    rounding_stage,
    sensitivity_stage,
    step_errors_stage,
    tuning_stage,
    weights_stage,
)
from fluxc.calibrate import stage as calibration_stage
from fluxc.calibrate.assumed import assumed_amax
from fluxc.calibrate.file import read_calibration
from fluxc.calibrate.simulated import Rounded
from fluxc.calibrate.states import STEPS
from fluxc.checkpoint.components import WEIGHTS_FILE
from fluxc.checkpoint.files import ComponentFiles, checkpoint_digests
from fluxc.checkpoint.identify import pixels_per_token, vae_of
from fluxc.checkpoint.source import WEIGHTED
from fluxc.fidelity import causes_stage, reference_stage
from fluxc.fidelity import stage as compare_stage
from fluxc.formats.registry import FORMATS
from fluxc.graph import stage as export_stage
from fluxc.graph.stage import ExportInputs
from fluxc.quantize.plan import needs_calibration
from fluxc.quantize.source import kept_tensors, narrowed, solvable
from fluxc.quantize.steps import body_plans, measures_steps, schedule_of
from fluxc.recipe.structs import QUANTIZED, Calibration, Recipe
from fluxc.recipe.targets import Target
from fluxc.stepcache import fit_stage, frontier_stages, skips_stage, trace_stage
from fluxc.stepcache.file import model_in_words, read_trace
from fluxc.targets.base import TargetContext
from fluxc.targets.decoder import tiles_of, tiles_of_size
from fluxc.targets.parts import Weights
from fluxc.targets.registry import kind_of
from fluxrt.manifest import StepCache
from fluxrt.stepprecision import StepPrecision

PARTS = ("graphs", "calibrate", "step-cache", "weights", "targets", "fidelity", "bundle")
"""What `--until` can name, in order."""
DRAFT = "draft"
"""The name among the results of the bundle in the making, which the comparison is run on."""


def steps(job: Job, until: str | None = None) -> Iterator[Step]:
    """Every step up to the comparison's inputs; `until` calibrate measures even where no layer would be quantized."""
    recipe = job.loaded.recipe
    for inputs in exports(job).values():
        yield Step(_export_name(inputs), "graphs", _made(export_of(inputs)))
    yield Step("modelopt", "calibrate", lambda results: _modelopt(job))
    yield Step("calibrate", "calibrate", lambda results: _calibrate(job, results, until == "calibrate"))
    yield from _rounding_steps(job)
    if recipe.step_cache:
        # Of the model that will run, so after everything that decides how its layers round.
        yield Step("step-trace", "step-cache", lambda results: _step_trace(job, results))
        if recipe.step_cache.compare:
            yield Step("step-trace-reference", "step-cache", lambda results: _reference_trace(job))
        yield Step("step-cache", "step-cache", lambda results: _fit(job, results))
    for name in WEIGHTS_FILE:
        yield Step(f"weights-{name}", "weights", partial(_weights, job, component=name))
    for target in recipe.targets:
        yield Step(f"target-{target.name}", "targets", partial(_target, job, target=target))
    if recipe.fidelity.attribution:
        yield Step("attribution", "fidelity", lambda results: _attribution(job, results))
        yield Step("attribution-images", "fidelity", lambda results: _causes(job, results))
    yield Step("reference", "fidelity", lambda results: _reference(job))


def tracing_steps(job: Job) -> Iterator[Step]:
    """The steps that the trace needs, for a command that makes a trace alone."""
    if cache_settings(job.loaded).traced == "quantized":
        yield Step("modelopt", "calibrate", lambda results: _modelopt(job))
        yield Step("calibrate", "calibrate", lambda results: _calibrate(job, results, False))
        yield from _rounding_steps(job)


def _rounding_steps(job: Job) -> Iterator[Step]:
    """What decides how layers round, after calibration: weights that are solved, and layers that `exclude: auto` keeps."""
    for name in QUANTIZED:
        yield Step(f"rounding-{name}", "weights", partial(_rounding, job, component=name))
    yield Step("sensitivity-costs", "weights", lambda results: _costs(job, results))
    yield Step("sensitivity", "weights", lambda results: _choice(job, results))
    if measures_steps(job.loaded.recipe.precision):
        yield Step("step-errors", "weights", lambda results: _step_errors(job, results))


def comparing(job: Job) -> Iterator[Step]:
    """The steps that compare the bundle in the making, which is among the results as DRAFT."""
    yield Step("compare", "fidelity", lambda results: _compare(job, results))
    here = [target for target in job.loaded.recipe.targets if target.runs_here]
    # What skipping costs is small beside what fewer bits do to the last digits.
    target = next((one.name for one in sorted(here, key=lambda one: one.exact is not None)), None)
    if job.loaded.recipe.step_cache is None or target is None or job.fidelity.level != "images":
        return
    from fluxc.stepcache.frontier import counts

    yield Step("frontier-full", "fidelity", lambda results: _point(job, results, target, "full"))
    numbers = counts(cache_settings(job.loaded), job.loaded.recipe.sampling.steps)
    for number in numbers:
        yield Step(f"frontier-{number}", "fidelity", partial(_point, job, target=target, point=str(number)))
    yield Step("frontier-chosen", "fidelity", lambda results: _point(job, results, target, "chosen"))
    if cache_settings(job.loaded).compare:
        yield Step("frontier-reference", "fidelity", lambda results: _point(job, results, target, "reference"))
    yield Step("frontier", "fidelity", lambda results: _cache_figures(job, results, target, numbers))


def tuning_steps(job: Job, formats: tuple[str, ...], measured_steps: int, *, skips: bool) -> Iterator[Step]:
    """The steps up to the costs of every group of layers in each of `formats`, at so many steps of an image; with `skips` those
    of skipped steps too."""

    def costs(results: Results) -> Stage[Any, Any] | None:
        measured = _measured_inputs(job, results)
        if measured is None:
            return None
        inputs = costs_stage.FormatInputs(_with_every_step(job, measured), formats, measured_steps)
        return Stage("tune-costs", "measure formats of layers", inputs, costs_stage.run, costs_stage.load)

    def skips_of(results: Results) -> Stage[Any, Any] | None:
        measured = _measured_inputs(job, results)
        if measured is None:
            return None
        # Nothing of it is quantized, so no plan belongs to it.
        inputs = replace(_with_every_step(job, measured), plan=[], solved=None)
        return Stage("tune-skips", "measure skipped steps", inputs, skips_stage.run, skips_stage.load)

    yield Step("modelopt", "calibrate", lambda results: _modelopt(job))
    yield Step("calibrate", "calibrate", lambda results: _calibrate(job, results, True))
    yield Step("rounding-transformer", "weights", partial(_rounding, job, component="transformer"))
    if skips:
        yield Step("tune-skips", "step-cache", skips_of)
    yield Step("tune-costs", "weights", costs)


def tuning_inputs(
    job: Job, results: Results, formats: tuple[str, ...], measured_steps: int, choices: tuple[tuning_stage.Wanted, ...]
) -> tuning_stage.ChoiceInputs:
    """What measuring whole choices depends on, after tuning_steps."""
    measured = _measured_inputs(job, results)
    assert measured is not None
    return tuning_stage.ChoiceInputs(_with_every_step(job, measured), formats, measured_steps, choices)


def planned_stages(job: Job, listed: Iterable[Step]) -> list[tuple[Step, str]]:
    """Every step that is `listed` and, in words, whether its result is in the cache; nothing is run, hashed or written."""
    cache = StageCache(job.root, StageProgress())
    with suppress(UnknownDigestError):
        job.digests = checkpoint_digests(job.original.checkpoint, cache.known_digest, lambda *_: None)
    return plan_steps(cache, listed)


def exports(job: Job) -> dict[str, ExportInputs]:
    """The graphs that the targets start from, by the name of their step."""
    context = TargetContext(job.loaded.recipe, job.original)
    found = [
        inputs
        for target in job.loaded.recipe.targets
        for inputs in kind_of(target.kind).exports(target, context).values()
    ]
    return {_export_name(inputs): inputs for inputs in found}


def calibration_inputs(job: Job, aside: str) -> calibration_stage.CalibrationInputs:
    """What calibration depends on."""
    request = calibration_request(job.loaded, job.is_large)
    layers = job.original.family.text_layers
    return calibration_stage.CalibrationInputs(
        job.files, request, job.rows(request["guidance"]), layers, job.aside(aside)
    )


def step_trace_inputs(job: Job, results: Results, aside: str, traced: str | None = None) -> trace_stage.StepTraceInputs:
    """What the step trace of the model `traced`, or of the one that the recipe says, depends on."""
    request = trace_request(job.loaded, traced)
    layers = job.original.family.text_layers
    inputs = trace_stage.StepTraceInputs(job.files, request, job.rows(request["guidance"]), layers, job.aside(aside))
    if request["precision"] is None:
        return inputs
    exported = Made(results["modelopt"]) if job.loaded.recipe.calibration.engine == "modelopt" else None
    round_inputs = any(target.rounds_inputs for target in job.loaded.recipe.targets)
    return replace(inputs, rounded=_rounded(job, results, round_inputs), exported=exported)


def _rounded(job: Job, results: Results, round_inputs: bool) -> dict[str, Rounded]:
    """By component, how the layers compute that will not compute as the checkpoint's own."""
    recipe, source = job.loaded.recipe, job.source(results)
    found = {}
    for name in QUANTIZED:
        precision = getattr(recipe.precision, name)
        how = Rounded(source.plans[name], precision.scales, round_inputs, solved=results[f"rounding-{name}"])
        if round_inputs and recipe.calibration.engine == "none":
            how = replace(how, assumed=assumed_amax(how.plan, source.transformer.width, recipe.calibration))
        elif round_inputs and needs_calibration(how.plan):
            how = replace(how, calibration=_calibration(job, results), settings=_amax_settings(recipe))
        if how.rounding_inputs and name == "transformer":
            how = replace(how, steps=step_precision(job, results))
        if how.layers:
            found[name] = how
    return found


def sampling_entry(job: Job) -> dict[str, Any]:
    """The manifest's `sampling`."""
    recipe, source = job.loaded.recipe, job.original
    tiles = tiles_of(recipe.vae, vae_of(source.checkpoint))
    return {
        "sizes": recipe.listed_sizes,
        "pixels_per_token": pixels_per_token(source.checkpoint),
        "latent_channels": source.transformer.in_channels,
        "schedule": source.family.schedule,
        "steps": recipe.sampling.steps,
        "guidance": recipe.sampling.guidance,
        "cfg_batch": source.cfg_batch,
        **({"range": recipe.size_range} if recipe.size_range else {}),
        **({"batches": recipe.batches} if recipe.batches != (1,) else {}),
        **({"tiles": tiles} if tiles else {}),
    }


def provenance_tools(recipe: Recipe) -> dict[str, str]:
    """Versions of everything the bundle's bytes depend on."""
    versions = tool_versions() | {name: metadata.version(name) for name in ("jinja2", "matplotlib")}
    for target in recipe.targets:
        versions = versions | kind_of(target.kind).tools()
    return dict(sorted(versions.items()))


def provenance_computed(job: Job, results: Results) -> dict[str, str]:
    """What the model ran on, and in which type, by what it was run for; nothing where it was not run."""
    calibration = job.given_calibration or results.get("calibrate")
    found = {"calibration": read_calibration(calibration).origin.ran} if calibration else {}
    if job.loaded.recipe.step_cache:
        origin = read_trace(_traced(job, results)).origin
        found["step cache"] = f"{origin.ran}, {model_in_words(origin)}"
    reference = results.get("reference")
    return found | ({"reference": reference_stage.ran_as(reference)} if reference else {})


def provenance_measured(job: Job, results: Results) -> dict[str, str]:
    """What the model was asked, by what it was run for; a recipe leaves some of that to the size of the model."""
    found = {}
    if job.given_calibration or results.get("calibrate"):
        asked = calibration_request(job.loaded, job.is_large)
        found["calibration"] = _asked_in_words(len(asked["prompts"]), asked["steps"], asked["size"])
    if job.loaded.recipe.step_cache:
        asked = trace_request(job.loaded)
        found["step cache"] = _asked_in_words(len(asked["prompts"]), asked["steps"], asked["size"])
    if results.get("reference"):
        request = job.fidelity
        found["reference"] = _asked_in_words(len(request.prompts), request.steps, request.size)
    return found


def layers_of(results: Results) -> list[dict[str, Any]]:
    """Every quantized layer with its errors, from what the weights stages wrote."""
    return [
        {"component": name} | layer
        for name in WEIGHTS_FILE
        for layer in json.loads((results[f"weights-{name}"] / weights_stage.LAYERS).read_text())
    ]


def _asked_in_words(prompts: int, steps: int, size: Sequence[int]) -> str:
    height, width = size
    return f"{prompts} prompt{'s' * (prompts != 1)}, {steps} step{'s' * (steps != 1)}, {height}x{width}"


def _made(stage: Stage[Any, Any]) -> Any:
    return lambda results: stage


def _export_name(inputs: ExportInputs) -> str:
    how = ["whole"] if inputs.composed else [inputs.dtype, *(["rank", str(inputs.text_length)] if inputs.part else [])]
    return "-".join(["export", inputs.component, *how])


def export_of(inputs: ExportInputs) -> Stage[ExportInputs, Path]:
    """The stage that writes a component's graphs."""
    return Stage(f"export-{inputs.component}", inputs.title, inputs, export_stage.run, export_stage.load)


def _modelopt(job: Job) -> Stage[Any, Path] | None:
    calibration = job.loaded.recipe.calibration
    if calibration.engine != "modelopt":
        return None
    inputs = modelopt_stage.ModeloptInputs(
        job.files,
        calibration_request(job.loaded, job.is_large),
        job.original.family.text_layers,
        calibration.algorithm,
        _version_of("nvidia-modelopt"),
        job.original.plans["transformer"],
    )
    return Stage("modelopt", "quantize with modelopt", inputs, modelopt_stage.run, modelopt_stage.load)


def _version_of(distribution: str) -> str:
    """The installed version; of what is not installed, which a plan may still name, a word that says so."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _calibrate(job: Job, results: Results, always: bool) -> Stage[Any, Path] | None:
    runs_model = job.loaded.recipe.calibration.engine != "none" and not job.given_calibration
    recipe = job.loaded.recipe
    solves = any(getattr(recipe.precision, name).is_solved for name in QUANTIZED)
    is_asked_for = solves or recipe.fidelity.attribution or always
    if not runs_model or not (job.source(results, with_plan=False).quantizes or is_asked_for):
        return None
    inputs = calibration_inputs(job, "calibration")
    return Stage("calibration", "calibrate", inputs, calibration_stage.run, calibration_stage.load)


def _calibration(job: Job, results: Results) -> Path | None:
    found: Path | None = job.given_calibration or results["calibrate"]
    return found


def _step_trace(job: Job, results: Results) -> Stage[Any, Path] | None:
    if job.given_trace:
        return None
    inputs = step_trace_inputs(job, results, "step-trace")
    return Stage("step-trace", "trace steps", inputs, trace_stage.run, trace_stage.load)


def _reference_trace(job: Job) -> Stage[Any, Path]:
    inputs = step_trace_inputs(job, Results(), "step-trace-reference", "reference")
    return Stage("step-trace", "trace steps of the reference", inputs, trace_stage.run, trace_stage.load)


def _traced(job: Job, results: Results) -> Path:
    return job.given_trace or results["step-trace"]


def _fit(job: Job, results: Results) -> Stage[Any, StepCache]:
    recipe, settings = job.loaded.recipe, cache_settings(job.loaded)
    plain = msgspec.structs.replace(
        settings, frontier="auto", prompts=None, trace=None, traced="quantized", compare=False
    )
    reference = results["step-trace-reference"] if settings.compare else None
    inputs = fit_stage.FitInputs(plain, _traced(job, results), trace_size(recipe), reference)
    return Stage("step-cache", "fit step cache", inputs, fit_stage.run, fit_stage.load)


def _cost_inputs(job: Job, results: Results) -> costs_stage.CostInputs | None:
    """What `exclude: auto` measures; None where it does not, or nothing would be quantized."""
    recipe = job.loaded.recipe
    return _measured_inputs(job, results) if recipe.precision.transformer.exclude == "auto" else None


def _measured_inputs(job: Job, results: Results) -> costs_stage.CostInputs | None:
    """What measuring the sensitivity of layers depends on; None where nothing would be quantized."""
    recipe, calibration = job.loaded.recipe, _calibration(job, results)
    if calibration is None:
        return None
    request = calibration_request(job.loaded, job.is_large)
    return costs_stage.CostInputs(
        files=job.files,
        request=request,
        rows=job.rows(request["guidance"]),
        text_layers=job.original.family.text_layers,
        dtype=recipe.fidelity.reference,
        plan=job.source(results, with_plan=False).plans["transformer"],
        calibration=calibration,
        settings=_amax_settings(recipe),
        scales=recipe.precision.transformer.scales,
        round_inputs=any(target.rounds_inputs for target in recipe.targets),
        solved=results["rounding-transformer"],
    )


def _attribution(job: Job, results: Results) -> Stage[Any, Any] | None:
    measured = _measured_inputs(job, results)
    if measured is None:
        return None
    plans, text = job.source(results).plans, job.loaded.recipe.precision.text_encoder
    inputs = attribution_stage.AttributionInputs(
        replace(measured, plan=plans["transformer"]),
        replace(
            measured,
            plan=plans["text_encoder"],
            scales=text.scales,
            round_inputs=True,
            solved=results["rounding-text_encoder"],
        ),
    )
    return Stage("attribution", "attribute the error", inputs, attribution_stage.run, attribution_stage.load)


def _causes(job: Job, results: Results) -> Stage[Any, Made] | None:
    recipe, asked = job.loaded.recipe, attributed_prompts(job.loaded, job.is_large)
    if not asked:
        return None
    steps, size = recipe.fidelity.steps or recipe.sampling.steps, recipe.fidelity.size or recipe.listed_sizes[0]
    plans = job.source(results, with_plan=False).plans.values()
    quantizes = any(Rounded(plan, "max", True).layers for plan in plans)
    if not (quantizes or recipe.step_cache or vae_dtype(job)):
        return None
    inputs = causes_stage.CausesInputs(
        files=job.files.of(*job.files.parts, *WEIGHTED),
        prompts=tuple(prompt for prompt, _ in asked),
        seeds=tuple(seed for _, seed in asked),
        size=size,
        steps=steps,
        guidance=recipe.sampling.guidance,
        text_length=recipe.text.length,
        text_layers=job.original.family.text_layers,
        dtype=recipe.fidelity.reference,
        rows=job.rows(recipe.sampling.guidance),
        rounded=_rounded(job, results, True),
        skips=_skips(results["step-cache"], steps, size) if recipe.step_cache else None,
        vae_dtype=vae_dtype(job),
    )
    if not causes_stage.causes(inputs):
        return None
    title = "generate images of each cause"
    return Stage("attribution-images", title, inputs, causes_stage.run, causes_stage.load)


def _skips(cache: StepCache, steps: int, size: tuple[int, int]) -> causes_stage.Skips:
    """How the step cache skips so many steps at this size: by its rule where it was fitted to others."""
    if cache.mode == "static" and (steps, size) == (cache.steps, cache.size):
        return causes_stage.Skips(cache.schedule, None)
    return causes_stage.Skips((), cache.rule)


def vae_dtype(job: Job) -> str | None:
    """The type of the first target that computes the VAE in another one than the reference; None where there is none."""
    dtypes = [inputs.dtype for inputs in exports(job).values() if inputs.component == "vae"]
    return next((dtype for dtype in dtypes if dtype != job.loaded.recipe.fidelity.reference), None)


def _costs(job: Job, results: Results) -> Stage[Any, Path] | None:
    inputs = _cost_inputs(job, results)
    if inputs is None:
        return None
    asked = costs_stage.FormatInputs(inputs, (), STEPS)
    return Stage("sensitivity-costs", "measure sensitivity", asked, costs_stage.run, costs_stage.load)


def _choice(job: Job, results: Results) -> Stage[Any, dict[str, Any]] | None:
    measured, budget = _cost_inputs(job, results), job.loaded.recipe.precision.transformer.budget
    if measured is None:
        return None
    assert budget is not None
    inputs = sensitivity_stage.ChoiceInputs(measured, results["sensitivity-costs"], budget)
    return Stage("sensitivity", "choose layers", inputs, sensitivity_stage.run_choice, sensitivity_stage.load_choice)


def _with_every_step(job: Job, measured: costs_stage.CostInputs) -> costs_stage.CostInputs:
    """`measured` asked for images as the recipe samples them, with inputs rounded."""
    sampling = job.loaded.recipe.sampling
    asked = measured.request | {"steps": sampling.steps, "guidance": sampling.guidance}
    return replace(measured, request=asked, rows=job.rows(sampling.guidance), round_inputs=True)


def _step_errors(job: Job, results: Results) -> Stage[Any, Any] | None:
    measured = _measured_inputs(job, results)
    if measured is None:
        return None
    recipe, plan = job.loaded.recipe, job.source(results).plans["transformer"]
    of_body = replace(_with_every_step(job, measured), plan=plan)
    inputs = step_errors_stage.StepErrorInputs(of_body, body_plans(recipe.precision, plan))
    run, load = step_errors_stage.run, step_errors_stage.load
    return Stage("step-errors", "measure steps with rounded inputs", inputs, run, load)


def step_precision(job: Job, results: Results) -> StepPrecision | None:
    """Which body each step runs, for the manifest; None where all run the same."""
    precision = job.loaded.recipe.precision
    errors = results["step-errors"] if measures_steps(precision) else None
    plan, steps = job.source(results).plans["transformer"], job.loaded.recipe.sampling.steps
    return schedule_of(precision, plan, steps, errors.gains if errors else None)


def _amax_settings(recipe: Recipe) -> Calibration:
    """What decides which input magnitude a scale stands for; nothing else of `calibration`."""
    asked = recipe.calibration
    return Calibration(prompts="", amax=asked.amax, percentile=asked.percentile, margin=asked.margin)


def _rounding(job: Job, results: Results, component: str) -> Stage[Any, Made] | None:
    precision = getattr(job.loaded.recipe.precision, component)
    if not precision.is_solved:
        return None
    # Before `exclude: auto` chooses, which is to know how layers compute.
    source, calibration = job.source(results, with_plan=False), _calibration(job, results)
    solved = solvable(job.loaded, source, component)
    if not solved:
        return None
    # The recipe's checks refuse to solve weights without a calibration.
    assert calibration is not None
    inputs = rounding_stage.RoundingInputs(
        component=component,
        files=job.files,
        tensors=kept_tensors(source, component),
        plan=solved,
        calibration=calibration,
        scales=precision.scales,
        rounding=precision.rounding,
        rows=job.rows(calibration_request(job.loaded, job.is_large)["guidance"]),
        text_layers=job.original.family.text_layers,
        aside=job.aside(f"rounding-{component}"),
        settings=_amax_settings(job.loaded.recipe) if precision.smoothing != "none" else None,
    )
    return Stage(f"rounding-{component}", f"solve {component} weights", inputs, rounding_stage.run, rounding_stage.load)


def _weights(job: Job, results: Results, component: str) -> Stage[Any, Path]:
    recipe, source = job.loaded.recipe, job.source(results)
    plan = source.plans.get(component, [])
    precision = getattr(recipe.precision, component, None)
    solved = results[f"rounding-{component}"] if component in QUANTIZED else None
    calibration = _calibration(job, results) if needs_calibration(plan) or solved else None
    assumed = {}
    if recipe.calibration.engine == "none":
        assumed = assumed_amax(plan, source.transformer.width, recipe.calibration)
    apart = [name for target in recipe.targets for name in kind_of(target.kind).apart(component, plan)]
    part = source.checkpoint.components[component]
    files: ComponentFiles | Made
    if part is job.original.checkpoint.components[component]:
        digests = job.files.digests[component]
        files = ComponentFiles({file: digests[file.name] for file in part.weight_files})
    else:
        files = Made(part.folder.parent)
    searches = any(FORMATS[entry.format].searches_scales for entry in plan if entry.format in FORMATS)
    tensors = kept_tensors(source, component)
    inputs = weights_stage.WeightsInputs(
        component=component,
        files=files,
        tensors=tensors,
        plan=plan,
        calibration=calibration,
        settings=_amax_settings(recipe) if calibration else None,
        scales=precision.scales if precision and searches else "max",
        shard_bytes=None if recipe.weights.shard_gib is None else int(recipe.weights.shard_gib * 2**30),
        apart=list(dict.fromkeys(apart)),
        assumed=assumed,
        narrow=narrowed(component, tensors),
        solved=solved,
    )
    return Stage(f"weights-{component}", f"write {component} weights", inputs, weights_stage.run, weights_stage.load)


def _target(job: Job, results: Results, target: Target) -> Stage[Any, Path]:
    context, kind = job.context(results), kind_of(target.kind)
    graphs = {name: Made(results[_export_name(inputs)]) for name, inputs in kind.exports(target, context).items()}
    weights = {name: Weights(name, results[f"weights-{name}"]) for name in WEIGHTS_FILE}
    step_cache = results["step-cache"] if job.loaded.recipe.step_cache else None
    work = kind.work(target, context, graphs, weights, step_cache)
    return Stage(f"target-{target.name}", f"build {target.name}", work.inputs, work.run, lambda folder: folder)


def _reference(job: Job) -> Stage[Any, Made] | None:
    recipe = job.loaded.recipe
    if job.fidelity.level == "none":
        return None
    inputs = reference_stage.ReferenceInputs(
        files=job.files.of(*job.files.parts, *WEIGHTED),
        prompts=job.fidelity.prompts,
        size=job.fidelity.size,
        steps=job.fidelity.steps,
        guidance=recipe.sampling.guidance,
        seed=recipe.fidelity.seed,
        text_length=recipe.text.length,
        text_layers=job.original.family.text_layers,
        dtype=recipe.fidelity.reference,
        rows=job.rows(recipe.sampling.guidance),
        tiles=tiles_of_size(recipe.vae, vae_of(job.original.checkpoint), job.fidelity.size),
    )
    return Stage("reference", "generate reference", inputs, reference_stage.run, reference_stage.load)


def _compare(job: Job, results: Results) -> Stage[Any, Path]:
    recipe, pipeline = job.loaded.recipe, job.original.checkpoint.pipeline_class
    reference = results["reference"]
    how = f" in {reference_stage.ran_as(reference).split()[-1]}" if reference else ""
    inputs = compare_stage.CompareInputs(
        title=f"diffusers {pipeline}{how}",
        level=job.fidelity.level,
        reference=reference,
        prompts=job.fidelity.prompts,
        size=job.fidelity.size,
        steps=job.fidelity.steps,
        guidance=recipe.sampling.guidance,
        seed=recipe.fidelity.seed,
        targets=recipe.targets,
        draft=compare_stage.Draft(results[DRAFT]),
    )
    title = "compare with diffusers" if inputs.reference else "compare nothing (fidelity.level: none)"
    return Stage("fidelity", title, inputs, compare_stage.run, compare_stage.load)


def _point(job: Job, results: Results, target: str, point: str) -> Stage[Any, Made]:
    """Images with every step ("full"), as the bundle serves them ("chosen"), or with so many steps skipped."""
    from fluxc.stepcache import frontier

    draft, cache = results[DRAFT], results["step-cache"]
    request = _frontier_request(job, cache)
    full = None if point == "full" else results["frontier-full"]
    methods: dict[str, dict[str, Any]]
    keep: tuple[str, ...]
    if point == "full":
        title, methods, keep = "generate without step cache", {"full": {}}, ()
    elif point == "chosen":
        title, methods, keep = "generate with the step cache", {"chosen": frontier.chosen(cache)}, ("chosen",)
    elif point == "reference":
        title, methods, keep = "generate with the reference's step cache", {point: frontier.of_reference(cache)}, ()
    else:
        title, keep = f"generate with {point} of {cache.steps} steps skipped", (cache.mode,)
        methods = frontier.policies(cache, read_trace(_traced(job, results)).trace, int(point))
    judges = judges_of(job.loaded) if full else {}
    subject = frontier_stages.DraftTarget(draft, target)
    inputs = frontier_stages.PointInputs(subject, request, methods, keep, full, judges)
    return Stage(f"frontier-{point}", title, inputs, frontier_stages.run, frontier_stages.load)


def _cache_figures(job: Job, results: Results, target: str, numbers: list[int]) -> Stage[Any, Made]:
    cache = results["step-cache"]
    inputs = frontier_stages.FiguresInputs(
        target=target,
        request=_frontier_request(job, cache),
        mode=cache.mode,
        traced=_traced(job, results),
        full=results["frontier-full"],
        served=results["frontier-chosen"],
        points={number: results[f"frontier-{number}"] for number in numbers},
        reference=results["frontier-reference"] if cache_settings(job.loaded).compare else None,
    )
    return Stage(
        "step-cache-report", "report the step cache", inputs, frontier_stages.write_figures, frontier_stages.load
    )


def _frontier_request(job: Job, cache: StepCache) -> Any:
    from fluxc.stepcache.frontier import FrontierRequest

    recipe = job.loaded.recipe
    return FrontierRequest(
        job.fidelity.prompts, recipe.fidelity.seed, cache.steps, recipe.sampling.guidance, cache.size
    )
