"""`fluxc build`: the stages in order, and the bundle they end in."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from fluxc.base.cache import Made, StageCache, locked
from fluxc.base.errors import GateError
from fluxc.base.output import names_place
from fluxc.base.progress import StageProgress
from fluxc.build import bundle_writer
from fluxc.build.budget import Budget, budget_line, budget_lines, predicted_seconds, rates_for
from fluxc.build.budget_rates import Rates
from fluxc.build.job import Job, fetch_missing, hash_checkpoint, template_of
from fluxc.build.preflight import preflight
from fluxc.build.readme import place_readme
from fluxc.build.runner import Results, count_steps, run, run_steps, up_to
from fluxc.build.stages import (
    DRAFT,
    comparing,
    layers_of,
    provenance_computed,
    provenance_measured,
    provenance_tools,
    sampling_entry,
    step_precision,
    steps,
)
from fluxc.checkpoint.components import WEIGHTS_FILE
from fluxc.fidelity.causes_stage import FILE as CAUSES
from fluxc.fidelity.evidence import evidence_entry
from fluxc.fidelity.gates import check_gates, check_stages, gated_snr, stage_bounds
from fluxc.recipe.load import LoadedRecipe
from fluxc.report.assemble import assemble
from fluxc.report.structs import Report
from fluxc.report.verdict import verdict
from fluxc.stepcache.summary import step_cache_lines
from fluxc.targets.parts import Weights
from fluxc.targets.registry import kind_of
from fluxrt import manifest as format
from fluxrt.bundle import Bundle
from fluxrt.memory import repeatable

WRITE_BUNDLE = "write bundle"
REPORTED = ("frontier", "attribution-images")
"""Steps besides the comparison whose images are the report's."""


def build(loaded: LoadedRecipe, out: Path, progress: StageProgress, until: str | None = None) -> Path | None:
    """Compile `loaded` into the bundle folder `out` and return it; with `until`, stop after that part and return None.

    Results of stages are kept beside `out` in `.fluxc/`, or in the folder that FLUXC_CACHE names. The bundle appears by rename
    when complete, in place of an older one. Raises the errors of the stages, and GateError when the result misses the recipe's
    gates: the report is then kept in `failed_folder(out)`, until a build of `out` succeeds.
    """
    ready = preflight(loaded, out, until, is_build=True)
    fetched = fetch_missing(ready.job, progress)
    if fetched:
        ready = preflight(loaded, out, until, is_build=True)
    job = ready.job
    _say_where_kernels_are(progress)
    rates = rates_for(job)
    _tell_budget(ready.budget, rates, progress)
    for sentence in job.unused:
        progress.say(sentence)
    with repeatable(), names_place("build", out), locked(out) as workshop, StageCache(job.root, progress) as cache:
        predicted = [0.0] * fetched + predicted_seconds(ready.budget, rates)
        progress.expect(fetched + _count_stages(job, until), predicted)
        prompting = job.prompting(run(cache, template_of(job, cache.file_digest)))
        hash_checkpoint(cache, job)
        results = Results()
        run_steps(cache, steps(job, until), results, until)
        if results.get("step-cache"):
            for line in step_cache_lines(results["step-cache"]):
                progress.say(line)
        if _compares(until):
            staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=workshop))
            try:
                _make_bundle(cache, job, prompting, results, staging, out, until == "fidelity")
            finally:
                with cache.relinking(bundle_writer.linked_files(out)):
                    shutil.rmtree(staging, ignore_errors=True)
        if until not in (None, "bundle"):
            return None
        cache.remember(str(out.resolve()))
        cache.prune()
    return out


def _tell_budget(budget: Budget, rates: Rates, progress: StageProgress) -> None:
    line = budget_line(budget, rates)
    if line:
        progress.note(line)
    for line in budget_lines(budget, rates):
        progress.explain(line)


def failed_folder(out: Path) -> Path:
    """Where the report of a build of `out` is kept whose result missed its gates."""
    return out.with_name(f"{out.name}-failed")


def _compares(until: str | None) -> bool:
    return until in (None, "fidelity", "bundle")


def _count_stages(job: Job, until: str | None) -> int:
    """How many stages a build shows: the chat template, the checkpoint's hashes, its steps, and the bundle."""
    listed = up_to(steps(job, until), until) + (list(comparing(job)) if _compares(until) else [])
    return 2 + count_steps(listed) + (until in (None, "bundle"))


def _say_where_kernels_are(progress: StageProgress) -> None:
    from fluxc.formats.kernel_cache import kernel_folder

    notice = kernel_folder()[1]
    if notice:
        progress.say(notice)


def _make_bundle(
    cache: StageCache,
    job: Job,
    prompting: format.Prompting,
    results: Results,
    staging: Path,
    out: Path,
    compare_only: bool,
) -> None:
    """Put the bundle together in `staging`, compare it, hold it against the gates, and put it in place of `out`."""
    weights = {name: Weights(name, results[f"weights-{name}"]) for name in WEIGHTS_FILE}
    manifest = _draft(cache, job, prompting, results, weights, staging, out)
    results.add(DRAFT, Bundle(staging, manifest))
    run_steps(cache, comparing(job), results)
    folders = [results["compare"], *(made.folder for name in REPORTED if (made := results.get(name)))]
    report, failure = _report(job, results, manifest, folders)
    if failure:
        page = bundle_writer.keep_failed(folders, report, staging, failed_folder(out))
        raise GateError(f"{failure}; what was measured: {page}") from None
    bundle_writer.drop_failed(failed_folder(out))
    if compare_only:
        return
    bundle_writer.place_reports(folders, report, staging)
    manifest = msgspec.structs.replace(
        manifest,
        fidelity=bundle_writer.fidelity_entry(report),
        images=bundle_writer.recorded(folders[0]),
        evidence=_evidence(job, results, folders[0]) or msgspec.UNSET,
    )
    bundle_writer.place_evidence(folders[0], staging)
    place_readme(job.source(results).checkpoint.root, manifest, staging)
    manifest = msgspec.structs.replace(manifest, files=bundle_writer.files_of(staging, cache))
    if bundle_writer.is_current(out, manifest, cache):
        bundle_writer.leave_weights(weights, out, cache)
        cache.progress.cached(WRITE_BUNDLE)
        return
    with cache.progress.stage(WRITE_BUNDLE):
        bundle_writer.tell_lost_evidence(out, cache)
        bundle_writer.finish(staging, out, manifest, cache)
        bundle_writer.leave_weights(weights, out, cache)


def _report(
    job: Job, results: Results, manifest: format.Manifest, folders: list[Path]
) -> tuple[Report, GateError | None]:
    """The report of the bundle in the making, and why no bundle may be made of it, if any gate says so."""
    recipe, source = job.loaded.recipe, job.source(results)
    figures = json.loads((folders[0] / "figures.json").read_text())
    cached, causes = (
        _json_of(results.get("frontier"), "step-cache.json"),
        _json_of(results.get("attribution-images"), CAUSES),
    )
    chosen = cached["chosen"] if cached else None
    layers = layers_of(results)
    snr = {layer["name"]: decibels for layer in layers if (decibels := gated_snr(layer)) is not None}
    bounds = {target.name: stage_bounds(target, recipe.fidelity.reference, source.plans) for target in recipe.targets}
    failure: GateError | None = None
    try:
        check_stages(figures["targets"], bounds)
        check_gates(recipe.gates, snr, figures["targets"], chosen)
    except GateError as error:
        failure = error
    found = verdict(recipe.gates, snr, figures["targets"], bounds, chosen, str(failure or ""))
    evidence = {entry.name: kind_of(entry.kind).evidence(entry) for entry in manifest.targets}
    if recipe.step_cache and cached is None:
        figures["not_compared"].append(_step_cache_left_out(figures["level"]))
    errors = results.get("step-errors")
    figures |= {
        "engines": {name: found for name, found in evidence.items() if found},
        "layers": layers,
        "sensitivity": results["sensitivity"],
        "attribution": results.get("attribution"),
        "step_errors": {"prompts": errors.prompts, "errors": errors.roots} if errors else None,
        "causes": causes,
    }
    return assemble(job.loaded, source, manifest, figures, cached, found), failure


def _json_of(made: Made | None, name: str) -> dict[str, Any] | None:
    """The figures in the file `name` of a stage's result; None where it did not run."""
    if made is None:
        return None
    found: dict[str, Any] = json.loads((made.folder / name).read_text())
    return found


def _step_cache_left_out(level: str) -> dict[str, str]:
    """Why nothing was measured of the step cache."""
    runs = "no target ran where the bundle was built"
    why = runs if level == "images" else f"fidelity.level is {level}, which generates no images; or {runs}"
    return msgspec.to_builtins(format.NotCompared("step cache", "images with steps skipped", why))


def _evidence(job: Job, results: Results, compared: Path) -> format.Evidence | None:
    """The manifest's `evidence`, of what the comparison left in the folder `compared`."""
    recipe, figures = job.loaded.recipe, json.loads((compared / "figures.json").read_text())
    plans = job.source(results).plans
    return evidence_entry(compared, figures["targets"], recipe.targets, recipe.fidelity.reference, plans)


def _draft(
    cache: StageCache,
    job: Job,
    prompting: format.Prompting,
    results: Results,
    weights: dict[str, Weights],
    staging: Path,
    out: Path,
) -> format.Manifest:
    """Everything but the report in `staging`, and a manifest of it without figures."""
    loaded, recipe, source = job.loaded, job.loaded.recipe, job.source(results)
    bundle_writer.place_components(source, weights, staging, out, cache)
    targets = {target.name: results[f"target-{target.name}"] for target in recipe.targets}
    entries = bundle_writer.place_targets(recipe, targets, staging)
    return format.Manifest(
        format=format.FORMAT,
        format_version=format.FORMAT_VERSION,
        name=recipe.name,
        digest="",
        family=source.family.pipeline_class,
        recipe=bundle_writer.resolved_recipe(loaded),
        provenance=format.Provenance(
            source=recipe.model.source,
            checkpoint=job.files.digests,
            tools=provenance_tools(recipe),
            built_at="",
            computed=provenance_computed(job, results),
            measured=provenance_measured(job, results),
            commits=source.checkpoint.commits or msgspec.UNSET,
        ),
        components={name: written.entry for name, written in weights.items()},
        precision=bundle_writer.precision_entries(source),
        prompting=prompting,
        sampling=msgspec.convert(sampling_entry(job), format.Sampling),
        targets=entries,
        fidelity=format.Fidelity("", {}, {}),
        images=(),
        files=bundle_writer.files_of(staging, cache),
        step_cache=results.get("step-cache"),
        step_precision=step_precision(job, results) or msgspec.UNSET,
    )
