"""Compares a bundle's targets with diffusers, stage by stage on the same input, on held-out prompts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from fluxc.base.errors import BuildError
from fluxc.base.numbers import significant
from fluxc.base.threads import chosen_threads
from fluxc.fidelity.constants import check_result
from fluxc.fidelity.metrics import psnr, relative_error, ssim
from fluxrt.bundle import Bundle
from fluxrt.evidence import VELOCITIES, AtOnce, Recorded, replay
from fluxrt.pipeline import Pipeline
from fluxrt.ranked import RankedPipeline
from fluxrt.request import Request
from fluxrt.schedule import SCHEDULES

if TYPE_CHECKING:
    from fluxc.fidelity.trace import Trace

LEAST_RANKS_PSNR_DB = 35.0
"""Of images of 8 bits, whose steps cost 59 dB; where inputs are rounded to NVFP4, a few codes fall the other way."""

AT_ONCE = 1.5
"""How many times the largest error of a velocity made alone one of several made at once may have: where inputs are rounded to
NVFP4, codes fall the other way; an image that got rows of another is several times further off."""


@dataclass(frozen=True)
class Reference:
    """A recorded image with the final latents [1, S, C] of its step loop and the seed its noise came from.

    `tiled` is the image decoded in tiles, where a bundle decodes this size so; the trace's is decoded whole.
    """

    trace: Trace
    final: np.ndarray
    seed: int
    tiled: np.ndarray | None = None


def compare_target(
    bundle: Bundle,
    target: str,
    recorded: list[Recorded],
    expected: list[np.ndarray],
    *,
    size: tuple[int, int],
    steps: int,
    guidance: float,
    with_images: bool,
    on_done: Callable[[], None],
    velocities: list[np.ndarray] | None = None,
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """(figures, images fp32 [height, width, 3]) of one target; without images these are none, and their figures None.

    Every stage gets diffusers' own input: tokens, embeddings, the latents of each step, the final latents. Only an image is
    end to end, and held against `expected`; where the text encoder is quantized, a second one is made of diffusers' embeddings,
    whose PSNR (`image_psnr_db_reference_text`) shows what the transformer alone costs. Figures are the worst over prompts (and
    steps); `image_psnr_db` and `image_ssim` also as means. Without images one component is in memory at a time. `on_done` is
    called `parts_of(recorded)` times a prompt, and once an image. Velocities are appended to `velocities`.
    """

    def check(what: str, prompt: str, values: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> None:
        _check_finite(target, what, prompt, values)
        check_result(target, what, prompt, values, theirs)
        if velocities is not None and what == VELOCITIES:
            velocities.extend(values)

    def open_pipeline() -> Pipeline:
        return Pipeline(bundle, target=target, threads=chosen_threads())

    images: list[np.ndarray] = []
    apart: list[float | None] = [None] * len(recorded)
    if with_images:
        with open_pipeline() as pipeline:
            found = replay(lambda: nullcontext(pipeline), recorded, size, guidance, on_done, check)
            grid = pipeline.grid(size)
            for number, one in enumerate(recorded):
                images.append(
                    _generate(pipeline, one, pipeline.encode_text(one.prompt, guidance), grid, guidance, steps)
                )
                check("image", one.prompt, images[-1:], expected[number : number + 1])
                on_done()
                if quantizes_text(bundle):
                    apart[number] = psnr(_generate(pipeline, one, one.text, grid, guidance, steps), expected[number])
                    on_done()
    else:
        found = replay(open_pipeline, recorded, size, guidance, on_done, check)
    rows = [
        {"prompt": one.prompt, "seed": one.seed}
        | msgspec.to_builtins(errors)
        | {
            "image_psnr_db": psnr(images[number], expected[number]) if with_images else None,
            "image_ssim": ssim(images[number], expected[number]) if with_images else None,
            "image_psnr_db_reference_text": apart[number],
        }
        for number, (one, errors) in enumerate(zip(recorded, found.errors, strict=True))
    ]
    summary = _summary(rows)
    check_at_once(target, found.at_once, summary["step_error"])
    if found.at_once:
        summary["at_once"] = {
            str(one.images): {"step_error": significant(one.error), "difference": significant(one.difference)}
            for one in found.at_once
        }
    return summary, images


def against_exact(
    exact: str,
    velocities: tuple[list[np.ndarray], list[np.ndarray]],
    images: tuple[list[np.ndarray], list[np.ndarray]],
) -> dict[str, Any]:
    """How far a target is from the target `exact`: of (its own, the other's) velocities on the same latents and images."""
    errors = [relative_error(own, other) for own, other in zip(*velocities, strict=True)]
    psnrs = [psnr(own, other) for own, other in zip(*images, strict=True)]
    return {
        "target": exact,
        "velocity_error": significant(float(np.sqrt(np.mean(np.square(errors))))),
        "velocity_error_worst": significant(max(errors)),
        "image_psnr_db": significant(float(np.mean(psnrs))) if psnrs else None,
        "image_psnr_db_worst": significant(min(psnrs)) if psnrs else None,
    }


def check_at_once(target: str, at_once: Sequence[AtOnce], alone: float) -> None:
    """Raise BuildError where an image made with others is not the one that it is alone."""
    for one in at_once:
        if not one.error <= AT_ONCE * alone + 1e-3:
            raise BuildError(
                f"target {target}: of {one.images} images made at once, one has a velocity with relative error "
                f"{one.error:.4g}, where made alone {alone:.4g} is the largest; its graphs mix images, no bundle was written"
            )


def quantizes_text(bundle: Bundle) -> bool:
    """Whether a layer of the text encoder is quantized, so that embeddings are not diffusers' to rounding."""
    return any(layer.component == "text_encoder" and layer.format != "bf16" for layer in bundle.manifest.precision)


def compare_ranks(
    bundle: Bundle,
    target: str,
    whole: str,
    expected: list[np.ndarray],
    recorded: list[Recorded],
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
        for one in recorded:
            request = Request(
                one.prompt,
                steps=steps,
                guidance=guidance,
                size=size,
                latents=one.latents[:1],
                step_cache=False,
            )
            result = pipeline.generate(request)
            images.append(np.asarray(result.images[0], np.float32) / 255)
            on_image()
    psnrs = [psnr(ours, theirs) for ours, theirs in zip(images, expected, strict=True)]
    if min(psnrs) < LEAST_RANKS_PSNR_DB:
        worst = recorded[int(np.argmin(psnrs))].prompt
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
        if isinstance(value, list | tuple):
            return [significant(v, 6) for v in value]
        return significant(value) if isinstance(value, float) else value

    psnrs, ssims = [row["image_psnr_db"] for row in rows], [row["image_ssim"] for row in rows]
    is_none = None in psnrs
    apart = [row["image_psnr_db_reference_text"] for row in rows]
    of_transformer = {} if None in apart else {"image_psnr_db_reference_text": significant(float(np.mean(apart)))}
    return of_transformer | {
        "text_error": significant(max(row["text_error"] for row in rows)),
        "prologue_error": significant(max(row["prologue_error"] for row in rows)),
        "step_error": significant(max(max(row["step_error"]) for row in rows)),
        "step_cosine": significant(min(min(row["step_cosine"]) for row in rows), 6),
        "decode_error": significant(max(row["decode_error"] for row in rows)),
        "image_psnr_db": None if is_none else significant(float(np.mean(psnrs))),
        "image_psnr_db_worst": None if is_none else significant(min(psnrs)),
        "image_ssim": None if None in ssims else significant(float(np.mean(ssims))),
        "prompts": [{key: rounded(value) for key, value in row.items()} for row in rows],
    }


def _check_finite(target: str, what: str, prompt: str, values: Sequence[np.ndarray]) -> None:
    bad = [number for number, value in enumerate(values) if not np.isfinite(value).all()]
    if bad:
        raise BuildError(
            f"target {target}: the {what} for {prompt!r} hold NaN or infinity (entry {bad[0]} of {len(values)}); "
            "the checkpoint, its calibration or the target's graphs are wrong, no bundle was written"
        )


def _generate(
    pipeline: Pipeline, recorded: Recorded, text: np.ndarray, grid: tuple[int, int], guidance: float, steps: int
) -> np.ndarray:
    """The image that the target makes of the embeddings `text` by itself, from the reference's noise."""
    sigmas = SCHEDULES[pipeline.bundle.manifest.sampling.schedule](grid[0] * grid[1], steps)
    pipeline.begin(recorded.latents[:1], grid, guidance, text)
    for (sigma, next_sigma), body in zip(itertools.pairwise(sigmas), pipeline.bodies(steps), strict=True):
        pipeline.step(sigma, next_sigma, body)
    image: np.ndarray = pipeline.decode(pipeline.backend.get("latents"), grid)[0]
    return image
