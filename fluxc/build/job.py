"""What a build is made from: recipe and checkpoint, with everything refused that can be refused from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from fluxc.base.cache import PROGRESS, StageCache
from fluxc.base.errors import BuildError, CheckpointError, RecipeError
from fluxc.base.measured import Origin, check_origin, check_request
from fluxc.base.progress import StageProgress
from fluxc.build.requests import (
    FidelityRequest,
    calibration_request,
    fidelity_request,
    judges_of,
    level_of,
    trace_request,
)
from fluxc.build.runner import NotBuiltError, Results, Stage
from fluxc.calibrate.file import has_calls, read_calibration
from fluxc.checkpoint import template_stage
from fluxc.checkpoint.components import small_files
from fluxc.checkpoint.files import Aside, CheckpointFiles, Digests, checkpoint_digests
from fluxc.checkpoint.named import faults_of
from fluxc.families.prompting import check_tokenizer, system_message
from fluxc.formats.registry import FORMATS
from fluxc.quantize.plan import to_quantize
from fluxc.quantize.source import Source, read_source, with_auto
from fluxc.recipe.faults import Collected
from fluxc.recipe.load import LoadedRecipe
from fluxc.recipe.structs import QUANTIZED
from fluxc.stepcache.file import check_complete, read_trace
from fluxc.targets.base import TargetContext
from fluxc.targets.registry import kind_of
from fluxrt.manifest import Prompting
from fluxrt.prompt import PromptEncoder

MEASURED_AT = {
    "step_cosine": ("stages", "images"),
    "compute_error": ("stages", "images"),
    "image_psnr_db": ("images",),
    "step_cache_psnr_db": ("images",),
}
"""By gate of the comparison, the values of `fidelity.level` that measure it."""


@dataclass(frozen=True)
class Given:
    """A file of measurements that the recipe names, and what they were made on."""

    path: Path
    origin: Origin


@dataclass
class Job:
    """What the steps of a build are made from. `digests` are None where hashes are not known yet (a dry run)."""

    loaded: LoadedRecipe
    original: Source
    root: Path
    digests: Digests | None = None
    calibration: Given | None = None
    trace: Given | None = None
    _sources: dict[str, Source] = field(default_factory=dict)

    @property
    def is_large(self) -> bool:
        """Whether the defaults of measuring are those of a large model."""
        return self.original.is_large

    @property
    def fidelity(self) -> FidelityRequest:
        """What every target is compared with diffusers on."""
        return fidelity_request(self.loaded, self.is_large)

    @property
    def given_calibration(self) -> Path | None:
        """The calibration file that the recipe names."""
        return self.calibration.path if self.calibration else None

    @property
    def given_trace(self) -> Path | None:
        """The trace file that the recipe names."""
        return self.trace.path if self.trace else None

    @property
    def files(self) -> CheckpointFiles:
        """The checkpoint's files."""
        if self.digests is None:
            raise NotBuiltError("hash checkpoint")
        return CheckpointFiles(self.original.checkpoint, self.digests)

    def aside(self, name: str) -> Aside:
        """Where unfinished work of that name is kept."""
        return Aside(self.root / PROGRESS / name)

    def prompting(self, rendered: dict[str, Any]) -> Prompting:
        """The manifest's `prompting`, of the chat template as the template stage rendered it."""
        length = self.loaded.recipe.text.length
        return msgspec.convert({"tokenizer": "tokenizer/tokenizer.json", "length": length} | rendered, Prompting)

    def rows(self, guidance: float) -> int:
        """Rows of a CFG batch at this guidance: conditional and unconditional, or one."""
        return 2 if self.original.cfg_batch and guidance > 1.0 else 1

    @property
    def unused(self) -> list[str]:
        """What the recipe asks of the model that changes nothing, in sentences."""
        recipe, source = self.loaded.recipe, self.original
        if source.cfg_batch or source.transformer.guidance_embeds:
            return []
        asked = {
            "sampling.guidance": recipe.sampling.guidance,
            "calibration.guidance": 1.0 if recipe.calibration.guidance is None else recipe.calibration.guidance,
        }
        return [
            f"{field} {scale:g} changes nothing: this model is distilled and takes no guidance; leave it out"
            for field, scale in asked.items()
            if scale != 1.0
        ]

    def source(self, results: Results, with_plan: bool = True) -> Source:
        """The source as earlier steps left it: modelopt's export in place of the transformer, and, `with_plan`, the plan that
        `exclude: auto` came to."""
        recipe = self.loaded.recipe
        source = self.original
        if recipe.calibration.engine == "modelopt":
            exported = results["modelopt"]
            source = self._sources.setdefault("modelopt", read_source(self.loaded, exported))
        if with_plan and recipe.precision.transformer.exclude == "auto":
            measured = results["sensitivity"]
            source = with_auto(self.loaded, source, measured["ranking"]) if measured else source
        return source

    def context(self, results: Results) -> TargetContext:
        """What targets are made for."""
        return TargetContext(self.loaded.recipe, self.source(results))


GIVEN = ("calibration", "trace")
"""The measurements that a recipe can name files of."""


def open_job(loaded: LoadedRecipe, root: Path, given: tuple[str, ...] = GIVEN) -> Job:
    """The job of `loaded`, its results in the cache folder `root`. Headers, configs, prompt files and given measurements are
    read, nothing else, and the recipe's own files before a checkpoint that may have to be fetched. A job that makes a
    measurement needs only those `given` that come before it.

    Raises RecipeError with all that no build of it could do, or CheckpointError.
    """
    recipe, collected = loaded.recipe, Collected(loaded.places)
    calibration = trace = None
    # Which of the prompts are taken depends on the model, whether the files can be read does not.
    with collected.collecting():
        calibration_request(loaded, is_large=False)
        if "calibration" in given:
            calibration = _given_calibration(loaded)
    with collected.collecting():
        fidelity_request(loaded, is_large=False)
    if recipe.step_cache:
        with collected.collecting():
            trace_request(loaded)
            if "trace" in given:
                trace = _given_trace(loaded)
    with collected.collecting():
        judges_of(loaded)
    for fault in faults_of(recipe.model, loaded.folder):
        with collected.collecting():
            raise fault
    collected.raise_all()
    job = Job(loaded, read_source(loaded), root, None, calibration, trace)
    check_tokenizer(job.original.checkpoint.components["tokenizer"].folder)
    with collected.collecting():
        check_targets(TargetContext(recipe, job.original))
    with collected.collecting():
        _check_engine(job)
    with collected.collecting():
        _check_compared_traces(job)
    if calibration:
        with collected.collecting():
            _check_calibration(job, calibration)
    collected.raise_all()
    return job


def _check_engine(job: Job) -> None:
    """Refuse modelopt for a checkpoint that is quantized, or for formats that it does not have."""
    if job.loaded.recipe.calibration.engine != "modelopt":
        return
    if job.original.quantized["transformer"]:
        raise RecipeError(
            "calibration.engine: the checkpoint is quantized already; leave `engine` out, or use the original"
        )
    from fluxc.calibrate.modelopt import check_formats

    check_formats(job.original.plans["transformer"])


def _check_compared_traces(job: Job) -> None:
    """Refuse to compare the trace of the quantized model with that of the checkpoint's where they are one."""
    settings, plans = job.loaded.recipe.step_cache, job.original.plans.values()
    rounds = any(target.rounds_inputs for target in job.loaded.recipe.targets)
    quantizes = any(to_quantize(plan) or (rounds and any(e.quantized_in_source for e in plan)) for plan in plans)
    if settings and settings.compare and not quantizes and job.loaded.recipe.calibration.engine != "modelopt":
        raise RecipeError(
            "step_cache.compare: no layer of this recipe's model is rounded, so both traces would be the same; leave it out"
        )


def check_targets(context: TargetContext) -> None:
    """Refuse targets that cannot be made for this recipe and checkpoint, and gates that nothing would be held to."""
    recipe, collected = context.recipe, Collected()
    for at, target in enumerate(recipe.targets):
        with collected.collecting():
            kind_of(target.kind).check(f"targets[{at}]", target, context)
    gates = recipe.gates
    level = level_of(recipe, context.source.is_large)
    gated = [name for name in MEASURED_AT if getattr(gates, name) is not None]
    for name in gated:
        with collected.collecting():
            if level not in MEASURED_AT[name]:
                default = "" if recipe.fidelity.level else ", the default for a large model"
                raise RecipeError(
                    f"gates.{name}: fidelity.level is {level}{default}, which measures nothing that could be held to it; set "
                    f"fidelity.level to {MEASURED_AT[name][0]}, or leave the gate out"
                )
    with collected.collecting():
        if gated and not any(target.runs_here for target in recipe.targets):
            raise RecipeError(
                f"gates.{gated[0]}: no target of this recipe runs on the machine that builds, so nothing would be held to it; "
                "add {kind: onnxruntime, activations: nvfp4}, which rounds as an FP4 GPU does, or leave the gate out"
            )
    collected.raise_all()


def template_of(job: Job, digest: Callable[[Path], str]) -> Stage[Any, dict[str, Any]]:
    """The stage that renders the chat template; `digest` gives hashes of the tokenizer's files."""
    checkpoint = job.original.checkpoint
    component = checkpoint.components["tokenizer"]
    hashes = {file.name: digest(file) for file in small_files(component)}
    files = CheckpointFiles(checkpoint, {"tokenizer": hashes}, ("tokenizer",))
    prompts = job.original.family.prompts
    system = system_message(prompts.system) if prompts.system else None
    inputs = template_stage.TemplateInputs(files, component.class_name, prompts, system)
    return Stage("template", "render chat template", inputs, template_stage.run, template_stage.load)


def check_prompts(job: Job, prompting: Prompting) -> None:
    """Refuse prompts of the recipe that are longer than the compiled text; diffusers would cut them without a word."""
    loaded, length = job.loaded, job.loaded.recipe.text.length
    encoder = PromptEncoder(prompting, job.original.checkpoint.components["tokenizer"].folder / "tokenizer.json")

    def tokens(prompt: str) -> int:
        return len(encoder.tokens(prompt))

    collected = Collected()
    for name in ("calibration", "fidelity", "step_cache"):
        file = getattr(getattr(loaded.recipe, name), "prompts", None)
        if file is None:
            continue
        count, prompt = max((tokens(prompt), prompt) for prompt in loaded.prompts(f"{name}.prompts", file))
        with collected.collecting():
            if count > length:
                shown = prompt if len(prompt) <= 48 else f"{prompt[:47]}…"
                raise RecipeError(
                    f"{name}.prompts: the prompt {shown!r} is {count} tokens long with its chat template ({tokens('')} "
                    f"tokens), and text.length is {length}; shorten it, or set text.length to at least {count}"
                )
    collected.raise_all()


def fetch_missing(job: Job, progress: StageProgress) -> bool:
    """Download the weights that the job's checkpoint lacks here; whether there were any. The job must be opened again then."""
    for notice in job.original.checkpoint.notices:
        progress.say(notice)
    missing = job.original.checkpoint.missing
    if missing:
        from fluxc.checkpoint.fetch import fetch

        fetch(missing, progress)
    return bool(missing)


def hash_checkpoint(cache: StageCache, job: Job) -> None:
    """Hash the checkpoint's files, and refuse measurements given by the recipe that were made on others."""
    if job.original.checkpoint.missing:
        raise BuildError(f"{job.loaded.recipe.model.source}: its weights are still on the hub; build again")
    with cache.progress.stage("hash checkpoint") as report:
        job.digests = checkpoint_digests(job.original.checkpoint, cache.file_digest, report)
    if job.calibration:
        check_origin(job.calibration, job.files.digests, calibration_request(job.loaded, job.is_large))
    if job.trace:
        check_origin(job.trace, job.files.digests, trace_request(job.loaded))


def _given_calibration(loaded: LoadedRecipe) -> Given | None:
    """The calibration file that the recipe names; None if it names none."""
    name = loaded.recipe.calibration.file
    if name is None:
        return None
    try:
        file = read_calibration(loaded.path("calibration.file", name))
    except (BuildError, CheckpointError) as error:
        raise RecipeError(f"calibration.file: {error}") from error
    return Given(file.path, file.origin)


def _check_calibration(job: Job, given: Given) -> None:
    """Refuse a calibration file that was asked something else, or lacks the inputs of a layer whose format needs them."""
    path, source = given.path, job.original
    file = read_calibration(path)
    try:
        check_request(file, calibration_request(job.loaded, job.is_large))
    except (BuildError, CheckpointError) as error:
        raise RecipeError(f"calibration.file: {error}") from error
    records = file.records
    for component in QUANTIZED:
        precision = getattr(job.loaded.recipe.precision, component)
        if precision.is_solved and not has_calls(path, component):
            field = "low_rank" if precision.rounding == "nearest" else "rounding: gptq"
            raise RecipeError(
                f"calibration.file: {path}: it holds no calls of the {component}, which precision.{component}.{field} "
                "solves weights against; measure again with this version, or leave one of the two out"
            )
    for component, plan in source.plans.items():
        for entry in to_quantize(plan):
            record = records.get(component, {}).get(entry.layer.name)
            if (FORMATS[entry.format].calibrated or entry.is_smoothed) and (
                record is None or len(record.channel_amax) != entry.layer.in_features
            ):
                raise RecipeError(
                    f"calibration.file: {path}: it lacks the inputs of {component} layer {entry.layer.name!r}, which is to be "
                    f"{entry.format}; measure again with this version, or leave calibration.file out"
                )


def _given_trace(loaded: LoadedRecipe) -> Given | None:
    """The trace file that the recipe names, after checking what it was asked and that it is complete; None without one."""
    settings = loaded.recipe.step_cache
    if settings is None or settings.trace is None:
        return None
    try:
        file = read_trace(loaded.path("step_cache.trace", settings.trace))
        asked = trace_request(loaded)
        if asked["precision"] is not None and file.origin.request.get("precision") is None:
            raise BuildError(
                f"{file.path}: is of the checkpoint's own model; trace again, which takes the model as this recipe quantizes "
                "it, or set step_cache.traced: reference"
            )
        check_request(file, asked)
        check_complete(file)
    except (BuildError, CheckpointError) as error:
        raise RecipeError(f"step_cache.trace: {error}") from error
    return Given(file.path, file.origin)
