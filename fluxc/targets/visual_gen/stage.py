"""The stage of a `visual_gen` target: the files of its folder that are its own, and which of the bundle's it links to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxc.base.progress import Report
from fluxc.base.safetensors import TensorRef
from fluxc.checkpoint.components import WEIGHTS_FILE
from fluxc.quantize.plan import LayerPlan
from fluxc.recipe.targets import VisualGenTarget
from fluxc.targets.parts import Weights, write_entry
from fluxrt import manifest as format

LINKS = "links.json"


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder that is written again in bf16: its config there, tensors in the checkpoint, and its files."""

    config: dict[str, Any]
    tensors: dict[str, TensorRef]
    files: list[Path]


@dataclass(frozen=True)
class VisualGenInputs:
    """`contents` are the files of `weights`, the transformer's; `linked` the bundle's other files that the folder is to have.

    `text_encoder` is there where the bundle's own is not bf16, which VisualGen wants. `min_r2` is what the step cache's fit
    must explain for its polynomial to be written.
    """

    target: VisualGenTarget
    config: dict[str, Any]
    plan: list[LayerPlan]
    weights: Weights
    contents: list[Path]
    linked: list[str]
    sizes: tuple[tuple[int, int], ...]
    text_length: int
    steps: int
    guidance: float
    step_cache: format.StepCache | None
    min_r2: float
    text_encoder: TextEncoder | None


def run(inputs: VisualGenInputs, folder: Path, report: Report) -> None:
    """Write visual_gen/, links.json (path to the bundle's file), and the manifest entry."""
    from fluxc.targets.visual_gen import folder as visual_gen

    settings = visual_gen.Settings(
        inputs.sizes,
        inputs.target.gpu_counts,
        inputs.text_length,
        inputs.steps,
        inputs.guidance,
        inputs.step_cache,
        inputs.min_r2,
    )
    tensors = inputs.weights.tensors
    written = visual_gen.write_folder(folder, settings, inputs.config, inputs.plan, tensors, inputs.linked, report)
    if inputs.text_encoder:
        from fluxc.quantize.source import narrowed
        from fluxc.quantize.writer import write_weights

        encoder = folder / visual_gen.FOLDER / "text_encoder"
        encoder.mkdir()
        tensors = inputs.text_encoder.tensors
        write_weights(encoder / WEIGHTS_FILE["text_encoder"], tensors, [], {}, narrow=narrowed("text_encoder", tensors))
        (encoder / "config.json").write_text(json.dumps(inputs.text_encoder.config, indent=2, sort_keys=True) + "\n")
    (folder / LINKS).write_text(json.dumps(written.links))
    configs = {str(number): file for number, file in written.configs.items()}
    entry = format.struct_of(inputs.target.kind, format.VisualGenTarget)
    names = (inputs.target.name, visual_gen.FOLDER, visual_gen.SCHEMA)
    write_entry(folder, entry(*names, configs, inputs.text_length))
