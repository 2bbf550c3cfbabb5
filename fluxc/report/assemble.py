"""Puts a report together from what a build measured and the manifest of the bundle in the making."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec

from fluxc.fidelity.evidence import FOLDER
from fluxc.fidelity.on_target import entries_of
from fluxc.quantize.source import Source
from fluxc.recipe.load import LoadedRecipe
from fluxc.report.gains import predicted, sizes_of
from fluxc.report.structs import (
    Attribution,
    CauseImages,
    LayerFigures,
    Report,
    StepCacheFigures,
    StepPrecisionFigures,
    TargetFigures,
    Tiling,
    Verdict,
)
from fluxc.report.tiers import never_run, stages_matched, tiers_of
from fluxrt.manifest import Manifest, NotCompared, RankFidelity


def assemble(
    loaded: LoadedRecipe,
    source: Source,
    manifest: Manifest,
    figures: dict[str, Any],
    cached: dict[str, Any] | None,
    verdict: Verdict,
) -> Report:
    """The report of `manifest`, a bundle in the making.

    `figures` is what the comparison measured (fluxc.fidelity.run), `cached` what the frontier of the step cache did (None
    where no target ran).
    """
    recipe = loaded.recipe
    tiers = tiers_of(manifest.targets, stages_matched(verdict, figures["targets"], figures["ranks"]), ())
    return Report(
        name=recipe.name,
        family=manifest.family,
        verdict=verdict,
        never_run=never_run(tiers, (), figures["level"]),
        tiers=tiers,
        sizes=sizes_of(source),
        file_bytes=file_bytes(manifest),
        prediction=predicted(loaded, source),
        reference=figures["reference"],
        prompts=tuple(figures["prompts"]),
        seed=recipe.fidelity.seed,
        steps=figures["steps"],
        guidance=figures["guidance"],
        size=(figures["size"][0], figures["size"][1]),
        text_length=manifest.prompting.length,
        sampling=manifest.sampling,
        targets=msgspec.convert(figures["targets"], dict[str, TargetFigures]),
        ranks=msgspec.convert(figures["ranks"], dict[str, RankFidelity]),
        not_run=tuple(figures["not_run"]),
        level=figures["level"],
        not_compared=msgspec.convert(figures["not_compared"], tuple[NotCompared, ...]),
        tiling=msgspec.convert(figures["tiling"], Tiling | None),
        engines=figures["engines"],
        layers=_layers(manifest, figures["layers"]),
        sensitivity=figures["sensitivity"],
        attribution=msgspec.convert(figures.get("attribution"), Attribution | None),
        causes=msgspec.convert(figures.get("causes"), CauseImages | None),
        step_cache=_step_cache(manifest, cached),
        step_precision=_step_precision(manifest, figures.get("step_errors")),
        recipe=manifest.recipe,
        source=manifest.provenance.source,
        checkpoint=manifest.provenance.checkpoint,
        tools=manifest.provenance.tools,
    )


def as_it_is(report: Report, manifest: Manifest) -> Report:
    """`report` with what changed since the build: engines that `fluxc finish` built, and what ran on GPUs."""
    from fluxc.targets.registry import KINDS

    entries = entries_of(manifest)
    ran = stages_matched(report.verdict, report.targets, report.ranks)
    tiers = tiers_of(manifest.targets, ran, entries)
    found = {target.name: KINDS[target.kind].evidence(target) for target in manifest.targets if target.kind in KINDS}
    return msgspec.structs.replace(
        report,
        tiers=tiers,
        never_run=never_run(tiers, entries, report.level),
        engines={name: evidence for name, evidence in found.items() if evidence},
        file_bytes=file_bytes(manifest),
        on_target=entries,
    )


def file_bytes(manifest: Manifest) -> dict[str, int]:
    """Bytes of the bundle's files by folder; not of the report, nor of the evidence or what lies in no folder, which are put
    there after it."""
    total: Counter[str] = Counter()
    for name, file in manifest.files.items():
        folder, in_folder, _ = name.partition("/")
        if in_folder and folder not in ("report", FOLDER):
            total[folder] += file.size
    return dict(sorted(total.items()))


def _layers(manifest: Manifest, measured: list[dict[str, Any]]) -> tuple[LayerFigures, ...]:
    """Every Linear of the precision plan, the quantized ones with their errors."""
    found = {(layer["component"], layer["name"]): layer for layer in measured}
    layers = []
    for entry in manifest.precision:
        errors = found.get((entry.component, entry.name))
        fields = {name: errors[name] for name in ("scales", "snr_db", "output_snr_db", "rounding")} if errors else {}
        plain = msgspec.to_builtins(entry) | fields
        plain["quantized_in_checkpoint"] = bool(errors) and fields["scales"] is None
        layers.append(plain)
    return msgspec.convert(layers, tuple[LayerFigures, ...])


def _step_precision(manifest: Manifest, measured: dict[str, Any] | None) -> StepPrecisionFigures | None:
    if isinstance(manifest.step_precision, msgspec.UnsetType):
        return None
    return msgspec.convert({"schedule": manifest.step_precision, **(measured or {})}, StepPrecisionFigures)


def _step_cache(manifest: Manifest, cached: dict[str, Any] | None) -> StepCacheFigures | None:
    cache = manifest.step_cache
    if cache is None:
        return None
    plain = msgspec.to_builtins(cache)
    plain.pop("on_mismatch")
    return msgspec.convert(plain | (cached or {}), StepCacheFigures)
