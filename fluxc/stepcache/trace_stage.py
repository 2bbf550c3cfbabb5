"""The step-trace stage: what every denoising step of the model that will run changes, over the prompts of a request."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fluxc.base.cache import Made, key_of, library_versions, tool_versions
from fluxc.base.imports import code_digest
from fluxc.base.measured import Origin
from fluxc.base.progress import Report
from fluxc.calibrate.simulated import Rounded, rounding_bytes
from fluxc.checkpoint.files import Aside, CheckpointFiles
from fluxc.checkpoint.needs import TRACED_SIDE_BY_SIDE, Asked, Models, image_tokens, models_of
from fluxc.quantize.plan import LayerPlan
from fluxc.recipe.structs import LAGS

RESULT = "trace.safetensors"


@dataclass(frozen=True)
class StepTraceInputs:
    """The model, and what it is asked to do: a request with the dtype it runs in; `rows` are those of a CFG batch.

    `rounded`: by component how its quantized layers compute; one that it lacks computes as the checkpoint's own. `exported`:
    the transformer as modelopt exported it, in place of the checkpoint's.
    """

    files: CheckpointFiles
    request: dict[str, Any]
    rows: int
    text_layers: tuple[int, ...]
    aside: Aside
    rounded: dict[str, Rounded] = field(default_factory=dict)
    exported: Made | None = None


def run(inputs: StepTraceInputs, folder: Path, report: Report) -> None:
    """Write the trace file, made on this machine."""
    trace_into(inputs, list(range(len(inputs.request["prompts"]))), folder / RESULT, "auto", report)


def load(folder: Path) -> Path:
    """The trace file."""
    return folder / RESULT


def traced(models: Models, asked: Asked, rounded: list[LayerPlan]) -> Asked:
    """What a trace takes besides: of every row that is on its way the residuals of the last LAGS steps, in fp32; and what
    rounding these layers takes."""
    residual = 4 * (asked.text_tokens + image_tokens(models, asked.size)) * models.transformer.width
    rows = asked.rows * min(asked.prompts, TRACED_SIDE_BY_SIDE)
    return replace(asked, together=TRACED_SIDE_BY_SIDE, observed=rows * (LAGS + 2) * residual + rounding_bytes(rounded))


def trace_into(inputs: StepTraceInputs, images: list[int], path: Path, device: str, report: Report) -> None:
    """Trace the prompts numbered `images` and write `path`; finished prompts are kept aside meanwhile."""
    import torch

    from fluxc.calibrate.stage import asked_of, generation_of
    from fluxc.checkpoint.source import with_transformer
    from fluxc.running.placement import find_placement
    from fluxc.stepcache.file import write_trace
    from fluxc.stepcache.record import record_steps

    checkpoint, request = inputs.files.checkpoint, inputs.request
    if inputs.exported is not None:
        checkpoint = with_transformer(checkpoint, inputs.exported.folder)
    layers = [entry for how in inputs.rounded.values() for entry in how.layers]
    asked = traced(models_of(checkpoint), asked_of(request, inputs.rows), layers)
    placement = find_placement(checkpoint, device, getattr(torch, request["dtype"]), asked)
    origin = Origin(inputs.files.hashes(), request, str(placement), tool_versions())
    model = (inputs.files.hashes(), inputs.rows, list(inputs.text_layers))
    rounded = {name: how.identity() for name, how in inputs.rounded.items()}
    exported = inputs.exported.fingerprint() if inputs.exported else None
    made_by = key_of(*model, rounded, exported, request, str(placement), library_versions(), code_digest(__name__))
    work = inputs.aside.folder.with_name(f"{inputs.aside.folder.name}-{made_by}")
    generation, prompts = generation_of(request, inputs.text_layers), request["prompts"]
    model_that_runs = (checkpoint, inputs.rounded)
    trace = record_steps(model_that_runs, prompts, images, generation, inputs.rows, origin, placement, work, report)
    write_trace(path, origin, images, trace)
    shutil.rmtree(work)
