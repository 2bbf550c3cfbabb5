"""Compares a bundle's targets with diffusers, stage by stage on the same input, on held-out prompts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fluxc.base.errors import BuildError
from fluxc.base.numbers import significant
from fluxc.base.threads import chosen_threads
from fluxc.fidelity.metrics import cosine, psnr, relative_error, ssim
from fluxc.fidelity.trace import Trace
from fluxrt.backends import run
from fluxrt.bundle import Bundle
from fluxrt.pipeline import Pipeline
from fluxrt.ranked import RankedPipeline
from fluxrt.request import Request
from fluxrt.schedule import SCHEDULES

LEAST_RANKS_PSNR_DB = 35.0
"""Of images of 8 bits, whose steps cost 59 dB; where inputs are rounded to NVFP4, a few codes fall the other way."""


@dataclass(frozen=True)
class Reference:
    """A recorded image with the final latents [1, S, C] of its step loop and the seed its noise came from."""

    trace: Trace
    final: np.ndarray
    seed: int


def compare_target(
    bundle: Bundle,
    target: str,
    references: list[Reference],
    *,
    size: tuple[int, int],
    steps: int,
    guidance: float,
    on_image: Callable[[], None],
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """(figures, images fp32 [height, width, 3]) of one target.

    Every stage gets diffusers' own input: tokens, embeddings, the latents of each step, the final latents. Only `image` is
    end to end. Figures are the worst over prompts (and steps); `image_psnr_db` and `image_ssim` also as means.
    """
    pipeline = Pipeline(bundle, target=target, threads=chosen_threads())
    grid = pipeline.grid(size)
    rows: list[dict[str, Any]] = []
    images = []
    for reference in references:
        trace = reference.trace
        _check_tokens(pipeline, trace)
        _check_sigmas(pipeline, trace, grid, steps)
        text = pipeline.encode_text(trace.prompt, guidance)
        reference_text = np.concatenate(trace.text)
        pipeline.begin(trace.latents[0], grid, guidance, reference_text)
        prologue = run(pipeline.backend, "prologue", {"sigma": np.array(trace.sigmas[0], dtype=np.float32)})
        velocities = [
            _velocity(pipeline, latents, reference_text, grid, guidance, sigma)
            for latents, sigma in zip(trace.latents, trace.sigmas, strict=True)
        ]
        decoded = pipeline.decode(reference.final, grid)[0]
        image = _generate(pipeline, text, grid, guidance, trace, steps)
        images.append(image)
        pairs = list(zip(velocities, trace.velocities, strict=True))
        made = {
            "text embeddings": [text],
            "prologue": list(prologue.values()),
            "velocities": velocities,
            "decoded latents": [decoded],
            "image": [image],
        }
        for what, values in made.items():
            _check_finite(target, what, trace.prompt, values)
        rows.append(
            {
                "prompt": trace.prompt,
                "seed": reference.seed,
                "text_error": relative_error(text, reference_text),
                "prologue_error": max(_prologue_error(prologue[k], v) for k, v in trace.prologue.items()),
                "step_error": [relative_error(ours, theirs) for ours, theirs in pairs],
                "step_cosine": [cosine(ours, theirs) for ours, theirs in pairs],
                "decode_error": relative_error(decoded, trace.image),
                "image_psnr_db": psnr(image, trace.image),
                "image_ssim": ssim(image, trace.image),
            }
        )
        on_image()
    return _summary(rows), images


def compare_ranks(
    bundle: Bundle,
    target: str,
    whole: str,
    expected: list[np.ndarray],
    references: list[Reference],
    steps: int,
    guidance: float,
    size: tuple[int, int],
    on_image: Callable[[], None],
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """(figures, images) of a target sharded for processes against `expected`, the images of the target `whole`.

    Raises BuildError where an image is not the one that a single process generates, but for rounding.
    """
    images = []
    entry = bundle.target(target)
    with RankedPipeline(bundle, entry, threads=chosen_threads(entry.gpus)) as pipeline:
        for reference in references:
            request = Request(
                reference.trace.prompt,
                steps=steps,
                guidance=guidance,
                size=size,
                latents=reference.trace.latents[0],
                step_cache=False,
            )
            result = pipeline.generate(request)
            images.append(np.asarray(result.images[0], np.float32) / 255)
            on_image()
    psnrs = [psnr(ours, theirs) for ours, theirs in zip(images, expected, strict=True)]
    if min(psnrs) < LEAST_RANKS_PSNR_DB:
        worst = references[int(np.argmin(psnrs))].trace.prompt
        raise BuildError(
            f"target {target}: its ranks generate {worst!r} at {min(psnrs):.1f} dB of what {whole} generates (at least "
            f"{LEAST_RANKS_PSNR_DB:g} dB is expected); no bundle was written"
        )
    figures = {
        "ranks": bundle.target(target).gpus,
        "against": whole,
        "image_psnr_db": significant(float(np.mean(psnrs))),
        "image_psnr_db_worst": significant(min(psnrs)),
    }
    return figures, images


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def rounded(value: Any) -> Any:
        if isinstance(value, list):
            return [significant(v, 6) for v in value]
        return significant(value) if isinstance(value, float) else value

    psnrs, ssims = [row["image_psnr_db"] for row in rows], [row["image_ssim"] for row in rows]
    return {
        "text_error": significant(max(row["text_error"] for row in rows)),
        "prologue_error": significant(max(row["prologue_error"] for row in rows)),
        "step_error": significant(max(max(row["step_error"]) for row in rows)),
        "step_cosine": significant(min(min(row["step_cosine"]) for row in rows), 6),
        "decode_error": significant(max(row["decode_error"] for row in rows)),
        "image_psnr_db": significant(float(np.mean(psnrs))),
        "image_psnr_db_worst": significant(min(psnrs)),
        "image_ssim": None if None in ssims else significant(float(np.mean(ssims))),
        "prompts": [{key: rounded(value) for key, value in row.items()} for row in rows],
    }


def _check_finite(target: str, what: str, prompt: str, values: list[np.ndarray]) -> None:
    bad = [number for number, value in enumerate(values) if not np.isfinite(value).all()]
    if bad:
        raise BuildError(
            f"target {target}: the {what} for {prompt!r} hold NaN or infinity (entry {bad[0]} of {len(values)}); "
            "the checkpoint, its calibration or the target's graphs are wrong, no bundle was written"
        )


def _check_tokens(pipeline: Pipeline, trace: Trace) -> None:
    for prompt, theirs in zip((trace.prompt, ""), trace.input_ids, strict=False):
        ours, _ = pipeline.tokenize([prompt])
        if not np.array_equal(ours, theirs):
            raise BuildError(f"the runtime tokenizes {prompt!r} as {ours.tolist()}, diffusers as {theirs.tolist()}")


def _check_sigmas(pipeline: Pipeline, trace: Trace, grid: tuple[int, int], steps: int) -> None:
    ours = SCHEDULES[pipeline.bundle.manifest.sampling.schedule](grid[0] * grid[1], steps)[:-1]
    if len(ours) != len(trace.sigmas) or not np.allclose(ours, trace.sigmas, rtol=1e-5, atol=0):
        raise BuildError(f"the runtime's schedule {ours} is not diffusers' {trace.sigmas}")


def _prologue_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    # The runtime stacks the guidance branches; diffusers runs them one after the other, the conditional one first.
    return relative_error(ours[:1] if ours.ndim == 3 else ours, theirs)


def _velocity(
    pipeline: Pipeline, latents: np.ndarray, text: np.ndarray, grid: tuple[int, int], guidance: float, sigma: float
) -> np.ndarray:
    """The guided velocity at `latents`: what an Euler step of length one adds."""
    pipeline.begin(latents, grid, guidance, text)
    pipeline.step(sigma, sigma + 1.0)
    return pipeline.backend.get("latents") - latents


def _generate(
    pipeline: Pipeline, text: np.ndarray, grid: tuple[int, int], guidance: float, trace: Trace, steps: int
) -> np.ndarray:
    sigmas = SCHEDULES[pipeline.bundle.manifest.sampling.schedule](grid[0] * grid[1], steps)
    pipeline.begin(trace.latents[0], grid, guidance, text)
    for sigma, next_sigma in itertools.pairwise(sigmas):
        pipeline.step(sigma, next_sigma)
    return pipeline.decode(pipeline.backend.get("latents"), grid)[0]
