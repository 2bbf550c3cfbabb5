"""`fluxc calibrate`, `fluxc trace` and `fluxc merge-traces`: what a build measures, as files made on other machines."""

from __future__ import annotations

from pathlib import Path

from fluxc.base.errors import FluxError, RecipeError
from fluxc.base.output import check_output, names_place
from fluxc.base.progress import StageProgress
from fluxc.build.preflight import measuring
from fluxc.build.requests import cache_settings, trace_request
from fluxc.build.runner import Results, run_steps
from fluxc.build.stages import calibration_inputs, step_trace_inputs, tracing_steps
from fluxc.calibrate.file import CalibrationFile, read_calibration
from fluxc.calibrate.stage import calibrate_into
from fluxc.recipe.load import LoadedRecipe
from fluxc.stepcache.file import TraceFile, merge_traces, read_trace, write_trace
from fluxc.stepcache.trace_stage import trace_into
from fluxrt.errors import RequestError


def check_device(device: str) -> None:
    """Refuse a device that is not here, before anything is hashed."""
    from fluxc.running.placement import check_device as check

    check(device)


def calibrate_to_file(loaded: LoadedRecipe, out: Path, device: str, progress: StageProgress) -> CalibrationFile:
    """Write the calibration of `loaded` to `out` and return it; prompts finished before an interruption are not run again.

    An older calibration file at `out` is replaced; BuildError if something else is there. Hashes of the checkpoint and
    finished prompts are kept in `.fluxc/` beside `out`.
    """
    if loaded.recipe.calibration.engine == "none":
        raise RecipeError(
            "calibration.engine: none runs no model, so there is nothing to measure; leave `engine` out, or build as it is"
        )
    check_output(out, "a calibration file")
    if out.exists():
        try:
            read_calibration(out)
        except FluxError as error:
            raise RecipeError(f"{out}: exists and is not a calibration file; give another --out") from error
    check_device(device)
    with measuring(loaded, out, progress, "calibrate") as (_, job), progress.stage("calibrate") as report:
        calibrate_into(calibration_inputs(job, out.stem), out, device, report)
    return read_calibration(out)


def trace_to_file(
    loaded: LoadedRecipe, out: Path, device: str, part: tuple[int, int], progress: StageProgress
) -> TraceFile:
    """Write the trace of part `part[0]` of `part[1]` of the prompts to `out` and return it; finished prompts survive an
    interruption.

    The model is traced as the recipe quantizes it, so it is calibrated first where that is needed, and its weights are solved;
    several machines take one `calibration.file`. An older trace at `out` is replaced; BuildError if something else is there.
    Hashes of the checkpoint, results and finished prompts are kept in `.fluxc/` beside `out`.
    """
    if loaded.recipe.step_cache is None:
        raise RecipeError(
            "step_cache: this recipe has none, so there is nothing to trace for; add `step_cache: {skip: auto}`"
        )
    _check_replaceable(out)
    number, parts = part
    asked = len(trace_request(loaded)["prompts"])
    if parts > asked:
        raise RequestError(f"--part {number}/{parts}: there are {asked} prompts; make at most as many parts")
    images = list(range((number - 1) * asked // parts, number * asked // parts))
    check_device(device)
    given = ("calibration",) if cache_settings(loaded).traced == "quantized" else ()
    with measuring(loaded, out, progress, "step-trace", given, tracing_steps) as (cache, job):
        results = Results()
        run_steps(cache, tracing_steps(job), results)
        with progress.stage("trace steps") as report:
            trace_into(step_trace_inputs(job, results, out.stem), images, out, device, report)
    return read_trace(out)


def merge_to_file(paths: list[Path], out: Path) -> TraceFile:
    """Write the images of all `paths` as one trace; BuildError naming a file that does not belong to the others."""
    _check_replaceable(out)
    merged = merge_traces([read_trace(path) for path in paths])
    with names_place("merge traces", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_trace(out, *merged)
    return read_trace(out)


def _check_replaceable(out: Path) -> None:
    check_output(out, "a trace file")
    if out.exists():
        try:
            read_trace(out)
        except FluxError as error:
            raise RecipeError(f"{out}: exists and is not a trace file; give another --out") from error
