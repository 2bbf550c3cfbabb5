"""`fluxc build`: the stages in order, and the bundle they end in."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from fluxc.base.cache import StageCache, cache_root, locked
from fluxc.base.errors import BuildError
from fluxc.base.output import check_output, names_place
from fluxc.base.progress import StageProgress
from fluxc.build import bundle_writer
from fluxc.build.job import Job, check_machine, check_prompts, check_workshop, hash_checkpoint, open_job, prompting_of
from fluxc.build.readme import place_readme
from fluxc.build.runner import Results, run_steps
from fluxc.build.stages import DRAFT, comparing, layers_of, provenance_tools, sampling_entry, steps
from fluxc.checkpoint.components import WEIGHTS_FILE
from fluxc.fidelity.gates import check_gates, check_stages, stage_bounds
from fluxc.recipe.load import LoadedRecipe
from fluxc.stepcache.summary import step_cache_lines
from fluxc.targets.parts import Weights
from fluxrt import manifest as format
from fluxrt.bundle import Bundle


def build(loaded: LoadedRecipe, out: Path, progress: StageProgress, until: str | None = None) -> Path | None:
    """Compile `loaded` into the bundle folder `out` and return it; with `until`, stop after that part and return None.

    Results of stages are kept beside `out` in `.fluxc/`, or in the folder that FLUXC_CACHE names. The bundle appears by rename
    when complete, in place of an older one. Raises the errors of the stages, and GateError when the result misses the recipe's
    gates.
    """
    check_output(out, "a bundle", is_folder=True)
    if out.exists() and not (out / format.MANIFEST).is_file():
        raise BuildError(f"{out}: exists and is not a bundle; give another --out, or move it away")
    check_workshop(out)
    job = open_job(loaded, cache_root(out))
    check_machine(loaded)
    _say_where_kernels_are(progress)
    with names_place("build", out), locked(out) as workshop, StageCache(job.root, progress) as cache:
        prompting = prompting_of(cache, job)
        check_prompts(job, prompting)
        hash_checkpoint(cache, job)
        results = Results()
        run_steps(cache, steps(job, until), results, until)
        if results.get("step-cache"):
            for line in step_cache_lines(results["step-cache"]):
                progress.say(line)
        if until in (None, "fidelity", "bundle"):
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
    recipe = job.loaded.recipe
    weights = {name: Weights(name, results[f"weights-{name}"]) for name in WEIGHTS_FILE}
    manifest = _draft(cache, job, prompting, results, weights, staging, out)
    results.add(DRAFT, Bundle(staging, manifest))
    run_steps(cache, comparing(job), results)
    folders = [results["compare"], *([results["frontier"].folder] if "frontier" in results else [])]
    figures = json.loads((folders[0] / "report" / "report.json").read_text())
    cached: dict[str, Any] | None = None
    if "frontier" in results:
        cached = json.loads((folders[1] / "report" / "step-cache.json").read_text())["chosen"]
    snr = {layer["name"]: layer["snr_db"] for layer in layers_of(results) if layer["snr_db"] is not None}
    plans = job.source(results).plans
    bounds = {target.name: stage_bounds(target, recipe.fidelity.reference, plans) for target in recipe.targets}
    check_stages(figures["targets"], bounds)
    check_gates(recipe.gates, snr, figures["targets"], cached)
    if compare_only:
        return
    bundle_writer.place_reports(folders, staging)
    manifest = msgspec.structs.replace(
        manifest,
        fidelity=bundle_writer.fidelity_entry(figures, cached),
        images=bundle_writer.recorded(folders[0]),
    )
    place_readme(job.source(results).checkpoint.root, manifest, staging)
    manifest = msgspec.structs.replace(manifest, files=bundle_writer.files_of(staging, cache))
    if bundle_writer.is_current(out, manifest, cache):
        bundle_writer.leave_weights(weights, out, cache)
        cache.progress.cached(f"bundle {out.name}")
        return
    bundle_writer.tell_lost_evidence(out, cache)
    bundle_writer.finish(staging, out, manifest, cache)
    bundle_writer.leave_weights(weights, out, cache)


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
    )
