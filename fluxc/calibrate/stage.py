"""The calibration stage: what the inputs of every Linear were, over the prompts of a request."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxc.base.cache import key_of, library_versions, tool_versions
from fluxc.base.imports import code_digest
from fluxc.base.measured import Origin
from fluxc.base.progress import Report
from fluxc.calibrate.file import write_calibration
from fluxc.calibrate.records import BINS, ROWS
from fluxc.checkpoint.files import Aside, CheckpointFiles
from fluxc.checkpoint.needs import Asked, Models, image_tokens, models_of

if TYPE_CHECKING:
    from fluxc.checkpoint.reference import Generation

RESULT = "calibration.safetensors"


@dataclass(frozen=True)
class CalibrationInputs:
    """The model, and what it is asked to do; `request` as build.requests makes it, `rows` are those of a CFG batch."""

    files: CheckpointFiles
    request: dict[str, Any]
    rows: int
    text_layers: tuple[int, ...]
    aside: Aside


def run(inputs: CalibrationInputs, folder: Path, report: Report) -> None:
    """Write the calibration file, made on this machine."""
    calibrate_into(inputs, folder / RESULT, "auto", report)


def load(folder: Path) -> Path:
    """The calibration file."""
    return folder / RESULT


def calibrate_into(inputs: CalibrationInputs, path: Path, device: str, report: Report) -> None:
    """Run the model over the prompts and write `path`; finished prompts are kept aside meanwhile."""
    import torch

    from fluxc.calibrate.run import calibrate
    from fluxc.running.placement import find_placement

    checkpoint, request = inputs.files.checkpoint, inputs.request
    models, asked = models_of(checkpoint), asked_of(request, inputs.rows)
    asked = replace(asked, observed=2 * (records_bytes(models) + calls_bytes(models, asked)))
    placement = find_placement(checkpoint, device, torch.bfloat16, asked)
    origin = Origin(inputs.files.hashes(), request, str(placement), tool_versions())
    model = (inputs.files.hashes(), inputs.rows, list(inputs.text_layers))
    made_by = key_of(*model, request, str(placement), library_versions(), code_digest(__name__))
    work = inputs.aside.folder.with_name(f"{inputs.aside.folder.name}-{made_by}")
    generation = generation_of(request, inputs.text_layers)
    found = calibrate(checkpoint, request["prompts"], generation, inputs.rows, origin, placement, work, report)
    write_calibration(path, origin, *found)
    shutil.rmtree(work)


def records_bytes(models: Models) -> int:
    """Bytes that records of the inputs of every Linear take; a calibration holds them twice, made and merged."""
    layers = [*models.transformer.linears, *models.text_encoder.linears(models.text_layers)]
    return 4 * (ROWS + 1) * sum(layer.in_features for layer in layers) + 8 * BINS * len(layers)


def calls_bytes(models: Models, asked: Asked) -> int:
    """Bytes of the calls that are kept, most of which are latents and embeddings."""
    latents = min(ROWS, asked.prompts * asked.steps * asked.rows) * image_tokens(models, asked.size)
    texts = (min(ROWS, asked.prompts) + (asked.rows > 1)) * asked.text_tokens
    transformer = models.transformer
    return asked.itemsize * (latents * transformer.in_channels + texts * transformer.joint_attention_dim)


def asked_of(request: dict[str, Any], rows: int) -> Asked:
    """What a request asks of the model, in counts."""
    return Asked(len(request["prompts"]), rows, request["steps"], tuple(request["size"]), request["text_length"])


def generation_of(request: dict[str, Any], text_layers: tuple[int, ...]) -> Generation:
    """How diffusers generates what a request asks for."""
    from fluxc.checkpoint.reference import Generation

    return Generation(
        size=tuple(request["size"]),
        steps=request["steps"],
        guidance=request["guidance"],
        seed=request["seed"],
        text_length=request["text_length"],
        text_layers=text_layers,
    )
