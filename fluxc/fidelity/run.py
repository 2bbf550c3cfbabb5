"""The fidelity stage: diffusers draws the held-out prompts, every target is compared with it, the report is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fluxc.base.progress import Report
from fluxc.checkpoint.reference import Drawing, load_pipeline
from fluxc.fidelity.compare import Reference, compare_ranks, compare_target
from fluxc.fidelity.report import write_report
from fluxc.fidelity.trace import record, tokens_of_final
from fluxc.quantize.source import Source
from fluxc.recipe.structs import Recipe
from fluxrt.bundle import Bundle, Engine


def measure(
    folder: Path,
    source: Source,
    recipe: Recipe,
    bundle: Bundle,
    prompts: list[str],
    layers: list[dict[str, Any]],
    sensitivity: dict[str, Any] | None,
    report: Report,
) -> None:
    """Write report/ (report.json, index.html, pictures) and pictures.json, the recorded requests, into `folder`.

    `layers` are the quantized layers with their errors, `sensitivity` what `keep: auto` measured, for the report to show.
    """
    size, steps, guidance = recipe.sizes[0], recipe.sampling.steps, recipe.sampling.guidance
    runnable = [target for target in recipe.targets if target.runs_here]
    sharded = [target for target in recipe.targets if target.is_for_processes]
    total = len(prompts) * (1 + len(runnable) + len(sharded))
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        report(done, total)

    branches = 2 if source.guidance_branches and guidance > 1.0 else 1
    pipeline = load_pipeline(source.checkpoint, getattr(torch, recipe.fidelity.reference))
    references = []
    drawing = Drawing(size, steps, guidance, recipe.fidelity.seed, recipe.text.length, source.family.text_layers)
    for number, prompt in enumerate(prompts):
        trace = record(pipeline, source.checkpoint, prompt, branches, drawing.of_prompt(number))
        references.append(Reference(trace, tokens_of_final(trace, pipeline.vae), drawing.seed + number))
        advance()
    del pipeline

    figures: dict[str, Any] = {
        "name": recipe.name,
        "reference": f"diffusers {source.checkpoint.pipeline_class} in {recipe.fidelity.reference}",
        "steps": steps,
        "guidance": guidance,
        "size": list(size),
        "prompts": prompts,
        "targets": {},
        "ranks": {},
        "not_run": [target.name for target in recipe.targets if target not in (*runnable, *sharded)],
        "engines": {t.name: _engine(t.engine) for t in bundle.manifest.targets if t.engine},
        "layers": layers,
        "sensitivity": sensitivity,
        "step_cache": recipe.step_cache is not None,
    }
    pictures: dict[str, list[np.ndarray]] = {"reference": [r.trace.image for r in references]}
    for target in runnable:
        figures["targets"][target.name], pictures[target.name] = compare_target(
            bundle, target.name, references, size=size, steps=steps, guidance=guidance, on_picture=advance
        )
    for target in sharded:
        whole = target.in_one.name
        figures["ranks"][target.name], pictures[target.name] = compare_ranks(
            bundle, target.name, whole, pictures[whole], references, steps, guidance, size, advance
        )
    write_report(folder / "report", figures, pictures)
    recorded = [
        {
            "file": f"report/pictures/{target.name}-{number}.png",
            "target": target.name,
            "prompt": reference.trace.prompt,
            "seed": reference.seed,
            "steps": steps,
            "guidance": guidance,
            "size": size,
        }
        for target in (*runnable, *sharded)
        for number, reference in enumerate(references)
    ]
    (folder / "pictures.json").write_text(json.dumps(recorded))


def _engine(engine: Engine) -> dict[str, Any]:
    """What the report says of an engine: what it was built with and for, and what was found in its plans."""
    fields = ("library", "version", "compute_capabilities", "gpu", "audit")
    return {field: getattr(engine, field) for field in fields}
