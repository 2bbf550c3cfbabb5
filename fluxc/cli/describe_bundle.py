"""What `inspect` and `doctor` print: a bundle, and what a machine can do with it."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from fluxc.base.console import new_console, new_table
from fluxc.calibrate.amax import margin_of
from fluxc.calibrate.summary import in_words
from fluxc.cli.doctor import machine_checks, target_checks
from fluxc.fidelity.on_target import digest_without_entries, entries_of
from fluxc.formats.registry import FORMATS
from fluxc.gpu_check.evidence import evidence_lines
from fluxc.quantize.plan import IN_SOURCE
from fluxc.recipe.structs import Calibration
from fluxc.report.tiers import UNCOMPARED
from fluxc.targets.registry import KINDS
from fluxrt.bundle import Bundle
from fluxrt.manifest import Manifest
from fluxrt.stepprecision import step_words


def print_bundle(bundle: Bundle) -> None:
    """The manifest in words: what was compiled, formats, targets, fidelity, sizes."""
    manifest = bundle.manifest
    console = new_console()
    console.print(f"{manifest.name}: {manifest.family}, bundle format {manifest.format_version}")
    commits = "".join(f", {repo} at commit {commit}" for repo, commit in (manifest.provenance.commits or {}).items())
    console.print(f"from {manifest.provenance.source}{commits}, built {manifest.provenance.built_at}")
    console.print(f"digest {manifest.digest}")
    sampling = manifest.sampling
    sizes = ", ".join(f"{height}x{width}" for height, width in sampling.sizes)
    sizes += ", and all between the last two" if sampling.range else ""
    console.print(
        f"sizes {sizes}; text {manifest.prompting.length} tokens; {sampling.steps} steps; guidance {sampling.guidance}"
    )
    table = new_table(
        "component",
        "format",
        "layers",
        "bytes before",
        "bytes after",
        title="precision",
    )
    totals: dict[tuple[str, str], list[int]] = {}
    for layer in manifest.precision:
        row = totals.setdefault((layer.component, layer.format), [0, 0, 0])
        for at, value in enumerate((1, layer.bytes_before, layer.bytes_after)):
            row[at] += value
    for (component, format), (layers, before, after) in totals.items():
        table.add_row(component, format, str(layers), f"{before:,}", f"{after:,}")
    console.print(table)
    steps = [] if isinstance(manifest.step_precision, msgspec.UnsetType) else step_words(manifest.step_precision)
    for line in [*steps, *level_lines(manifest), *_scale_lines(manifest)]:
        console.print(line)
    table = new_table(
        "target",
        "velocity cosine",
        "image PSNR, mean",
        "worst",
        "SSIM",
        title="fidelity",
    )
    for target in manifest.targets:
        figures = manifest.fidelity.targets.get(target.name, {"step_cosine": "not run"})
        keys = ("step_cosine", "image_psnr_db", "image_psnr_db_worst", "image_ssim")
        if target.name not in manifest.fidelity.ranks:
            table.add_row(target.name, *("" if figures.get(key) is None else str(figures[key]) for key in keys))
    console.print(table)
    for name, ranked in manifest.fidelity.ranks.items():
        console.print(
            f"{name}: {ranked.ranks} processes generate what {ranked.against} generates in one: PSNR "
            f"{ranked.image_psnr_db} dB mean, {ranked.image_psnr_db_worst} dB worst"
        )
    for target in manifest.targets:
        shown = KINDS[target.kind].inspect(target) if target.kind in KINDS else None
        if shown:
            console.print(shown)
    digest = digest_without_entries(manifest)
    for line in [*_evidence_words(manifest), *_cache_lines(manifest), *evidence_lines(entries_of(manifest), digest)]:
        console.print(line)
    size = sum(file.size for file in manifest.files.values())
    computed, measured = manifest.provenance.computed or {}, manifest.provenance.measured or {}
    ran = "; ".join(
        f"{what} on {where}" + (f" ({measured[what]})" if what in measured else "") for what, where in computed.items()
    )
    if ran:
        console.print(f"computed: {ran}")
    tools = ", ".join(f"{name} {version}" for name, version in manifest.provenance.tools.items())
    console.print(f"{len(manifest.files)} files, {size:,} bytes; built with {tools}")


def level_lines(manifest: Manifest) -> Iterator[str]:
    """What a build did not compare: loudly where that is everything."""
    level = manifest.fidelity.level
    if level == "none":
        yield UNCOMPARED[level]
        return
    if isinstance(level, str):
        yield f"compared with {manifest.fidelity.reference}: {'stages and images' if level == 'images' else 'stages alone'}"
    tiling = manifest.fidelity.tiling
    if not isinstance(tiling, msgspec.UnsetType):
        tile = "x".join(map(str, tiling["tile"]))
        yield (
            f"decoded in tiles of {tile}: the reference's own images decoded so have {tiling['psnr_db']} dB to the whole, "
            f"{tiling['psnr_db_worst']} at worst"
        )
    if not isinstance(manifest.fidelity.not_compared, msgspec.UnsetType):
        for left_out in manifest.fidelity.not_compared:
            yield f"not compared: {left_out.what} of {left_out.target}: {left_out.why}"


def _evidence_words(manifest: Manifest) -> Iterator[str]:
    """What there is to say of the evidence."""
    evidence = manifest.recorded
    if evidence is None:
        return
    count = len(evidence.prompts)
    size = sum(manifest.files[entry.file].size for entry in evidence.prompts)
    height, width = evidence.size
    yield (
        f"evidence: {count} prompt{'s' if count > 1 else ''} at {height}x{width}, {len(evidence.sigmas)} velocities of "
        f"{evidence.steps} steps, {size:,} bytes; `fluxrt verify` replays it"
    )


def _scale_lines(manifest: Manifest) -> Iterator[str]:
    """What input scales stand for, where fluxc chose them."""
    asked = manifest.recipe["calibration"]
    # A bundle without the field is from before there was a margin.
    asked = {
        "margin": 1.0,
        **{field: asked[field] for field in ("engine", "amax", "percentile", "margin") if field in asked},
    }
    calibration = Calibration(**asked)
    chosen = {layer.format for layer in manifest.precision if not layer.rule.startswith(IN_SOURCE)} & FORMATS.keys()
    margins = {format: margin_of(format, calibration) for format in sorted(chosen) if FORMATS[format].calibrated}
    if margins:
        yield f"input scales: {in_words(calibration, margins)}"


def _cache_lines(manifest: Manifest) -> Iterator[str]:
    """What there is to say of the step cache."""
    if not manifest.step_cache:
        return
    from fluxc.stepcache.summary import step_cache_lines

    yield from step_cache_lines(manifest.step_cache)
    cached = manifest.fidelity.step_cache
    if cached:
        mean, low, worst = (cached.get(key) for key in ("psnr_db", "psnr_db_p5", "psnr_db_worst"))
        yield f"against every step: PSNR {mean} dB mean, {low} dB 5th percentile, {worst} dB worst"


def print_targets(bundle: Bundle) -> None:
    """Which of a bundle's targets this machine runs, which it would choose, and what stands in the others' way."""
    table = new_table("target", "runs here", "why", title=f"targets of {bundle.manifest.name}")
    for check in target_checks(bundle):
        table.add_row(check.what, check.ready, check.detail)
    new_console().print(table)


def print_doctor() -> None:
    """What this machine can build and run, and what to do for what it cannot."""
    checks = machine_checks()
    console, table = new_console(), new_table("what", "ready", "with")
    for check in checks:
        table.add_row(check.what, check.ready, check.detail)
    console.print(table)
    steps = [check for check in checks if check.do]
    if steps:
        console.print("To make the rest ready, where you need it:")
    for check in steps:
        # A command on a line of its own, never wrapped: it is there to be copied.
        console.print(f"  {check.what}:\n    {check.do}", soft_wrap=True)
