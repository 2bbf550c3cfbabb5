"""Runs diffusers' model over prompts, its layers rounded as asked, and records every step's changes, resumable per prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from fluxc.base.errors import FluxError
from fluxc.base.measured import Origin
from fluxc.base.progress import OfSteps, Report
from fluxc.calibrate.simulated import Rounded, simulated
from fluxc.checkpoint.needs import TRACED_SIDE_BY_SIDE
from fluxc.checkpoint.reference import Generation
from fluxc.checkpoint.source import Checkpoint
from fluxc.running.model import ReferenceModel
from fluxc.running.placement import Placement
from fluxc.stepcache.file import TraceFile, read_trace, write_trace
from fluxc.stepcache.loop import FullPrecisionLoop
from fluxc.stepcache.observer import StepObserver
from fluxc.stepcache.trace import StepTrace, joined


def record_steps(
    model: tuple[Checkpoint, Mapping[str, Rounded]],
    prompts: list[str],
    images: list[int],
    generation: Generation,
    branches: int,
    origin: Origin,
    placement: Placement,
    work: Path,
    on_progress: Report | None = None,
) -> StepTrace:
    """The trace of the prompts numbered `images`, in the placement's type; latents and sigma are fp32 as in the runtime.

    `model` is a checkpoint, and by component how its quantized layers compute.
    Prompt i starts from the runtime's noise for `generation.seed` + i. Each prompt's trace is kept below `work` when it is
    complete, and a later call with the same `work` reads it; the caller removes `work` once it has kept the result.
    """
    work.mkdir(parents=True, exist_ok=True)
    kept = {number: work / f"image-{number:05}.safetensors" for number in images}
    missing = [number for number in images if _read_if_of(kept[number], origin, number) is None]
    texts = len(missing) + (branches == 2 and bool(missing))
    report = OfSteps(on_progress, texts, len(images), generation.steps)
    report.images_are_done(len(images) - len(missing))
    if missing:
        for numbers, observer in _generated(model, prompts, missing, generation, branches, placement, report):
            for number, trace in zip(numbers, observer.take(len(numbers)), strict=True):
                write_trace(kept[number], origin, [number], trace)
    return joined([read_trace(kept[number]).trace for number in images])


def skip_costs(
    checkpoint: Checkpoint,
    prompts: list[str],
    images: list[int],
    generation: Generation,
    branches: int,
    placement: Placement,
    on_progress: Report | None = None,
) -> dict[str, np.ndarray]:
    """Of the prompts numbered `images`, generated as record_steps does by the checkpoint's own model, float64 [steps, LAGS]:
    `velocity`, means of StepObserver.velocity_errors, and `latents`, of StepTrace's `residual_error`."""
    report, found = OfSteps(on_progress, len(images) + (branches == 2), len(images), generation.steps), []
    model: tuple[Checkpoint, Mapping[str, Rounded]] = (checkpoint, {})
    for numbers, observer in _generated(model, prompts, images, generation, branches, placement, report):
        errors = observer.velocity_errors(len(numbers))
        traces = observer.take(len(numbers))
        found += [(one, trace.residual_error[0]) for one, trace in zip(errors, traces, strict=True)]
    velocity, latents = (np.mean(of, axis=0) for of in zip(*found, strict=True))
    return {"velocity": velocity, "latents": latents}


def _generated(
    model: tuple[Checkpoint, Mapping[str, Rounded]],
    prompts: list[str],
    images: list[int],
    generation: Generation,
    branches: int,
    placement: Placement,
    report: OfSteps,
) -> Iterator[tuple[list[int], StepObserver]]:
    """Generates some images at a time: their numbers, and who saw them."""
    checkpoint, rounded = model
    texts = [prompts[number] for number in images] + ([""] if branches == 2 else [])
    reference = ReferenceModel(checkpoint, placement)
    with (
        reference.component("text_encoder", generation.text_layers) as encoder,
        simulated(checkpoint, "text_encoder", encoder, rounded),
    ):
        embeddings = reference.encode(encoder, texts, generation, report)
    empty = embeddings[-1] if branches == 2 else None
    with (
        reference.component("transformer") as transformer,
        simulated(checkpoint, "transformer", transformer, rounded, (generation.steps, branches)),
    ):
        FullPrecisionLoop(transformer.module)
        observer = StepObserver(transformer.module, branches, generation.guidance)
        for group in placement.groups(len(images), TRACED_SIDE_BY_SIDE):
            numbers = [images[at] for at in group]
            generations = [generation.of_prompt(number) for number in numbers]
            texts_of = [embeddings[at] for at in group]
            reference.denoise(transformer, texts_of, empty, generations, torch.float32, report)
            yield numbers, observer


def _read_if_of(path: Path, origin: Origin, number: int) -> TraceFile | None:
    """What was kept of prompt `number` of this measurement; one that a failing disk cut short is generated again."""
    try:
        file = read_trace(path)
    except FluxError:
        return None
    return file if file.origin == origin and file.images == [number] else None
