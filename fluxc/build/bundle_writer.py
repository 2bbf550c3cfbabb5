"""Puts results together as a bundle: files in their places, the manifest, the rename."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from fluxc.base.cache import SEAL, StageCache, beside
from fluxc.base.errors import BuildError
from fluxc.base.numbers import check_finite
from fluxc.checkpoint.components import WEIGHTS_FILE
from fluxc.fidelity.causes_stage import FILE as CAUSES
from fluxc.fidelity.evidence import FOLDER, INDEX
from fluxc.fidelity.on_target import digest_without_entries, entries_of
from fluxc.quantize.component_files import write_small_files
from fluxc.quantize.source import Source
from fluxc.recipe.load import LoadedRecipe
from fluxc.recipe.structs import Recipe
from fluxc.report.page import write_report
from fluxc.report.structs import Report
from fluxc.targets.parts import Weights, copy_file, link_or_copy, read_entry
from fluxc.targets.registry import kind_of
from fluxrt import manifest as format
from fluxrt.bundle import is_ignored, open_bundle
from fluxrt.errors import BundleError

LEFT_OUT = ("images.json", "figures.json", "step-cache.json", CAUSES, INDEX, SEAL)
"""Files of a result that are not for the bundle."""


def place_components(
    source: Source, weights: Mapping[str, Weights], staging: Path, out: Path, cache: StageCache
) -> None:
    """Put configs, tokenizer, scheduler and weights into the bundle being made at `staging`."""
    stored_plans = {name: source.stored_plan(name) for name in WEIGHTS_FILE}
    write_small_files(source.checkpoint, staging, stored_plans, source.text_layers_kept)
    for name, written in weights.items():
        for file in written.files:
            _take_weights(file, staging / name / file.name, cache, out)
        index = written.folder / Path(written.entry).name
        if index not in written.files:
            shutil.copyfile(index, staging / name / index.name)


def place_targets(recipe: Recipe, targets: Mapping[str, Path], staging: Path) -> tuple[format.Target, ...]:
    """Put every target's files into the bundle; their manifest entries."""
    folders = [(target.kind, targets[target.name]) for target in recipe.targets]
    return tuple(kind_of(kind).place(read_entry(folder), folder, staging) for kind, folder in folders)


def place_reports(folders: list[Path], report: Report, staging: Path) -> Path:
    """Copy the images of results that are the report's, and write the report and its page; the page."""
    for folder in folders:
        for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in LEFT_OUT):
            if FOLDER in file.relative_to(folder).parts:
                continue
            (staging / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, staging / file.relative_to(folder))
    return write_report(staging, report)


def place_evidence(compared: Path, staging: Path) -> None:
    """Copy the evidence files of the comparison's folder into the bundle being made; there may be none."""
    if (compared / FOLDER).is_dir():
        shutil.copytree(compared / FOLDER, staging / FOLDER)


def keep_failed(folders: list[Path], report: Report, staging: Path, failed: Path) -> Path:
    """Put the report of results that no bundle is made of into the folder `failed`, in place of an earlier one; its page.

    Where something else has that name, it stays, and the report goes to the folder that the name gets a number for.
    """
    made = staging / "failed"
    page = place_reports(folders, report, made)
    made.chmod(0o755)
    number, place = 1, failed
    while not drop_failed(place):
        number += 1
        place = failed.with_name(f"{failed.name}-{number}")
    made.replace(place)
    return place / page.relative_to(made)


def drop_failed(failed: Path) -> bool:
    """Remove what `keep_failed` left in `failed`; False where something else has that name, which stays."""
    if not (failed.exists() or failed.is_symlink()):
        return True
    if failed.is_symlink() or not failed.is_dir() or [path.name for path in failed.iterdir()] != ["report"]:
        return False
    shutil.rmtree(failed)
    return True


def fidelity_entry(report: Report) -> format.Fidelity:
    """The manifest's `fidelity`: figures by target, not by prompt, and those of images with the step cache."""
    plain = msgspec.to_builtins({"targets": report.targets, "ranks": report.ranks})
    for figures in plain["targets"].values():
        figures.pop("prompts")
    entry = {"reference": report.reference, "level": report.level, "not_compared": report.not_compared, **plain}
    if report.tiling:
        entry["tiling"] = msgspec.to_builtins(report.tiling)
    chosen = report.step_cache.chosen if report.step_cache else None
    if chosen:
        cached = msgspec.to_builtins(chosen)
        left_out = ("by_prompt", "policy", "worst_prompt")
        judged = {name for name in ("lpips", "image_text") if cached[name] is None}
        entry["step_cache"] = {name: value for name, value in cached.items() if name not in {*left_out, *judged}}
    return msgspec.convert(entry, format.Fidelity)


def recorded(compared: Path) -> tuple[format.RecordedImage, ...]:
    """The images that the comparison recorded, with the requests they came from."""
    images = json.loads((compared / "images.json").read_text())
    return tuple(msgspec.convert(image, format.RecordedImage) for image in images)


def precision_entries(source: Source) -> tuple[format.Layer, ...]:
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


def resolved_recipe(loaded: LoadedRecipe) -> dict[str, Any]:
    """The recipe with the defaults filled in that do not depend on the model, and the prompts in place of their files."""
    recipe: dict[str, Any] = msgspec.to_builtins(loaded.recipe)
    for field in ("calibration", "fidelity", "step_cache"):
        if recipe[field] and recipe[field]["prompts"]:
            recipe[field]["prompts"] = loaded.prompts(f"{field}.prompts", recipe[field]["prompts"])
    return recipe


def files_of(root: Path, cache: StageCache) -> dict[str, format.File]:
    """Size and SHA-256 of every file but the manifest."""
    return {
        path.relative_to(root).as_posix(): format.File(path.stat().st_size, cache.file_digest(path))
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != format.MANIFEST and not is_ignored(path)
    }


def is_current(out: Path, manifest: format.Manifest, cache: StageCache) -> bool:
    """Whether the bundle at `out` is already what this build makes, and undamaged; it keeps what was added of GPUs."""
    try:
        existing = open_bundle(out).manifest
    except BundleError:
        return False
    return (
        digest_without_entries(existing) == format.manifest_digest(manifest) and files_of(out, cache) == existing.files
    )


def tell_lost_evidence(out: Path, cache: StageCache) -> None:
    """Say that what GPUs did with the bundle at `out` goes with it: the one that replaces it is another."""
    try:
        entries = entries_of(open_bundle(out).manifest)
    except BundleError:
        return
    if entries:
        cache.progress.say(
            f"{out}: what {len(entries)} GPUs did was about the bundle that is now replaced, and is not taken over; run "
            "`fluxc gpu-check` again"
        )


def finish(staging: Path, out: Path, manifest: format.Manifest, cache: StageCache) -> None:
    """Write the manifest and put the finished bundle in place of `out`."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    stamped = msgspec.structs.replace(manifest.provenance, built_at=now)
    manifest = msgspec.structs.replace(manifest, provenance=stamped)
    check_finite(msgspec.to_builtins(manifest), "manifest")
    (staging / format.MANIFEST).write_bytes(format.encode_manifest(manifest))
    staging.chmod(0o755)
    _sync(staging)
    _replace(staging, out, cache)


def leave_weights(weights: Mapping[str, Weights], out: Path, cache: StageCache) -> None:
    """Let the finished bundle own its weights: in its own cache, a symbolic link to them takes the file's place."""
    if cache.root != beside(out):
        return
    for name, written in weights.items():
        for cached in written.files:
            owned = out.resolve() / name / cached.name
            if not cached.is_symlink() and cached.samefile(owned):
                link = cached.with_name(f".{cached.name}.link")
                link.unlink(missing_ok=True)
                link.symlink_to(os.path.relpath(owned, cached.parent))
                with cache.relinking([owned]):
                    link.replace(cached)


def linked_files(folder: Path) -> list[Path]:
    """The files of `folder` that have other names too."""
    return [path for path in folder.rglob("*") if not path.is_symlink() and path.is_file() and path.stat().st_nlink > 1]


def _take_weights(cached: Path, target: Path, cache: StageCache, out: Path) -> None:
    """Put a weights file into the bundle being made, without copying where it need not be shared.

    A file in the bundle's own cache, or in the bundle that is about to be replaced, is linked: the other name goes away in the
    end. A file that another bundle owns, or a shared cache, is copied, because onnx refuses to load external data with several
    hard links.
    """
    source = cached.resolve()
    ours = source.is_relative_to(out.resolve())
    own_cache = cache.root == beside(out) and source.is_relative_to(cache.root)
    if ours or (own_cache and source.stat().st_nlink == 1):
        with cache.relinking([source]):
            link_or_copy(source, target)
    else:
        copy_file(source, target)
    sealed = json.loads((cached.parent / SEAL).read_text())[cached.name]
    if cache.file_digest(target) != sealed:
        raise BuildError(f"{source}: it changed while the bundle was made; build again")


def _sync(folder: Path) -> None:
    for path in (*sorted(folder.rglob("*")), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(staging: Path, out: Path, cache: StageCache) -> None:
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
        with cache.relinking(linked_files(out)):
            shutil.rmtree(aside, ignore_errors=True)
