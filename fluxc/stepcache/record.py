"""Runs diffusers' pipeline over prompts and records every step's changes, resumable per prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fluxc.base.errors import FluxError
from fluxc.base.measured import Origin
from fluxc.base.progress import Report, of_prompts
from fluxc.calibrate.placement import Placement, place
from fluxc.checkpoint.reference import Generation, generate
from fluxc.checkpoint.source import Checkpoint
from fluxc.stepcache.file import TraceFile, read_trace, write_trace
from fluxc.stepcache.loop import FullPrecisionLoop
from fluxc.stepcache.observer import StepObserver
from fluxc.stepcache.trace import StepTrace, joined


def record_steps(
    checkpoint: Checkpoint,
    prompts: list[str],
    images: list[int],
    generation: Generation,
    branches: int,
    origin: Origin,
    placement: Placement,
    dtype: torch.dtype,
    work: Path,
    on_progress: Report | None = None,
) -> StepTrace:
    """The trace of the prompts numbered `images`, by a model in `dtype`; latents and sigma are fp32 as in the runtime.

    Prompt i starts from the runtime's noise for `generation.seed` + i. Each prompt's trace is kept below `work` when it is
    complete, and a later call with the same `work` reads it; the caller removes `work` once it has kept the result.
    """
    work.mkdir(parents=True, exist_ok=True)
    pipeline: Any = None
    observer: StepObserver | None = None
    traces = []
    for done, number in enumerate(images):
        on_step = of_prompts(on_progress, done, len(images), generation.steps)
        kept = work / f"image-{number:05}.safetensors"
        file = _read_if_of(kept, origin, number)
        if file is None:
            if observer is None:
                pipeline = place(checkpoint, placement, dtype)
                FullPrecisionLoop(pipeline)
                observer = StepObserver(pipeline.transformer, branches, generation.guidance)
            generate(pipeline, checkpoint, prompts[number], generation.of_prompt(number), torch.float32, on_step)
            write_trace(kept, origin, [number], observer.take())
            file = read_trace(kept)
        traces.append(file.trace)
        on_step(generation.steps)
    return joined(traces)


def _read_if_of(path: Path, origin: Origin, number: int) -> TraceFile | None:
    """What was kept of prompt `number` of this measurement; one that a failing disk cut short is generated again."""
    try:
        file = read_trace(path)
    except FluxError:
        return None
    return file if file.origin == origin and file.images == [number] else None
