"""`fluxc build`: the stages in order, and the bundle they end in."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from fluxc import stages
from fluxc.cache import StageCache
from fluxc.components import WEIGHTS_FILE, write_small_files
from fluxc.errors import BuildError
from fluxc.fidelity.gates import check_gates
from fluxc.progress import Report, StageProgress
from fluxc.recipe import LoadedRecipe
from fluxrt import bundle as format

STAGES = ("calibrate", "weights", "graphs", "targets", "fidelity", "bundle")


def build(loaded: LoadedRecipe, out: Path, progress: StageProgress, only: str | None = None) -> Path | None:
    """Compile `loaded` into the bundle folder `out` and return it; with `only`, stop after that stage and return None.

    Results of stages are kept beside `out` in `.fluxc/`. The bundle appears by rename when complete, in place of an older
    one. Raises the errors of the stages, and GateError when the result misses the recipe's gates.
    """
    recipe = loaded.recipe
    if out.exists() and not (out / format.MANIFEST).is_file():
        raise BuildError(f"{out}: exists and is not a bundle; give another --out, or move it away")
    cache = StageCache(out.resolve().parent / ".fluxc", progress)
    with _locked(cache.root):
        source = stages.read_source(loaded)
        held_out = loaded.prompts("fidelity.prompts", recipe.fidelity.prompts)
        with progress.stage("hash checkpoint"):
            digests = stages.checkpoint_digests(source.checkpoint, cache)
        quantizes = any(entry.format != "bf16" for plan in source.plans.values() for entry in plan)
        calibration = None
        if quantizes or only == "calibrate":
            calibration = stages.run_calibration(cache, loaded, source, digests)
        if only == "calibrate":
            return None
        weights = {name: stages.run_weights(cache, name, source, digests, calibration) for name in WEIGHTS_FILE}
        if only == "weights":
            return None
        traces = {name: stages.run_trace(cache, name, loaded, source) for name in WEIGHTS_FILE}
        prompting = stages.run_prompting(cache, recipe, source, digests)
        if only == "graphs":
            return None
        targets = {t.name: stages.run_target(cache, t, source, traces, weights) for t in recipe.targets}
        if only == "targets":
            return None

        staging = Path(tempfile.mkdtemp(prefix=".bundle-", dir=cache.root))
        try:
            write_small_files(source.checkpoint, staging, source.plans, source.text_layers_kept)
            for name, folder in weights.items():
                _link(folder / WEIGHTS_FILE[name], staging / name / WEIGHTS_FILE[name])
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
                    tools=stages.provenance_tools(),
                    built_at="",
                ),
                components={name: f"{name}/{file}" for name, file in WEIGHTS_FILE.items()},
                precision=_precision(source),
                prompting=msgspec.convert(prompting, format.Prompting),
                sampling=msgspec.convert(stages.sampling_entry(recipe, source), format.Sampling),
                targets=entries,
                fidelity={},
                pictures=(),
                files=_files(staging, cache),
            )
            fidelity = _run_fidelity(cache, loaded, source, staging, manifest, weights, held_out)
            figures = json.loads((fidelity / "report" / "report.json").read_text())
            snr = {layer["name"]: layer["snr_db"] for layer in figures["layers"]}
            check_gates(recipe.gates, snr, figures["targets"])
            if only == "fidelity":
                return None
            for file in sorted(p for p in fidelity.rglob("*") if p.is_file()):
                if file.name != "pictures.json":
                    _link(file, staging / file.relative_to(fidelity))
            summary = {
                name: {key: value for key, value in target.items() if key != "prompts"}
                for name, target in figures["targets"].items()
            }
            pictures = json.loads((fidelity / "pictures.json").read_text())
            manifest = msgspec.structs.replace(
                manifest,
                fidelity={"reference": figures["reference"], "targets": summary},
                pictures=tuple(msgspec.convert(p, format.Picture) for p in pictures),
                files=_files(staging, cache),
            )
            if _is_current(out, manifest):
                progress.cached(f"bundle {out.name}")
                return out
            now = datetime.now(UTC).isoformat(timespec="seconds")
            stamped = msgspec.structs.replace(manifest.provenance, built_at=now)
            manifest = msgspec.structs.replace(manifest, provenance=stamped)
            (staging / format.MANIFEST).write_bytes(format.encode_manifest(manifest))
            staging.chmod(0o755)
            _sync(staging)
            _replace(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        cache.prune()
    return out


def _place_targets(loaded: LoadedRecipe, targets: dict[str, Path], staging: Path) -> tuple[format.Target, ...]:
    """Link every target's graphs into the bundle; targets whose graph is the same to the byte share one file."""
    entries = []
    for target in loaded.recipe.targets:
        folder = targets[target.name]
        graphs = msgspec.json.decode((folder / "target.json").read_bytes(), type=dict[str, format.Graph])
        for name, graph in graphs.items():
            content = (folder / graph.file).read_bytes()
            file = graph.file
            if (staging / file).exists() and (staging / file).read_bytes() != content:
                file = f"{graph.file.removesuffix('.onnx')}.{target.name}.onnx"
            if not (staging / file).exists():
                _link(folder / graph.file, staging / file)
            graphs[name] = msgspec.structs.replace(graph, file=file)
        entries.append(format.Target(target.name, target.kind, target.activations, graphs))
    return tuple(entries)


def _run_fidelity(
    cache: StageCache,
    loaded: LoadedRecipe,
    source: stages.Source,
    staging: Path,
    manifest: format.Manifest,
    weights: dict[str, Path],
    prompts: list[str],
) -> Path:
    """report/ and pictures.json: the bundle's targets against diffusers."""
    recipe = loaded.recipe
    layers = [layer for folder in weights.values() for layer in json.loads((folder / "layers.json").read_text())]

    def work(folder: Path, report: Report) -> None:
        from fluxc.fidelity.run import measure

        measure(folder, source, recipe, format.Bundle(staging, manifest), prompts, layers, report)

    inputs = [
        manifest.provenance.checkpoint,
        {name: [file.size, file.sha256] for name, file in manifest.files.items()},
        msgspec.to_builtins([manifest.targets, manifest.prompting, manifest.sampling, recipe.fidelity]),
        recipe.name,
        prompts,
    ]
    return cache.run("fidelity", "compare with diffusers", inputs, work)


def _precision(source: stages.Source) -> tuple[format.Layer, ...]:
    return tuple(
        format.Layer(
            component=entry.component,
            name=entry.layer.name,
            shape=(entry.layer.out_features, entry.layer.in_features),
            format=entry.format,
            rule=entry.rule,
            group=entry.layer.group,
            bytes_before=2 * entry.parameters,
            bytes_after=entry.bytes_after,
        )
        for plan in source.plans.values()
        for entry in plan
    )


def _resolved(loaded: LoadedRecipe) -> dict[str, Any]:
    """The recipe with every default filled in and the prompts themselves in place of their files."""
    recipe: dict[str, Any] = msgspec.to_builtins(loaded.recipe)
    for field in ("calibration", "fidelity"):
        recipe[field]["prompts"] = loaded.prompts(f"{field}.prompts", recipe[field]["prompts"])
    return recipe


def _files(root: Path, cache: StageCache) -> dict[str, format.File]:
    return {
        path.relative_to(root).as_posix(): format.File(path.stat().st_size, cache.file_digest(path))
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != format.MANIFEST
    }


def _is_current(out: Path, manifest: format.Manifest) -> bool:
    """Whether the bundle at `out` is already what this build makes, and undamaged."""
    try:
        existing = format.open_bundle(out)
        format.verify_files(existing)
    except format.BundleError:
        return False
    return existing.manifest.digest == format.manifest_digest(manifest)


def _link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system cannot link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


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


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One build at a time in a cache folder; what a killed build left there is removed first."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BuildError(
                f"{root}: another fluxc build is using this folder; wait for it, or give another --out"
            ) from None
        for leftover in root.glob(".*-*"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
        yield
