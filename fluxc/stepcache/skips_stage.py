"""The stage of `fluxc tune` that measures what skipping a step costs, on the prompts that layers are measured on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fluxc.base.numbers import as_json
from fluxc.base.progress import Report
from fluxc.calibrate.costs_stage import CostInputs
from fluxc.calibrate.states import PROMPTS, evenly

SKIPS = "skips.json"


@dataclass(frozen=True)
class SkipCosts:
    """What every step costs that takes the residual of an older one, [steps, LAGS] as in StepTrace, infinite where there is no
    such step: `velocity`, the relative squared error of the velocity, and `latents`, how far the latents are off, root mean
    square; means over a few images."""

    velocity: np.ndarray
    latents: np.ndarray


def run(inputs: CostInputs, folder: Path, report: Report) -> None:
    """Write what skipping costs the checkpoint's own model, on the prompts that layers are measured on, as JSON."""
    import torch

    from fluxc.calibrate.stage import asked_of, generation_of
    from fluxc.checkpoint.needs import models_of
    from fluxc.running.placement import find_placement
    from fluxc.stepcache.record import skip_costs
    from fluxc.stepcache.trace_stage import traced

    checkpoint, request = inputs.files.checkpoint, inputs.request
    asked = traced(models_of(checkpoint), asked_of(request, inputs.rows), [])
    placement = find_placement(checkpoint, "auto", getattr(torch, inputs.dtype), asked)
    generation, numbers = generation_of(request, inputs.text_layers), evenly(len(request["prompts"]), PROMPTS)
    found = skip_costs(checkpoint, request["prompts"], numbers, generation, inputs.rows, placement, report)
    plain = {name: np.where(np.isfinite(of), of, -1.0).tolist() for name, of in found.items()}
    (folder / SKIPS).write_text(as_json(plain, "costs of skipped steps", indent=1) + "\n")


def load(folder: Path) -> SkipCosts:
    """What skipping costs."""
    plain = {name: np.array(of) for name, of in json.loads((folder / SKIPS).read_text()).items()}
    return SkipCosts(**{name: np.where(of < 0, np.inf, of) for name, of in plain.items()})
