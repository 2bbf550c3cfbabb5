"""Every stage on the GPU against the CPU target that rounds as it does, on the same input."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxc.base.numbers import significant
from fluxc.fidelity.metrics import cosine, relative_error
from fluxc.gpu_check.child import Found
from fluxc.gpu_check.subject import Subject, recorded_images, twin_of
from fluxrt.errors import BackendError
from fluxrt.pipeline import starting_noise
from fluxrt.schedule import SCHEDULES

if TYPE_CHECKING:
    from fluxrt.manifest import RecordedImage
    from fluxrt.pipeline import Pipeline

LEAST_COSINE = 0.98
"""Of a step's velocity, where the recipe has no gate `step_cosine`: what recipes/flux2-nano-rtx.yaml asks of a CPU target."""


def check_stages(subject: Subject) -> Found:
    """Text, prologue, the velocity of every step, decoder; settings: `bounds`, the largest relative errors, and `step_cosine`.

    The CPU goes through the image; the GPU gets its tokens, embeddings, latents and final latents, stage by stage.
    """
    bundle, target = subject.open()
    twin, recorded = twin_of(bundle, target), recorded_images(bundle, target)
    if twin is None or not recorded:
        return Found(
            skipped="the bundle has no target for the CPU to compare with; add {kind: onnxruntime} to the recipe"
        )
    from fluxrt.pipeline import Pipeline

    with Pipeline(bundle, target=twin.name) as cpu, subject.load() as loaded:
        figures = _compare(cpu, loaded.pipeline, recorded[0])
        figures |= {"against": twin.name, "notes": list(loaded.pipeline.notes)}
    return Found(figures, faults_of(figures, subject.settings["bounds"], subject.settings["step_cosine"]))


def faults_of(figures: dict[str, Any], bounds: dict[str, float], step_cosine: float) -> list[str]:
    """What is further from the CPU than rounding explains; written as "not at most", so that a NaN is a fault."""
    faults = [
        f"{name}: {figures[name]} (relative error), rounding explains {bound:g}"
        for name, bound in bounds.items()
        if figures.get(name) is not None and not figures[name] <= bound
    ]
    low = [step for step, found in enumerate(figures["step_cosine"]) if not found >= step_cosine]
    if low:
        worst = figures["step_cosine"][low[0]]
        told = f"the velocity of step {low[0]} has cosine {worst} to the CPU's (at least {step_cosine:g})"
        faults.append(f"{told}; of {len(low)} steps it is too low")
    return faults


def _compare(cpu: Pipeline, gpu: Pipeline, recorded: RecordedImage) -> dict[str, Any]:
    grid, guidance = cpu.grid(recorded.size), recorded.guidance
    tokens = grid[0] * grid[1]
    sampling = cpu.bundle.manifest.sampling
    sigmas = SCHEDULES[sampling.schedule](tokens, recorded.steps)
    text = cpu.encode_text(recorded.prompt, guidance)
    latents = starting_noise(recorded.seed, tokens, sampling.latent_channels)[None]
    notes: list[str] = []
    text_error = _error(lambda: gpu.encode_text(recorded.prompt, guidance), text, "text", notes)
    prologue: dict[str, float | None] = {}
    errors, cosines = [], []
    for number, (sigma, next_sigma) in enumerate(itertools.pairwise(sigmas)):
        for pipeline in (cpu, gpu):
            pipeline.begin(latents, grid, guidance, text)
            pipeline.step(sigma, next_sigma, pipeline.bodies(recorded.steps)[number])
        after, ours = cpu.backend.get("latents"), gpu.backend.get("latents")
        theirs = (after - latents) / (next_sigma - sigma)
        velocity = (ours - latents) / (next_sigma - sigma)
        errors.append(significant(relative_error(velocity, theirs)))
        cosines.append(significant(cosine(velocity, theirs), 6))
        if number == 0:
            prologue = _prologue(cpu, gpu, notes)
        latents = after
    decoded = _error(lambda: gpu.decode(latents, grid), cpu.decode(latents, grid), "image", notes)
    known = [error for error in prologue.values() if error is not None]
    return {
        "text_error": text_error,
        "prologue_error": max(known) if known else None,
        "step_error": errors,
        "step_cosine": cosines,
        "decode_error": decoded,
        "not_compared": notes,
    }


def _prologue(cpu: Pipeline, gpu: Pipeline, notes: list[str]) -> dict[str, float | None]:
    """Relative errors of what both prologues left in buffers of the same name and shape."""
    names = sorted(set(cpu.backend.outputs("prologue")) & set(gpu.backend.outputs("prologue")))
    return {name: _error(partial(gpu.backend.get, name), cpu.backend.get(name), name, notes) for name in names}


def _error(read: Callable[[], np.ndarray], expected: np.ndarray, name: str, notes: list[str]) -> float | None:
    """The relative error of what `read` gives; None, and a note, where a backend cannot give it or it is laid out otherwise."""
    try:
        value = read()
    except BackendError as error:
        notes.append(f"{name}: {error}")
        return None
    if value.shape != expected.shape:
        notes.append(f"{name}: {list(value.shape)} here, {list(expected.shape)} on the CPU")
        return None
    return significant(relative_error(value, expected))
