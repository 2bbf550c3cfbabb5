"""Runs diffusers' pipeline over the calibration prompts and records the inputs of every Linear, resumable per prompt."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fluxc.calibrate.file import Origin, Records, read_calibration, write_calibration
from fluxc.calibrate.observe import Observer
from fluxc.calibrate.placement import Placement, place
from fluxc.calibrate.records import merge
from fluxc.checkpoint.source import Checkpoint
from fluxc.errors import BuildError
from fluxc.progress import Report
from fluxc.reference import Drawing, draw

OBSERVED = ("transformer", "text_encoder")


def calibrate(
    checkpoint: Checkpoint,
    prompts: list[str],
    drawing: Drawing,
    origin: Origin,
    placement: Placement,
    work: Path,
    on_progress: Report | None = None,
) -> Records:
    """The records over all prompts, steps and guidance branches, in bfloat16 as the model is served.

    Prompt i starts from the runtime's noise for `drawing.seed` + i. Each prompt's records are kept below `work` as soon as
    they are complete, and a later call with the same `work` reads them; `work` is removed in the end.
    """
    work.mkdir(parents=True, exist_ok=True)
    pipeline: Any = None
    observers: dict[str, Observer] = {}
    for number, prompt in enumerate(prompts):
        kept = work / f"prompt-{number:05}.safetensors"
        if not kept.exists():
            if pipeline is None:
                pipeline = place(checkpoint, placement)
                observers = {name: Observer(getattr(pipeline, name)) for name in OBSERVED}
            picture = draw(pipeline, checkpoint, prompt, drawing.of_prompt(number))
            if picture.max() == picture.min():
                raise BuildError(
                    f"calibration: the model draws one flat colour for {prompt!r}; "
                    "the checkpoint is damaged, or guidance and steps do not suit it"
                )
            write_calibration(kept, origin, {name: observer.take() for name, observer in observers.items()})
        if on_progress:
            on_progress(number + 1, len(prompts), f"{number + 1}/{len(prompts)} prompts")
    parts = [read_calibration(work / f"prompt-{number:05}.safetensors").records for number in range(len(prompts))]
    records = {
        name: {layer: merge([part[name][layer] for part in parts]) for layer in parts[0][name]} for name in OBSERVED
    }
    shutil.rmtree(work)
    return records
