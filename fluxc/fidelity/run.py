"""Compares every target with the reference; writes figures, evidence, and images with the requests they answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from fluxc.base.numbers import as_json
from fluxc.base.progress import Report
from fluxc.fidelity.compare import against_exact, compare_ranks, compare_target, quantizes_text
from fluxc.fidelity.constants import check_gemms
from fluxc.fidelity.evidence import recorded_of, write_evidence
from fluxc.fidelity.image_tiles import tiling_figures
from fluxc.fidelity.reference_stage import read_references
from fluxc.recipe.targets import Target
from fluxrt.evidence import parts_of
from fluxrt.manifest import NotCompared
from fluxrt.pipeline import to_image

if TYPE_CHECKING:
    from fluxc.fidelity.stage import CompareInputs

STAGES, IMAGES = "stages", "images"
"""What a target is compared in: text encoder, prologue, velocities and decoder; and finished images."""


def measure(folder: Path, inputs: CompareInputs, report: Report) -> None:
    """Write figures.json, evidence.json and evidence/, report/images/ and images.json, the recorded requests."""
    steps, guidance, size = inputs.steps, inputs.guidance, inputs.size
    bundle = inputs.draft.bundle
    with_images = inputs.level == IMAGES
    runnable = [target for target in inputs.targets if target.runs_here]
    sharded = [(target, target.in_one) for target in inputs.targets if target.in_one and with_images]
    assert inputs.reference is not None
    references = read_references(inputs.reference.folder, inputs.prompts, inputs.seed)
    recorded = write_evidence(folder, recorded_of(bundle, references, guidance, steps), size, steps, guidance)
    sampling, tiled = bundle.manifest.sampling, [one.tiled for one in references if one.tiled is not None]
    # What an image costs by being decoded in tiles is part of its figures, not of the decoder's.
    expected = [one.trace.image for one in references] if tiled else [one.image for one in recorded]
    tiling = (
        tiling_figures(sampling.tiled, sampling.pixels_per_token, tiled, expected) if sampling.tiled and tiled else None
    )
    del references, tiled
    an_image = with_images * (1 + quantizes_text(bundle))
    total = len(runnable) * (1 + sum(parts_of(one) + an_image for one in recorded)) + len(sharded) * len(recorded)
    done, now = 0, ""

    def advance() -> None:
        nonlocal done
        done += 1
        report(done, total, f"{now}, {done}/{total} parts")

    figures = {
        **_asked(inputs),
        "tiling": tiling,
        "targets": {},
        "ranks": {},
        "not_compared": msgspec.to_builtins(list(left_out(inputs.level, inputs.targets))),
        "not_run": [t.name for t in inputs.targets if t not in runnable and t not in [one for one, _ in sharded]],
    }
    images: dict[str, list[np.ndarray]] = {}
    if with_images:
        images["reference"] = expected
    names = {target.name for target in runnable}
    pairs = [(target.name, target.exact.name) for target in runnable if target.exact and target.exact.name in names]
    velocities: dict[str, list[np.ndarray]] = {name: [] for pair in pairs for name in pair}
    for target in runnable:
        now = target.name
        check_gemms(bundle, target.name, recorded[0], size, guidance)
        advance()
        figures["targets"][target.name], images[target.name] = compare_target(
            bundle,
            target.name,
            recorded,
            expected,
            size=size,
            steps=steps,
            guidance=guidance,
            with_images=with_images,
            on_done=advance,
            velocities=velocities.get(target.name),
        )
    for name, exact in pairs:
        figures["targets"][name]["against_exact"] = against_exact(
            exact, (velocities[name], velocities[exact]), (images[name], images[exact])
        )
    for target, whole in sharded:
        now = target.name
        figures["ranks"][target.name], images[target.name] = compare_ranks(
            bundle, target.name, whole.name, images[whole.name], recorded, steps, guidance, size, advance
        )
    (folder / "figures.json").write_text(as_json(figures, "figures"))
    (folder / "report" / "images").mkdir(parents=True)
    for name, row in images.items():
        for number, image in enumerate(row):
            to_image(image).save(folder / "report" / "images" / f"{name}-{number}.png")
    made = [
        {
            "file": f"report/images/{name}-{number}.png",
            "target": name,
            "prompt": one.prompt,
            "seed": one.seed,
            "steps": steps,
            "guidance": guidance,
            "size": size,
        }
        for name in images
        if name != "reference"
        for number, one in enumerate(recorded)
        if images[name]
    ]
    (folder / "images.json").write_text(as_json(made, "recorded images"))


def measure_nothing(folder: Path, inputs: CompareInputs) -> None:
    """Write the same files where the level is none: no figure, no evidence, no image."""
    figures = {
        **_asked(inputs),
        "tiling": None,
        "targets": {},
        "ranks": {},
        "not_compared": msgspec.to_builtins(list(left_out(inputs.level, inputs.targets))),
        "not_run": [target.name for target in inputs.targets],
    }
    (folder / "figures.json").write_text(as_json(figures, "figures"))
    write_evidence(folder, [], inputs.size, inputs.steps, inputs.guidance)
    (folder / "images.json").write_text("[]")


def left_out(level: str, targets: Iterable[Target]) -> Iterator[NotCompared]:
    """What a build at `level` does not compare with the reference, and why, by target."""
    everything = f"{STAGES} and {IMAGES}"
    for target in targets:
        if level == "none":
            yield NotCompared(target.name, everything, "fidelity.level is none")
        elif target.runs_here:
            if level != IMAGES:
                yield NotCompared(target.name, IMAGES, f"fidelity.level is {level}, which generates none")
        elif target.in_one:
            why = "its processes hold each image in shards, so that they give no stage of it"
            yield NotCompared(target.name, STAGES, why)
            if level != IMAGES:
                yield NotCompared(target.name, IMAGES, f"fidelity.level is {level}, which generates none")
        else:
            why = "a build runs no target on a GPU; `fluxrt verify` replays the bundle's evidence where it runs"
            yield NotCompared(target.name, everything, why)


def _asked(inputs: CompareInputs) -> dict[str, Any]:
    """What the comparison was asked for."""
    return {
        "reference": inputs.title,
        "level": inputs.level,
        "steps": inputs.steps,
        "guidance": inputs.guidance,
        "size": list(inputs.size),
        "prompts": inputs.prompts,
    }
