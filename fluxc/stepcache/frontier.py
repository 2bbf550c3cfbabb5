"""Quality against skipped steps on held-out prompts: our rule and schedule, the published rule, and simply fewer steps.

Every method is given the same number of steps to compute and runs in the bundle's own runtime; its images are compared with
those of the full run of the same target. A point is a folder: figures.json, and images as .npy where they will be shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from fluxc.base.numbers import as_json, significant
from fluxc.base.threads import chosen_threads
from fluxc.fidelity.metrics import psnr, ssim
from fluxc.recipe.structs import StepCache as Settings
from fluxc.recipe.structs import most_skipped
from fluxc.stepcache.policy import PUBLISHED, best_schedules, find_threshold
from fluxc.stepcache.trace import StepTrace
from fluxrt.bundle import Bundle
from fluxrt.manifest import CacheRule, StepCache
from fluxrt.pipeline import Pipeline, starting_noise
from fluxrt.schedule import SCHEDULES
from fluxrt.stepcache import Decisions

if TYPE_CHECKING:
    from fluxc.fidelity.perceptual import Judges

METHODS = ("static", "dynamic", "published", "fewer steps")
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


@dataclass(frozen=True)
class FrontierRequest:
    """The images a frontier is measured on: prompt i starts from the noise of `seed` + i."""

    prompts: list[str]
    seed: int
    steps: int
    guidance: float
    size: tuple[int, int]


def counts(settings: Settings, steps: int) -> list[int]:
    """The numbers of skipped steps to compare."""
    if settings.frontier != "auto":
        return sorted(set(settings.frontier))
    most = most_skipped(steps, settings.first, settings.last, settings.max_consecutive_skips)
    return sorted({round(share * steps) for share in SHARES if 1 <= round(share * steps) <= most})


def policies(cache: StepCache, trace: StepTrace, count: int) -> dict[str, Any]:
    """How every method skips `count` of the trace's steps: JSON-like, for generate_all."""
    rule = find_threshold(cache.rule, trace.change, count)
    limits = (cache.rule.first, cache.rule.last, cache.rule.max_consecutive_skips or trace.steps)
    return {
        "static": {"schedule": list(best_schedules(trace.residual_error, *limits)[count][0])},
        "dynamic": {"rule": _as_json(rule)},
        "published": {"rule": _as_json(find_threshold(PUBLISHED, trace.change, count))},
        "fewer steps": {"steps": trace.steps - count},
    }


def chosen(cache: StepCache) -> dict[str, Any]:
    """The policy the bundle serves with."""
    return {"schedule": list(cache.schedule)} if cache.mode == "static" else {"rule": _as_json(cache.rule)}


def of_reference(cache: StepCache) -> dict[str, Any]:
    """The same of what the trace of the checkpoint's own model came to (choose.with_reference)."""
    other = cache.fit["reference"]
    return {"schedule": other["schedule"]} if cache.mode == "static" else {"rule": other["rule"]}


def generate_all(
    bundle: Bundle, target: str, request: FrontierRequest, policy: dict[str, Any], advance: Callable[[], None]
) -> tuple[np.ndarray, list[list[int]]]:
    """Images fp32 [prompts, height, width, 3] under `policy` ({} computes every step), and the steps each skipped."""
    pipeline = Pipeline(bundle, target=target, threads=chosen_threads())
    sampling = bundle.manifest.sampling
    grid = pipeline.grid(request.size)
    tokens = grid[0] * grid[1]
    steps = policy.get("steps", request.steps)
    sigmas = SCHEDULES[sampling.schedule](tokens, steps)
    images, skipped = [], []
    for number, prompt in enumerate(request.prompts):
        noise = starting_noise(request.seed + number, tokens, sampling.latent_channels)[None]
        words = pipeline.tokenize(pipeline.branches(prompt, request.guidance))
        pipeline.begin(noise, grid, request.guidance, words)
        skips = list(pipeline.denoise(sigmas, _decisions(policy, steps)))
        skipped.append([step for step, skip in enumerate(skips) if skip])
        images.append(pipeline.decode(pipeline.backend.get("latents"), grid)[0])
        advance()
    return np.stack(images), skipped


def figures(
    images: np.ndarray, full: np.ndarray, skipped: list[list[int]], steps: int, judged: list[dict[str, float]]
) -> dict[str, Any]:
    """Quality of `images` against the full run: mean, 5th percentile, worst prompt; steps computed an image.

    `judged` holds further measures by image, see Judges.
    """
    psnrs = [psnr(ours, reference) for ours, reference in zip(images, full, strict=True)]
    found = [ssim(ours, reference) for ours, reference in zip(images, full, strict=True)]
    ssims = [similarity for similarity in found if similarity is not None]
    fits = len(ssims) == len(found)
    return {
        "computed": round(float(np.mean([steps - len(left_out) for left_out in skipped])), 2),
        "psnr_db": significant(float(np.mean(psnrs))),
        "psnr_db_p5": significant(float(np.percentile(psnrs, 5))),
        "psnr_db_worst": significant(min(psnrs)),
        "largest_difference": int(np.abs(np.rint(images * 255) - np.rint(full * 255)).max()),
        "worst_prompt": int(np.argmin(psnrs)),
        "ssim": significant(float(np.mean(ssims)), 6) if fits else None,
        "ssim_worst": significant(min(ssims), 6) if fits else None,
        **{name: significant(float(np.mean([row[name] for row in judged]))) for name in judged[0]},
        "by_prompt": [
            {"skipped": left_out, "psnr_db": significant(p), "ssim": None if s is None else significant(s, 6)}
            | {name: significant(value) for name, value in row.items()}
            for left_out, p, s, row in zip(skipped, psnrs, found, judged, strict=True)
        ],
    }


def measure_point(
    folder: Path,
    bundle: Bundle,
    target: str,
    request: FrontierRequest,
    methods: dict[str, dict[str, Any]],
    full: np.ndarray,
    keep: Iterable[str],
    judges: Judges,
    advance: Callable[[], None],
) -> None:
    """Write figures.json into `folder`, and METHOD.npy with the images of every method in `keep`."""
    found, kept = {}, {}
    for method, policy in methods.items():
        images, skipped = generate_all(bundle, target, request, policy, advance)
        steps = policy.get("steps", request.steps)
        judged = judges.figures(images, full, request.prompts)
        found[method] = figures(images, full, skipped, steps, judged) | {"policy": policy}
        if method in keep:
            kept[method] = images
    (folder / "figures.json").write_text(as_json(found, "step cache"))
    for method, images in kept.items():
        np.save(folder / f"{method}.npy", images)


def _decisions(policy: dict[str, Any], steps: int) -> Decisions | None:
    if "schedule" in policy:
        return Decisions(steps, None, policy["schedule"])
    if "rule" in policy:
        return Decisions(steps, _rule(policy["rule"]))
    return None


def _as_json(rule: CacheRule) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(rule)
    return plain


def _rule(plain: dict[str, Any]) -> CacheRule:
    return msgspec.convert(plain, CacheRule)
