"""Runs diffusers' pipeline over prompts and records every step's changes, resumable per prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fluxc.base.errors import FluxError
from fluxc.base.measured import Origin
from fluxc.base.progress import Report
from fluxc.calibrate.placement import Placement, place
from fluxc.checkpoint.reference import Drawing, draw
from fluxc.checkpoint.source import Checkpoint
from fluxc.stepcache.file import TraceFile, read_trace, write_trace
from fluxc.stepcache.loop import FullPrecisionLoop
from fluxc.stepcache.observer import StepObserver
from fluxc.stepcache.trace import StepTrace, joined


def record_steps(
    checkpoint: Checkpoint,
    prompts: list[str],
    pictures: list[int],
    drawing: Drawing,
    branches: int,
    origin: Origin,
    placement: Placement,
    dtype: torch.dtype,
    work: Path,
    on_progress: Report | None = None,
) -> StepTrace:
    """The trace of the prompts numbered `pictures`, by a model in `dtype`; latents and sigma are fp32 as in the runtime.

    Prompt i starts from the runtime's noise for `drawing.seed` + i. Each prompt's trace is kept below `work` as soon as it is
    complete, and a later call with the same `work` reads it; the caller removes `work` once it has kept the result.
    """
    work.mkdir(parents=True, exist_ok=True)
    pipeline: Any = None
    observer: StepObserver | None = None
    traces = []
    for done, number in enumerate(pictures):
        kept = work / f"picture-{number:05}.safetensors"
        file = _read_if_complete(kept)
        if file is None:
            if observer is None:
                pipeline = place(checkpoint, placement, dtype)
                FullPrecisionLoop(pipeline)
                observer = StepObserver(pipeline.transformer, branches, drawing.guidance)
            draw(pipeline, checkpoint, prompts[number], drawing.of_prompt(number), torch.float32)
            write_trace(kept, origin, [number], observer.take())
            file = read_trace(kept)
        traces.append(file.trace)
        if on_progress:
            on_progress(done + 1, len(pictures), f"{done + 1}/{len(pictures)} prompts")
    return joined(traces)


def _read_if_complete(path: Path) -> TraceFile | None:
    """What was kept of a prompt; one that a failing disk cut short is drawn again."""
    try:
        return read_trace(path)
    except FluxError:
        return None
