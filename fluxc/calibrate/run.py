"""Runs diffusers' model over the calibration prompts and records the inputs of every Linear, resumable."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from fluxc.base.errors import BuildError, FluxError
from fluxc.base.measured import Origin
from fluxc.base.progress import OfSteps, Report
from fluxc.calibrate.calls import CallRecorder, Calls
from fluxc.calibrate.file import Records, read_calibration, read_calls, write_calibration
from fluxc.calibrate.observe import Observer
from fluxc.calibrate.records import merge
from fluxc.calibrate.sample import sample_points
from fluxc.checkpoint.needs import SIDE_BY_SIDE
from fluxc.checkpoint.reference import Generation
from fluxc.checkpoint.source import Checkpoint
from fluxc.running.model import ReferenceModel
from fluxc.running.placement import Placement


def calibrate(
    checkpoint: Checkpoint,
    prompts: list[str],
    generation: Generation,
    branches: int,
    origin: Origin,
    placement: Placement,
    work: Path,
    on_progress: Report | None = None,
) -> tuple[Records, dict[str, Calls]]:
    """The records over all prompts, steps and `branches` guidance branches, in the placement's type, and calls of the models.

    Prompt i starts from the runtime's noise for `generation.seed` + i. What is complete is kept below `work`: the part of the
    text encoder, then that of each prompt, or of prompts that went together. A later call with the same `work` reads it; the
    caller removes `work` once it has kept the result.
    """
    work.mkdir(parents=True, exist_ok=True)
    model = ReferenceModel(checkpoint, placement)
    texts = [*prompts, *([""] if branches == 2 else [])]
    report = OfSteps(on_progress, len(texts), len(prompts), generation.steps)
    text_part, embeddings = _texts(model, texts, generation, origin, work, report)
    empty = embeddings[-1] if branches == 2 else None
    report.texts_are_done()
    groups = placement.groups(len(prompts), SIDE_BY_SIDE)
    missing = [group for group in groups if _kept(_file_of(work, group), origin) is None]
    for group in groups:
        if group not in missing:
            report.images_are_done(len(group))
    if missing:
        with model.component("transformer") as transformer:
            observer, recorder = Observer(transformer.module), CallRecorder(transformer.module)
            for group in missing:
                calls = generation.steps * branches
                points = [sample_points(number, len(prompts), calls) for number in group]
                observer.keep_rows(points)
                recorder.keep(points)
                generations = [generation.of_prompt(number) for number in group]
                latents = model.denoise(transformer, [embeddings[n] for n in group], empty, generations, report=report)
                for number, final in zip(group, latents, strict=True):
                    _check_image(model.decode(final), prompts[number])
                records: Records = {"transformer": observer.take()}
                write_calibration(_file_of(work, group), origin, records, {"transformer": recorder.take()})
    return _merged([text_part, *(_file_of(work, group) for group in groups)])


def _merged(parts: list[Path]) -> tuple[Records, dict[str, Calls]]:
    """What the files `parts` hold as one."""
    records: Records = {"transformer": {}, "text_encoder": {}}
    calls: dict[str, Calls] = {}
    for part in parts:
        for name, layers in read_calibration(part).records.items():
            for layer, record in layers.items():
                known = records[name].get(layer)
                records[name][layer] = record if known is None else merge([known, record])
        for name, kept in read_calls(part).items():
            calls.setdefault(name, Calls()).extend(kept)
    return records, calls


def _texts(
    model: ReferenceModel,
    texts: list[str],
    generation: Generation,
    origin: Origin,
    work: Path,
    report: OfSteps,
) -> tuple[Path, list[torch.Tensor]]:
    """The file of the text encoder's records over `texts`, each encoded once, and their embeddings."""
    kept, file = work / "text.safetensors", work / "embeddings.safetensors"
    if _kept(kept, origin) is not None:
        return kept, [tensor for _, tensor in sorted(load_file(file).items())]
    with model.component("text_encoder", generation.text_layers) as encoder:
        observer, recorder = Observer(encoder.module), CallRecorder(encoder.module)
        points = [sample_points(number, len(texts), 1) for number in range(len(texts))]
        observer.keep_rows(points)
        recorder.keep(points)
        embeddings = model.encode(encoder, texts, generation, report)
        records, calls = {"text_encoder": observer.take()}, {"text_encoder": recorder.take()}
    partial = file.with_suffix(".partial")
    save_file({f"{number:06}": tensor.contiguous() for number, tensor in enumerate(embeddings)}, partial)
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    partial.replace(file)
    # Last: where it is, the embeddings are there.
    write_calibration(kept, origin, records, calls)
    return kept, embeddings


def _check_image(image: np.ndarray, prompt: str) -> None:
    if image.max() == image.min():
        raise BuildError(
            f"calibration: the model generates one flat colour for {prompt!r}; "
            "the checkpoint is damaged, or guidance and steps do not suit it"
        )


def _file_of(work: Path, group: list[int]) -> Path:
    """Where the records of these prompts are kept; the first and the last name the group."""
    return work / f"prompts-{group[0]:05}-{group[-1]:05}.safetensors"


def _kept(path: Path, origin: Origin) -> Records | None:
    """Records that are there, and of this measurement; those that a failing disk cut short are measured again."""
    try:
        file = read_calibration(path)
    except FluxError:
        return None
    return file.records if file.origin == origin else None
