"""What the recipe asks a model to do while it is measured: prompts, steps, guidance, size, seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from fluxc.base.errors import RecipeError
from fluxc.fidelity.evidence import MOST_PROMPTS
from fluxc.recipe.checks import SEEDS
from fluxc.recipe.load import LoadedRecipe
from fluxc.recipe.structs import Recipe, StepCache

LEAST_PROMPTS = 8
MOST_ATTRIBUTED = 2
"""Prompts of which there are images of each cause of error."""
LARGE_PROMPTS, LARGE_STEPS, LARGE_SIDE = 4, 4, 256
"""What measuring a large model takes where the recipe does not say: prompts, steps, pixels of a square image's side."""


def calibration_request(loaded: LoadedRecipe, is_large: bool) -> dict[str, Any]:
    """What the calibration pass is asked to do, with the prompts themselves; `is_large` as Source says."""
    recipe = loaded.recipe
    calibration, sampling = recipe.calibration, recipe.sampling
    prompts = [] if calibration.prompts is None else loaded.prompts("calibration.prompts", calibration.prompts)
    prompts = spread_evenly(prompts, calibration.max_prompts or (LARGE_PROMPTS if is_large else None))
    _check_seeds("calibration.seed", calibration.seed, prompts)
    steps, size = sampling.steps, recipe.listed_sizes[0]
    if is_large:
        steps, size = min(steps, LARGE_STEPS), _at_most(size, LARGE_SIDE)
    return {
        "prompts": prompts,
        "steps": calibration.steps or steps,
        "guidance": sampling.guidance if calibration.guidance is None else calibration.guidance,
        "size": list(calibration.size or size),
        "seed": calibration.seed,
        "text_length": recipe.text.length,
    }


def trace_request(loaded: LoadedRecipe, traced: str | None = None) -> dict[str, Any]:
    """What the trace is asked to do, with the prompts themselves: the steps and the size that are served, whatever calibration
    takes; and of which model, `traced` or as the recipe says (`precision` is None for the checkpoint's own)."""
    recipe, settings = loaded.recipe, cache_settings(loaded)
    request = calibration_request(loaded, is_large=False)
    request |= {
        "steps": recipe.sampling.steps,
        "size": list(trace_size(recipe)),
        "dtype": recipe.fidelity.reference,
        "precision": _rounded(recipe) if (traced or settings.traced) == "quantized" else None,
    }
    if settings.prompts is not None:
        request["prompts"] = loaded.prompts("step_cache.prompts", settings.prompts)
        _check_seeds("calibration.seed", recipe.calibration.seed, request["prompts"])
    elif recipe.calibration.prompts is not None:
        request["prompts"] = loaded.prompts("calibration.prompts", recipe.calibration.prompts)
    if len(request["prompts"]) < LEAST_PROMPTS:
        field = "calibration.prompts" if settings.prompts is None else "step_cache.prompts"
        raise RecipeError(
            f"{field}: {len(request['prompts'])} prompts are too few to fit a step cache on some and judge it on others; "
            f"give at least {LEAST_PROMPTS}, better some dozens"
        )
    return request


def _rounded(recipe: Recipe) -> dict[str, Any]:
    """What says how layers are rounded, as JSON has it."""
    asked = recipe.calibration
    ranges: dict[str, Any] = {"engine": asked.engine, "algorithm": asked.algorithm}
    ranges |= {"amax": asked.amax, "percentile": asked.percentile, "margin": asked.margin}
    inputs = any(target.rounds_inputs for target in recipe.targets)
    said = {"precision": recipe.precision, "inputs_rounded": inputs, "ranges": ranges if inputs else None}
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(said))
    return found


def trace_size(recipe: Recipe) -> tuple[int, int]:
    """The size that is traced: calibration's where that is served, otherwise the first of `sizes`."""
    size = recipe.calibration.size
    return size if size and recipe.serves(size) else recipe.listed_sizes[0]


@dataclass(frozen=True)
class FidelityRequest:
    """What is compared with diffusers: `level` none, stages or images; held-out prompts; how their reference is generated."""

    level: str
    prompts: list[str]
    steps: int
    size: tuple[int, int]


def fidelity_request(loaded: LoadedRecipe, is_large: bool) -> FidelityRequest:
    """What every target is compared with diffusers on, with the prompts themselves; `is_large` as Source says.

    Where no target runs on the machine that builds, that is what evidence records, and no image.
    """
    recipe, fidelity = loaded.recipe, loaded.recipe.fidelity
    level, runs_here = level_of(recipe, is_large), any(target.runs_here for target in recipe.targets)
    if level == "images" and not runs_here:
        level = "stages"
    prompts = []
    if level != "none" and fidelity.prompts is not None:
        prompts = loaded.prompts("fidelity.prompts", fidelity.prompts)
    prompts = spread_evenly(prompts, fidelity.max_prompts or (1 if is_large else None))
    if not runs_here:
        prompts = prompts[:MOST_PROMPTS]
    _check_seeds("fidelity.seed", fidelity.seed, prompts)
    steps, size = recipe.sampling.steps, recipe.listed_sizes[0]
    if level == "stages":
        steps, size = min(steps, LARGE_STEPS), min(recipe.listed_sizes, key=lambda size: size[0] * size[1])
    return FidelityRequest(level, prompts, fidelity.steps or steps, fidelity.size or size)


def attributed_prompts(loaded: LoadedRecipe, is_large: bool) -> list[tuple[str, int]]:
    """The held-out prompts, at most two, that images of each cause of error are generated for, with their seeds: none where the
    level is not images, or attribution is not asked for."""
    fidelity = loaded.recipe.fidelity
    if not fidelity.attribution or fidelity.prompts is None or level_of(loaded.recipe, is_large) != "images":
        return []
    prompts = spread_evenly(loaded.prompts("fidelity.prompts", fidelity.prompts), fidelity.max_prompts)
    numbers = spread_evenly([str(number) for number in range(len(prompts))], MOST_ATTRIBUTED)
    return [(prompts[int(number)], fidelity.seed + int(number)) for number in numbers]


def level_of(recipe: Recipe, is_large: bool) -> str:
    """`fidelity.level`, or its default."""
    return recipe.fidelity.level or ("stages" if is_large else "images")


def spread_evenly(prompts: list[str], most: int | None) -> list[str]:
    """At most `most` of `prompts`, from the first to the last at even distances; all of them where it is None."""
    if most is None or len(prompts) <= most:
        return prompts
    return [prompts[number * len(prompts) // most] for number in range(most)]


def _at_most(size: tuple[int, int], side: int) -> tuple[int, int]:
    """`size`, or, where it has more pixels, a square of this `side`."""
    return size if size[0] * size[1] <= side * side else (side, side)


def _check_seeds(field: str, seed: int, prompts: list[str]) -> None:
    if seed + len(prompts) > SEEDS:
        raise RecipeError(
            f"{field}: {len(prompts)} prompts start from the seeds {seed}, {seed} + 1, ..., which must be less than 2^64"
        )


def cache_settings(loaded: LoadedRecipe) -> StepCache:
    """What the recipe asks of the step cache, which it must have."""
    assert loaded.recipe.step_cache is not None
    return loaded.recipe.step_cache


def judges_of(loaded: LoadedRecipe) -> dict[str, list[Path]]:
    """The files of LPIPS and of the image-text model that the recipe names; RecipeError where one is not there."""
    fidelity = loaded.recipe.fidelity
    found: dict[str, list[Path]] = {}
    for field, is_there in (("lpips", Path.is_file), ("image_text", Path.is_dir)):
        name = getattr(fidelity, field)
        if name is None:
            continue
        path = loaded.path(f"fidelity.{field}", name)
        if not is_there(path):
            what = "file" if field == "lpips" else "folder"
            raise RecipeError(f"fidelity.{field}: there is no {what} {path}; weights are not downloaded")
        found[field] = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
        if not found[field]:
            raise RecipeError(f"fidelity.{field}: {path} is empty; give a CLIP model's folder")
    return found
