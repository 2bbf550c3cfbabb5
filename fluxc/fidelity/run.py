"""Compares every target with the reference; writes figures, images and the requests they answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxc.base.numbers import as_json
from fluxc.base.progress import Report
from fluxc.fidelity.compare import compare_ranks, compare_target
from fluxc.fidelity.reference_stage import read_references
from fluxrt.pipeline import to_image

if TYPE_CHECKING:
    from fluxc.fidelity.stage import CompareInputs


def measure(folder: Path, inputs: CompareInputs, report: Report) -> None:
    """Write figures.json, report/images/ and images.json, the recorded requests, into `folder`."""
    prompts, steps, guidance, size = inputs.prompts, inputs.steps, inputs.guidance, inputs.size
    bundle = inputs.draft.bundle
    runnable = [target for target in inputs.targets if target.runs_here]
    sharded = [(target, target.in_one) for target in inputs.targets if target.in_one]
    compared = [*runnable, *(target for target, _ in sharded)]
    total = len(prompts) * len(compared)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        report(done, total, f"{done}/{total} images")

    references = read_references(inputs.reference.folder, prompts, inputs.seed)
    figures: dict[str, Any] = {
        "reference": inputs.title,
        "steps": steps,
        "guidance": guidance,
        "size": list(size),
        "prompts": prompts,
        "targets": {},
        "ranks": {},
        "not_run": [target.name for target in inputs.targets if target not in compared],
    }
    images: dict[str, list[np.ndarray]] = {"reference": [r.trace.image for r in references]}
    for target in runnable:
        figures["targets"][target.name], images[target.name] = compare_target(
            bundle, target.name, references, size=size, steps=steps, guidance=guidance, on_image=advance
        )
    for target, whole in sharded:
        figures["ranks"][target.name], images[target.name] = compare_ranks(
            bundle, target.name, whole.name, images[whole.name], references, steps, guidance, size, advance
        )
    (folder / "figures.json").write_text(as_json(figures, "figures"))
    (folder / "report" / "images").mkdir(parents=True)
    for name, row in images.items():
        for number, image in enumerate(row):
            to_image(image).save(folder / "report" / "images" / f"{name}-{number}.png")
    recorded = [
        {
            "file": f"report/images/{target.name}-{number}.png",
            "target": target.name,
            "prompt": reference.trace.prompt,
            "seed": reference.seed,
            "steps": steps,
            "guidance": guidance,
            "size": size,
        }
        for target in compared
        for number, reference in enumerate(references)
    ]
    (folder / "images.json").write_text(as_json(recorded, "recorded images"))
