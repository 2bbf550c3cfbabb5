"""What the recipe asks a model to do while it is measured: prompts, steps, guidance, size, seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fluxc.base.errors import RecipeError
from fluxc.recipe.checks import SEEDS
from fluxc.recipe.load import LoadedRecipe
from fluxc.recipe.structs import StepCache

LEAST_PROMPTS = 8


def calibration_request(loaded: LoadedRecipe) -> dict[str, Any]:
    """What the calibration pass is asked to do, with the prompts themselves."""
    recipe = loaded.recipe
    calibration, sampling = recipe.calibration, recipe.sampling
    prompts = loaded.prompts("calibration.prompts", calibration.prompts)
    _check_seeds("calibration.seed", calibration.seed, prompts)
    return {
        "prompts": prompts,
        "steps": calibration.steps or sampling.steps,
        "guidance": sampling.guidance if calibration.guidance is None else calibration.guidance,
        "size": list(calibration.size or recipe.sizes[0]),
        "seed": calibration.seed,
        "text_length": recipe.text.length,
    }


def trace_request(loaded: LoadedRecipe) -> dict[str, Any]:
    """What the trace is asked to do, with the prompts themselves: the steps that are served, whatever calibration takes."""
    recipe, settings = loaded.recipe, cache_settings(loaded)
    request = calibration_request(loaded) | {"steps": recipe.sampling.steps, "dtype": recipe.fidelity.reference}
    if settings.prompts is not None:
        request["prompts"] = loaded.prompts("step_cache.prompts", settings.prompts)
        _check_seeds("calibration.seed", recipe.calibration.seed, request["prompts"])
    if len(request["prompts"]) < LEAST_PROMPTS:
        field = "calibration.prompts" if settings.prompts is None else "step_cache.prompts"
        raise RecipeError(
            f"{field}: {len(request['prompts'])} prompts are too few to fit a step cache on some and judge it on others; "
            f"give at least {LEAST_PROMPTS}, better some dozens"
        )
    return request


def held_out_prompts(loaded: LoadedRecipe) -> list[str]:
    """The prompts that every target is compared with diffusers on."""
    fidelity = loaded.recipe.fidelity
    prompts = loaded.prompts("fidelity.prompts", fidelity.prompts)
    _check_seeds("fidelity.seed", fidelity.seed, prompts)
    return prompts


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
