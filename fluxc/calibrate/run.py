"""Runs diffusers' pipeline over the calibration prompts and records the inputs of every Linear, resumable per prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fluxc.base.errors import BuildError, FluxError
from fluxc.base.measured import Origin
from fluxc.base.progress import Report, of_prompts
from fluxc.calibrate.file import Records, read_calibration, write_calibration
from fluxc.calibrate.observe import Observer
from fluxc.calibrate.placement import Placement, place
from fluxc.calibrate.records import merge
from fluxc.calibrate.sample import sample_points
from fluxc.checkpoint.reference import Generation, generate
from fluxc.checkpoint.source import Checkpoint

OBSERVED = ("transformer", "text_encoder")


def calibrate(
    checkpoint: Checkpoint,
    prompts: list[str],
    generation: Generation,
    branches: int,
    origin: Origin,
    placement: Placement,
    work: Path,
    on_progress: Report | None = None,
) -> Records:
    """The records over all prompts, steps and `branches` guidance branches, in bfloat16 as the model is served.

    Prompt i starts from the runtime's noise for `generation.seed` + i. Each prompt's records are kept below `work` as soon as
    they are complete, and a later call with the same `work` reads them; the caller removes `work` once it has kept the result.
    """
    work.mkdir(parents=True, exist_ok=True)
    kept = [work / f"prompt-{number:05}.safetensors" for number in range(len(prompts))]
    calls = {"transformer": generation.steps * branches, "text_encoder": branches}
    pipeline: Any = None
    observers: dict[str, Observer] = {}
    for number, prompt in enumerate(prompts):
        on_step = of_prompts(on_progress, number, len(prompts), generation.steps)
        if not _is_of(kept[number], origin):
            if pipeline is None:
                pipeline = place(checkpoint, placement)
                observers = {name: Observer(getattr(pipeline, name)) for name in OBSERVED}
            for name, observer in observers.items():
                observer.keep_rows(sample_points(number, len(prompts), calls[name]))
            image = generate(pipeline, checkpoint, prompt, generation.of_prompt(number), on_step=on_step)
            if image.max() == image.min():
                raise BuildError(
                    f"calibration: the model generates one flat colour for {prompt!r}; "
                    "the checkpoint is damaged, or guidance and steps do not suit it"
                )
            write_calibration(kept[number], origin, {name: observer.take() for name, observer in observers.items()})
        on_step(generation.steps)
    records: Records = {name: {} for name in OBSERVED}
    for path in kept:
        of_prompt = read_calibration(path).records
        for name, layers in records.items():
            for layer, record in of_prompt[name].items():
                layers[layer] = merge([layers[layer], record]) if layer in layers else record
    return records


def _is_of(path: Path, origin: Origin) -> bool:
    """Whether a prompt's records are there, and of this measurement; one that a failing disk cut short is measured again."""
    try:
        return read_calibration(path).origin == origin
    except FluxError:
        return False
