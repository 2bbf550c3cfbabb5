"""What a recipe's values must be, whatever the checkpoint: each refusal names the field and the way out."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import msgspec

from fluxc.base.errors import RecipeError
from fluxc.base.numbers import floats
from fluxc.recipe.structs import LAGS, LEAST_STEPS, Recipe, most_skipped
from fluxc.recipe.targets import Refuse

SEEDS = 1 << 64
"""Seeds are less than this; so is that of the last of several prompts."""
MOST_STEPS = 1000
LONGEST_SIDE = 16384
"""Pixels."""
LONGEST_TEXT = 32768
"""Tokens."""
MOST_GUIDANCE = 1000.0
LONGEST_NAME = 200
"""Characters; what a build makes beside the bundle is named after it, and a file's name has at most 255."""
LEAST_SHARD_GIB = 2.0**-20
BEST_PSNR_DB = 120.0
"""What identical images get."""

PATHS = (
    "model.source",
    "calibration.prompts",
    "calibration.file",
    "fidelity.prompts",
    "fidelity.lpips",
    "fidelity.image_text",
    "step_cache.prompts",
    "step_cache.trace",
)


def check_values(recipe: Recipe, path: Path) -> None:
    """Raise RecipeError at the first value that is not possible."""

    def refuse(field: str, why: str) -> None:
        raise RecipeError(f"{path}: {field}: {why}")

    for field, number in floats(msgspec.to_builtins(recipe)):
        if not math.isfinite(number):
            refuse(field, f"must be a finite number, got {number}")
    for field in PATHS:
        _check_path(field, _value(recipe, field), refuse)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", recipe.name) or len(recipe.name) > LONGEST_NAME:
        refuse(
            "name",
            f"{recipe.name!r} becomes a folder name; use at most {LONGEST_NAME} letters, digits, '.', '_' and '-'",
        )
    if not recipe.sizes:
        refuse("sizes", "give at least one [height, width]")
    if len(set(recipe.sizes)) != len(recipe.sizes):
        refuse("sizes", "a size appears twice")
    for size in recipe.sizes:
        if not all(1 <= side <= LONGEST_SIDE for side in size):
            refuse("sizes", f"{list(size)} is not possible: height and width are from 1 to {LONGEST_SIDE} pixels")
    if recipe.calibration.size and recipe.calibration.size not in recipe.sizes:
        refuse("calibration.size", f"{list(recipe.calibration.size)} is not one of sizes")
    if not 0 < recipe.calibration.percentile <= 100:
        refuse("calibration.percentile", f"must be more than 0 and at most 100, got {recipe.calibration.percentile}")
    if recipe.calibration.engine == "fluxc" and recipe.calibration.algorithm != "max":
        refuse(
            "calibration.algorithm", f"{recipe.calibration.algorithm!r} is modelopt's; set calibration.engine: modelopt"
        )
    if not 1 <= recipe.text.length <= LONGEST_TEXT:
        refuse("text.length", f"must be at least 1 and at most {LONGEST_TEXT}, got {recipe.text.length}")
    for field in ("sampling.steps", "calibration.steps"):
        steps = _value(recipe, field)
        if steps is not None and not 1 <= steps <= MOST_STEPS:
            refuse(field, f"must be at least 1 and at most {MOST_STEPS}, got {steps}")
    for field in ("sampling.guidance", "calibration.guidance"):
        guidance = _value(recipe, field)
        if guidance is not None and not 0 <= guidance <= MOST_GUIDANCE:
            refuse(field, f"must be at least 0 and at most {MOST_GUIDANCE:g}, got {guidance:g}")
    for field in ("calibration.seed", "fidelity.seed"):
        if not 0 <= _value(recipe, field) < SEEDS:
            refuse(field, f"must be at least 0 and less than 2^64, got {_value(recipe, field)}")
    text, transformer = recipe.precision.text_encoder, recipe.precision.transformer
    if text.exclude == "auto" or text.budget:
        refuse(
            "precision.text_encoder.exclude", "auto measures the transformer; list the text encoder's layers to keep"
        )
    if transformer.exclude == "auto" and recipe.calibration.engine == "modelopt":
        refuse(
            "precision.transformer.exclude",
            "auto measures fluxc's own quantizer; with calibration.engine: modelopt, list the layers",
        )
    budget = transformer.budget
    if (transformer.exclude == "auto") != (budget is not None):
        refuse(
            "precision.transformer.budget", "goes with `exclude: auto`, which needs it: {share: 0.03} or {error: 0.05}"
        )
    if budget is not None:
        given = [value for value in (budget.share, budget.error) if value is not None]
        if len(given) != 1 or not 0 < given[0] < 1:
            refuse("precision.transformer.budget", "give either share or error, more than 0 and less than 1")
    if recipe.weights.shard_gib is not None and not recipe.weights.shard_gib >= LEAST_SHARD_GIB:
        refuse("weights.shard_gib", f"must be positive, 2^-20 (a KiB) or more, got {recipe.weights.shard_gib:g}")
    _check_gates(recipe, refuse)
    if recipe.step_cache:
        _check_step_cache(recipe, refuse)
    else:
        for field in ("gates.step_cache_psnr_db", "fidelity.lpips", "fidelity.image_text"):
            if _value(recipe, field) is not None:
                refuse(field, "there is no step_cache in this recipe")
    if not recipe.targets:
        refuse("targets", "give at least one, for example {kind: onnxruntime}")
    _check_targets(recipe, refuse)


def _value(recipe: Recipe, field: str) -> Any:
    """What the recipe says under a name with dots; None where it has no such part."""
    found: Any = recipe
    for part in field.split("."):
        found = None if found is None else getattr(found, part)
    return found


def _check_path(field: str, path: str | None, refuse: Refuse) -> None:
    if path is None:
        return
    if not path.strip():
        refuse(field, "is empty; give a path")
    if any(len(part.encode()) > 255 for part in path.split("/")) or len(path.encode()) >= 4096:
        refuse(field, f"no file has so long a name: {path[:40]!r}...")


def _check_gates(recipe: Recipe, refuse: Refuse) -> None:
    """Refuse gates that no build can pass."""
    gates = recipe.gates
    for field, most in (("step_cosine", 1.0), ("image_psnr_db", BEST_PSNR_DB), ("step_cache_psnr_db", BEST_PSNR_DB)):
        gate = getattr(gates, field)
        if gate is not None and gate > most:
            refuse(f"gates.{field}", f"is at most {most:g}, which what is identical gets; got {gate:g}")


def _check_targets(recipe: Recipe, refuse: Refuse) -> None:
    for at, target in enumerate(recipe.targets):
        target.check(f"targets[{at}]", refuse)
    names = [target.name for target in recipe.targets]
    for at, target in enumerate(recipe.targets):
        if target.in_one and target.in_one.name not in names:
            refuse(
                f"targets[{at}]",
                f"what {target.ranks} processes generate is held against what one generates; add the same target without gpus",
            )
    for name in names:
        if names.count(name) > 1:
            refuse("targets", f"{name!r} appears twice")


def _check_step_cache(recipe: Recipe, refuse: Refuse) -> None:
    cache, steps = recipe.step_cache, recipe.sampling.steps
    assert cache is not None
    if cache.skip is not None and cache.max_error is not None:
        refuse("step_cache", "give either skip or max_error")
    if isinstance(cache.skip, float) and not cache.skip > 0:
        refuse(
            "step_cache.skip", f"must be more than 0, got {cache.skip:g}; leave step_cache out to compute every step"
        )
    if cache.max_error is not None and not cache.max_error > 0:
        refuse("step_cache.max_error", f"must be more than 0, got {cache.max_error:g}")
    if cache.min_r2 > 1:
        refuse("step_cache.min_r2", f"must be at most 1, got {cache.min_r2:g}")
    if not 1 <= cache.degree <= 5:
        refuse("step_cache.degree", f"must be 1 to 5, got {cache.degree}")
    for field, least in (("first", 1), ("last", 0), ("max_consecutive_skips", 1)):
        if getattr(cache, field) < least:
            refuse(f"step_cache.{field}", f"must be at least {least}, got {getattr(cache, field)}")
    if cache.max_consecutive_skips > LAGS:
        refuse(
            "step_cache.max_consecutive_skips",
            f"at most {LAGS}, which is how far back a trace looks, got {cache.max_consecutive_skips}",
        )
    if steps < LEAST_STEPS:
        refuse(
            "step_cache",
            f"{steps} steps are too few to skip any (at least {LEAST_STEPS}): a model distilled to so few has none that "
            "resemble each other; leave step_cache out, or raise sampling.steps",
        )
    most = most_skipped(steps, cache.first, cache.last, cache.max_consecutive_skips)
    if most < 1:
        refuse("step_cache", f"first and last compute all of the {steps} steps, so none can be skipped; lower them")
    wanted = [("skip", cache.skip)] if isinstance(cache.skip, float) else []
    wanted += [("frontier", max(cache.frontier))] if cache.frontier and cache.frontier != "auto" else []
    for field, count in wanted:
        if count > most:
            refuse(
                f"step_cache.{field}",
                f"{count:g} of {steps} steps cannot be skipped; at most {most} can, see max_consecutive_skips",
            )
    if cache.frontier != "auto" and any(count < 1 for count in cache.frontier):
        refuse("step_cache.frontier", "lists numbers of skipped steps, 1 or more")
