"""The modelopt stage: the transformer as modelopt quantized, calibrated and exported it, under the recipe's plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxc.base.progress import Report
from fluxc.checkpoint.files import CheckpointFiles
from fluxc.quantize.plan import LayerPlan

RESULT = "transformer"


@dataclass(frozen=True)
class ModeloptInputs:
    """The model, what it is asked to do, modelopt's algorithm and version, and every Linear's format."""

    files: CheckpointFiles
    request: dict[str, Any]
    text_layers: tuple[int, ...]
    algorithm: str
    version: str
    plan: list[LayerPlan]


def run(inputs: ModeloptInputs, folder: Path, report: Report) -> None:
    """Write the component's folder."""
    from fluxc.calibrate.modelopt import quantize_transformer
    from fluxc.calibrate.stage import generation_of

    generation = generation_of(inputs.request, inputs.text_layers)
    prompts = inputs.request["prompts"]
    quantize_transformer(inputs.files.checkpoint, inputs.plan, inputs.algorithm, prompts, generation, folder / RESULT)


def load(folder: Path) -> Path:
    """The transformer's folder."""
    return folder / RESULT
