"""The reference stage: what diffusers does for the held-out prompts, stage by stage; no target's result is part of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxc.base.cache import Made
from fluxc.base.progress import OfSteps, Report
from fluxc.checkpoint.files import CheckpointFiles
from fluxrt.manifest import Tiles

if TYPE_CHECKING:
    from fluxc.fidelity.compare import Reference

RAN = "ran.txt"
LISTS = ("input_ids", "text", "latents", "velocities")


@dataclass(frozen=True)
class ReferenceInputs:
    """The model, the prompts and how they are generated: prompt i from the noise of `seed` + i, by a model in `dtype`.

    `rows` are those of a CFG batch. `tiles`: what an image of this size is decoded in, None where it is decoded whole.
    """

    files: CheckpointFiles
    prompts: list[str]
    size: tuple[int, int]
    steps: int
    guidance: float
    seed: int
    text_length: int
    text_layers: tuple[int, ...]
    dtype: str
    rows: int
    tiles: Tiles | None = None


def run(inputs: ReferenceInputs, folder: Path, report: Report) -> None:
    """Write what it ran on, and for each prompt a safetensors file: tokens, embeddings, prologue, steps, final latents and
    image, which is decoded whole; with tiles also the image decoded in them."""
    import torch
    from safetensors.numpy import save_file

    from fluxc.checkpoint.needs import Asked
    from fluxc.checkpoint.reference import Generation
    from fluxc.fidelity.image_tiles import decoded_in_tiles
    from fluxc.fidelity.trace import record, tokens_of_final
    from fluxc.running.model import ReferenceModel
    from fluxc.running.placement import find_placement

    checkpoint = inputs.files.checkpoint
    asked = Asked(len(inputs.prompts), inputs.rows, inputs.steps, inputs.size, inputs.text_length)
    placement = find_placement(checkpoint, "auto", getattr(torch, inputs.dtype), asked)
    model = ReferenceModel(checkpoint, placement)
    (folder / RAN).write_text(str(placement))
    generation = Generation(
        inputs.size, inputs.steps, inputs.guidance, inputs.seed, inputs.text_length, inputs.text_layers
    )
    counted = OfSteps(report, len(inputs.prompts) + inputs.rows - 1, len(inputs.prompts), inputs.steps)
    for number, trace in enumerate(record(model, inputs.prompts, inputs.rows, generation, counted)):
        tensors = {f"{name}.{at:04}": array for name in LISTS for at, array in enumerate(getattr(trace, name))}
        tensors |= {f"prologue.{name}": array for name, array in trace.prologue.items()}
        tensors |= {"sigmas": np.array(trace.sigmas, np.float64), "final": tokens_of_final(trace, model.vae)}
        tensors["image"] = trace.image
        if inputs.tiles:
            final = torch.from_numpy(trace.final)
            tensors["tiled"] = decoded_in_tiles(model.decode, final, inputs.tiles, model.vae.config.patch_size)
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / _file(number))


def load(folder: Path) -> Made:
    """The folder; `read_references` reads it."""
    return Made(folder)


def ran_as(made: Made) -> str:
    """What the reference was computed on, and in which type: of bfloat16 that was asked for, float32 where the CPU does not
    multiply it."""
    return (made.folder / RAN).read_text()


def read_references(folder: Path, prompts: list[str], seed: int) -> list[Reference]:
    """What `run` wrote, in the order of the prompts."""
    from safetensors.numpy import load_file

    from fluxc.fidelity.compare import Reference
    from fluxc.fidelity.trace import Trace

    references = []
    for number, prompt in enumerate(prompts):
        tensors: dict[str, Any] = load_file(folder / _file(number))
        lists: dict[str, Any] = {
            name: [tensors[key] for key in sorted(tensors) if key.startswith(f"{name}.")] for name in LISTS
        }
        prologue = {key.removeprefix("prologue."): tensors[key] for key in tensors if key.startswith("prologue.")}
        sigmas = [float(sigma) for sigma in tensors["sigmas"]]
        trace = Trace(prompt, prologue=prologue, sigmas=sigmas, image=tensors["image"], **lists)
        references.append(Reference(trace, tensors["final"], seed + number, tensors.get("tiled")))
    return references


def _file(number: int) -> str:
    return f"reference-{number:05}.safetensors"
