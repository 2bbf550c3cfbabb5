"""`fluxc build`: the stages in order, and the bundle they end in."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from fluxc.build import stages, target_stages
from fluxc.base.cache import SEAL, StageCache, locked
from fluxc.checkpoint.components import WEIGHTS_FILE, weights_entry, weights_files, write_small_files
from fluxc.base.errors import BuildError
from fluxc.fidelity.gates import check_gates
from fluxc.quantize.source import Source, read_source, with_auto
from fluxc.base.progress import Report, StageProgress
from fluxc.recipe.load import LoadedRecipe
from fluxc.stepcache import stages as step_stages
from fluxc.stepcache.summary import step_cache_lines
from fluxc.targets.visual_gen.check import faults_of
from fluxrt import bundle as format


def build(loaded: LoadedRecipe, out: Path, progress: StageProgress, only: str | None = None) -> Path | None:
    """Compile `loaded` into the bundle folder `out` and return it; with `only`, stop after that stage and return None.

    Results of stages are kept beside `out` in `.fluxc/`. The bundle appears by rename when complete, in place of an older
    one. Raises the errors of the stages, and GateError when the result misses the recipe's gates.
    """
    recipe = loaded.recipe
    if out.exists() and not (out / format.MANIFEST).is_file():
        raise BuildError(f"{out}: exists and is not a bundle; give another --out, or move it away")
    cache = StageCache(out.resolve().parent / ".fluxc", progress)
    with locked(cache.root):
        source = original = read_source(loaded)
        target_stages.check_targets(loaded, source)
        target_stages.check_libraries(recipe)
        if recipe.step_cache:
            step_stages.trace_request(loaded)
            step_stages.judges_of(loaded)
        if recipe.calibration.engine == "modelopt":
            from fluxc.calibrate.modelopt import check_available

            check_available()
        held_out = loaded.prompts("fidelity.prompts", recipe.fidelity.prompts)
        with progress.stage("hash checkpoint") as report:
            digests = stages.checkpoint_digests(source.checkpoint, cache, report)
        calibration = stages.given_calibration(loaded, digests)
        trace = step_stages.given_trace(loaded, digests)
        # Tracing needs no weights and finds what does not fit before the long stages begin; the VAE is the quickest.
        traces = {
            name: stages.run_trace(cache, name, loaded, source) for name in ("vae", "text_encoder", "transformer")
        }
        graphs_of = {
            target.name: target_stages.run_graphs(cache, target, loaded, source, traces) for target in recipe.targets
        }
        prompting = stages.run_prompting(cache, recipe, source, digests)
        stages.check_prompts(loaded, source, prompting)
        if only == "graphs":
            return None
        stored = digests
        if recipe.calibration.engine == "modelopt":
            source = read_source(loaded, stages.run_modelopt(cache, loaded, original, digests))
            stored = stages.checkpoint_digests(source.checkpoint, cache, lambda *_: None)
        if calibration is None and (source.quantizes or only == "calibrate"):
            calibration = stages.run_calibration(cache, loaded, original, digests)
        if only == "calibrate":
            return None
        step_cache = None
        if recipe.step_cache:
            trace = trace or step_stages.run_step_trace(cache, loaded, original, digests)
            size = recipe.calibration.size or recipe.sizes[0]
            step_cache = step_stages.run_step_cache(cache, recipe, size, trace)
            for line in step_cache_lines(step_cache):
                progress.say(line)
        if only == "step-cache":
            return None
        sensitivity: dict[str, Any] | None = None
        if recipe.precision.transformer.keep == "auto" and calibration:
            sensitivity = stages.run_sensitivity(cache, loaded, source, digests, calibration)
            source = with_auto(loaded, source, sensitivity["ranking"])
        weights = {name: stages.run_weights(cache, name, recipe, source, stored, calibration) for name in WEIGHTS_FILE}
        if only == "weights":
            return None
        targets = {
            t.name: target_stages.run_visual_gen(cache, t, recipe, source, weights, step_cache)
            if t.is_visual_gen
            else target_stages.run_target(cache, t, recipe, source, graphs_of[t.name], weights)
            for t in recipe.targets
        }
        if only == "targets":
            return None

        staging = Path(tempfile.mkdtemp(prefix=".bundle-", dir=cache.root))
        try:
            stored_plans = {name: source.stored_plan(name) for name in WEIGHTS_FILE}
            write_small_files(source.checkpoint, staging, stored_plans, source.text_layers_kept)
            for name, folder in weights.items():
                for file in weights_files(folder, name):
                    _take_weights(file, staging / name / file.name, cache.root, out)
                if (index := folder / weights_entry(folder, name)) not in weights_files(folder, name):
                    shutil.copyfile(index, staging / name / index.name)
            entries = _place_targets(loaded, targets, staging)
            manifest = format.Manifest(
                format=format.FORMAT,
                format_version=format.FORMAT_VERSION,
                name=recipe.name,
                digest="",
                family=source.family.pipeline_class,
                recipe=_resolved(loaded),
                provenance=format.Provenance(
                    source=recipe.model.source,
                    checkpoint=digests,
                    tools=stages.provenance_tools(recipe),
                    built_at="",
                ),
                components={name: f"{name}/{weights_entry(folder, name)}" for name, folder in weights.items()},
                precision=_precision(source),
                prompting=prompting,
                sampling=msgspec.convert(stages.sampling_entry(recipe, source), format.Sampling),
                targets=entries,
                fidelity={},
                pictures=(),
                files=_files(staging, cache),
            )
            fidelity = _run_fidelity(cache, loaded, original, staging, manifest, weights, sensitivity, held_out)
            figures = json.loads((fidelity / "report" / "report.json").read_text())
            snr = {layer["name"]: layer["snr_db"] for layer in figures["layers"] if layer["snr_db"] is not None}
            folders = [fidelity]
            cached: dict[str, Any] | None = None
            if trace and step_cache:
                drawn = format.Bundle(staging, msgspec.structs.replace(manifest, step_cache=step_cache))
                frontier = step_stages.run_frontier(cache, loaded, drawn, trace, held_out)
                if frontier:
                    folders.append(frontier)
                    cached = json.loads((frontier / "report" / "step-cache.json").read_text())["chosen"]
            check_gates(recipe.gates, snr, figures["targets"], cached)
            if only == "fidelity":
                return None
            for folder in folders:
                for file in sorted(p for p in folder.rglob("*") if p.is_file()):
                    if file.name not in ("pictures.json", SEAL):
                        (staging / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(file, staging / file.relative_to(folder))
            summary = {
                name: {key: value for key, value in target.items() if key != "prompts"}
                for name, target in figures["targets"].items()
            }
            pictures = json.loads((fidelity / "pictures.json").read_text())
            manifest = msgspec.structs.replace(
                manifest,
                fidelity={"reference": figures["reference"], "targets": summary, "ranks": figures["ranks"]}
                | _cached_figures(cached),
                step_cache=step_cache,
                pictures=tuple(msgspec.convert(p, format.Picture) for p in pictures),
                files=_files(staging, cache),
            )
            if _is_current(out, manifest, cache):
                _leave_weights(weights, out)
                progress.cached(f"bundle {out.name}")
                return out
            now = datetime.now(UTC).isoformat(timespec="seconds")
            stamped = msgspec.structs.replace(manifest.provenance, built_at=now)
            manifest = msgspec.structs.replace(manifest, provenance=stamped)
            (staging / format.MANIFEST).write_bytes(format.encode_manifest(manifest))
            staging.chmod(0o755)
            _sync(staging)
            _replace(staging, out)
            _leave_weights(weights, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        cache.prune()
    return out


def _place_targets(loaded: LoadedRecipe, targets: dict[str, Path], staging: Path) -> tuple[format.Target, ...]:
    """Copy every target's files into the bundle; targets whose graph is the same to the byte share one file."""
    entries = []
    for target in loaded.recipe.targets:
        folder = targets[target.name]
        entry = msgspec.json.decode((folder / "target.json").read_bytes(), type=format.Target)
        graphs = {}
        for name, graph in entry.graphs.items():
            content = (folder / graph.file).read_bytes()
            file = graph.file
            if (staging / file).exists() and (staging / file).read_bytes() != content:
                file = f"{graph.file.removesuffix('.onnx')}.{target.name}.onnx"
            if not (staging / file).exists():
                shutil.copyfile(folder / graph.file, staging / file)
            graphs[name] = msgspec.structs.replace(graph, file=file)
        for plan in entry.engine.plans.values() if entry.engine else ():
            for file in filter(None, (plan.source, plan.file)):
                (staging / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / file, staging / file)
        if entry.visual_gen:
            _place_visual_gen(folder, entry.visual_gen, staging)
        entries.append(msgspec.structs.replace(entry, graphs=graphs))
    return tuple(entries)


def _place_visual_gen(folder: Path, entry: format.VisualGen, staging: Path) -> None:
    """Put the folder into the bundle, with links to the bundle's own files, and refuse one that VisualGen would not take."""
    for file in sorted(path for path in (folder / entry.folder).rglob("*") if path.is_file()):
        target = staging / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Of weights one copy on the disk is enough; the others are small, and may be edited.
        (_link_or_copy if file.suffix == ".safetensors" else shutil.copyfile)(file, target)
    for name, file in json.loads((folder / "links.json").read_text()).items():
        link = staging / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(staging / file, link.parent))
    faults = faults_of(staging / entry.folder, entry.text_length)
    if faults:
        raise BuildError(
            f"target visual_gen: TensorRT-LLM would not take the folder: {'; '.join(faults[:4])}"
            f"{' and more' if len(faults) > 4 else ''}. No bundle was written"
        )


def _run_fidelity(
    cache: StageCache,
    loaded: LoadedRecipe,
    source: Source,
    staging: Path,
    manifest: format.Manifest,
    weights: dict[str, Path],
    sensitivity: dict[str, Any] | None,
    prompts: list[str],
) -> Path:
    """report/ and pictures.json: the bundle's targets against diffusers."""
    recipe = loaded.recipe
    layers = [layer for folder in weights.values() for layer in json.loads((folder / "layers.json").read_text())]

    def work(folder: Path, report: Report) -> None:
        from fluxc.fidelity.run import measure

        measure(folder, source, recipe, format.Bundle(staging, manifest), prompts, layers, sensitivity, report)

    inputs = [
        manifest.provenance.checkpoint,
        {name: [file.size, file.sha256] for name, file in manifest.files.items()},
        msgspec.to_builtins([manifest.targets, manifest.prompting, manifest.sampling, recipe.fidelity]),
        recipe.name,
        prompts,
        sensitivity,
        recipe.step_cache is not None,
    ]
    return cache.run("fidelity", "compare with diffusers", inputs, work)


def _cached_figures(cached: dict[str, Any] | None) -> dict[str, Any]:
    """The manifest's entry on pictures with the step cache against those without."""
    left_out = ("by_prompt", "policy", "worst_prompt")
    return {"step_cache": {key: value for key, value in cached.items() if key not in left_out}} if cached else {}


def _precision(source: Source) -> tuple[format.Layer, ...]:
    return tuple(
        format.Layer(
            component=entry.component,
            name=entry.layer.name,
            shape=(entry.layer.out_features, entry.layer.in_features),
            format=entry.format,
            rule=entry.rule,
            group=entry.layer.group,
            bytes_before=entry.source_bytes,
            bytes_after=entry.bytes_after,
        )
        for plan in source.plans.values()
        for entry in plan
    )


def _resolved(loaded: LoadedRecipe) -> dict[str, Any]:
    """The recipe with every default filled in and the prompts themselves in place of their files."""
    recipe: dict[str, Any] = msgspec.to_builtins(loaded.recipe)
    for field in ("calibration", "fidelity", "step_cache"):
        if recipe[field] and recipe[field]["prompts"]:
            recipe[field]["prompts"] = loaded.prompts(f"{field}.prompts", recipe[field]["prompts"])
    return recipe


def _files(root: Path, cache: StageCache) -> dict[str, format.File]:
    return {
        path.relative_to(root).as_posix(): format.File(path.stat().st_size, cache.file_digest(path))
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != format.MANIFEST
    }


def _is_current(out: Path, manifest: format.Manifest, cache: StageCache) -> bool:
    """Whether the bundle at `out` is already what this build makes, and undamaged."""
    try:
        existing = format.open_bundle(out).manifest
    except format.BundleError:
        return False
    return existing.digest == format.manifest_digest(manifest) and _files(out, cache) == existing.files


def _take_weights(cached: Path, target: Path, cache_root: Path, out: Path) -> None:
    """Put a weights file into the bundle being made, without copying where it need not be shared.

    A file in the cache, or in the bundle that is about to be replaced, is linked: the other name goes away in the end. A
    file that another bundle owns is copied, because onnx refuses to load external data with several hard links.
    """
    source = cached.resolve()
    ours = source.is_relative_to(out.resolve())
    if ours or (source.is_relative_to(cache_root) and source.stat().st_nlink == 1):
        _link_or_copy(source, target)
    else:
        shutil.copyfile(source, target)


def _link_or_copy(source: Path, target: Path) -> None:
    """Another name for a file, or a copy where the file system gives it none."""
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copyfile(source, target)


def _leave_weights(weights: dict[str, Path], out: Path) -> None:
    """Let the finished bundle own its weights: in the cache, a symbolic link to them takes the file's place."""
    for name, folder in weights.items():
        for cached in weights_files(folder, name):
            owned = out.resolve() / name / cached.name
            if not cached.is_symlink() and cached.samefile(owned):
                link = cached.with_name(f".{cached.name}.link")
                link.unlink(missing_ok=True)
                link.symlink_to(os.path.relpath(owned, cached.parent))
                link.replace(cached)


def _sync(folder: Path) -> None:
    for path in (*sorted(folder.rglob("*")), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(staging: Path, out: Path) -> None:
    """Put the finished bundle in place; an older one is moved aside first and removed last."""
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = None
    if out.exists():
        aside = Path(tempfile.mkdtemp(prefix=".replaced-", dir=staging.parent))
        out.replace(aside / out.name)
    try:
        staging.replace(out)
    except OSError:
        if aside:
            (aside / out.name).replace(out)
        raise
    if aside:
        shutil.rmtree(aside, ignore_errors=True)
