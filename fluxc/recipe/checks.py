"""What fields of a recipe must be together, whatever the checkpoint: each refusal names the field and the way out.

What a field must be by itself stands with the field (fluxc.recipe.structs). A check runs where the fields it reads are right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import msgspec

from fluxc.base.numbers import floats
from fluxc.recipe.faults import Fault, overlap
from fluxc.recipe.fields import LARGEST_SEED, MOST_STEPS, RANK_STEP
from fluxc.recipe.structs import LEAST_STEPS, QUANTIZED, Recipe, SizeRange, most_skipped
from fluxc.recipe.targets import Refuse

SEEDS = LARGEST_SEED + 1
"""Seeds are less than this; so is that of the last of several prompts."""
LONGEST_NAME = 200
"""Characters; what a build makes beside the bundle is named after it, and a file's name has at most 255."""
PATHS = (
    "model.source",
    "model.transformer",
    "model.text_encoder",
    "model.vae",
    "model.tokenizer",
    "calibration.prompts",
    "calibration.file",
    "fidelity.prompts",
    "fidelity.lpips",
    "fidelity.image_text",
    "step_cache.prompts",
    "step_cache.trace",
)

Check = Callable[[Recipe, Refuse], None]
OF_STEP_CACHE = ("gates.step_cache_psnr_db", "fidelity.lpips", "fidelity.image_text")
"""Fields that a recipe without a step cache cannot have."""
CHECKS: list[tuple[tuple[str, ...], Check]] = []


def faults_between(recipe: Recipe, known: list[Fault]) -> list[Fault]:
    """What is wrong with `recipe` besides the faults that are known, each of which kept its field from being read."""
    found: list[Fault] = []

    def refuse(field: str, why: str) -> None:
        if not any(overlap(field, fault.field) for fault in known):
            found.append(Fault(field, f"{field}: {why}"))

    for fields, check in CHECKS:
        if not any(overlap(field, fault.field) for field in fields for fault in known):
            check(recipe, refuse)
    return found


def _reads(*fields: str) -> Callable[[Check], Check]:
    """Register a check of these fields."""

    def register(check: Check) -> Check:
        CHECKS.append((fields, check))
        return check

    return register


@_reads()
def _finite(recipe: Recipe, refuse: Refuse) -> None:
    for field, number in floats(msgspec.to_builtins(recipe)):
        if not math.isfinite(number):
            refuse(field, f"must be a finite number, got {number}")


@_reads()
def _paths(recipe: Recipe, refuse: Refuse) -> None:
    for field in PATHS:
        path = _value(recipe, field)
        if path is None:
            continue
        if not path.strip():
            refuse(field, "is empty; give a path")
        elif any(len(part.encode()) > 255 for part in path.split("/")) or len(path.encode()) >= 4096:
            refuse(field, f"no file has so long a name: {path[:40]!r}...")


@_reads("name")
def _name(recipe: Recipe, refuse: Refuse) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", recipe.name) or len(recipe.name) > LONGEST_NAME:
        shown = repr(recipe.name) if len(recipe.name) <= LONGEST_NAME else f"{recipe.name[:40]!r}..."
        refuse("name", f"{shown} becomes a folder name; use at most {LONGEST_NAME} letters, digits, '.', '_' and '-'")


@_reads("sizes")
def _sizes(recipe: Recipe, refuse: Refuse) -> None:
    sizes = recipe.sizes
    if not isinstance(sizes, SizeRange):
        if len(set(sizes)) != len(sizes):
            refuse("sizes", "a size appears twice")
        return
    if any(low > high for low, high in zip(sizes.min, sizes.max, strict=True)):
        refuse("sizes.min", f"{list(sizes.min)} is more than sizes.max, {list(sizes.max)}")
    elif sizes.min == sizes.max:
        refuse("sizes", f"min and max are the same; write sizes: [{list(sizes.min)}]")
    elif sizes.default and not recipe.serves(sizes.default):
        refuse("sizes.default", f"{list(sizes.default)} is not between {list(sizes.min)} and {list(sizes.max)}")


@_reads("batches")
def _batches(recipe: Recipe, refuse: Refuse) -> None:
    if list(recipe.batches) != sorted(set(recipe.batches)):
        refuse("batches", f"{list(recipe.batches)} must be in ascending order, each number once")


@_reads("sizes", "vae.tile")
def _tile(recipe: Recipe, refuse: Refuse) -> None:
    if recipe.vae is None:
        return
    height, width = recipe.vae.tile
    if not any(size[0] > height or size[1] > width for size in recipe.listed_sizes):
        refuse(
            "vae.tile",
            f"no size is larger than {height}x{width}, so nothing is decoded in tiles; lower it, or leave `vae` out",
        )


@_reads("sizes", "fidelity.size")
def _fidelity_size(recipe: Recipe, refuse: Refuse) -> None:
    if recipe.fidelity.size and not recipe.serves(recipe.fidelity.size):
        which = "one of sizes" if recipe.size_range is None else "between sizes.min and sizes.max"
        refuse("fidelity.size", f"{list(recipe.fidelity.size)} is not {which}")


@_reads("calibration.prompts", "calibration.engine", "fidelity.prompts", "fidelity.level")
def _prompts(recipe: Recipe, refuse: Refuse) -> None:
    if recipe.calibration.prompts is None and recipe.calibration.engine != "none":
        refuse("calibration.prompts", "is missing: a text file, one prompt a line; or set calibration.engine: none")
    if recipe.fidelity.prompts is None and recipe.fidelity.level != "none":
        refuse("fidelity.prompts", "is missing: a text file, one held-out prompt a line; or set fidelity.level: none")


@_reads("calibration", "step_cache")
def _no_model_is_run(recipe: Recipe, refuse: Refuse) -> None:
    """What `engine: none` cannot have."""
    asked, cache = recipe.calibration, recipe.step_cache
    if asked.engine != "none":
        return
    if asked.amax != "max":
        refuse("calibration.amax", f"{asked.amax} needs measured inputs; leave it out, or `engine: none`")
    if asked.file is not None:
        refuse("calibration.file", "holds measured inputs, which `engine: none` does not use; leave one of the two out")
    if cache is not None and cache.prompts is None and asked.prompts is None:
        refuse("step_cache.prompts", "is missing: the trace runs the model on them; calibration without one has none")


@_reads("calibration.engine", "calibration.algorithm")
def _algorithm(recipe: Recipe, refuse: Refuse) -> None:
    if recipe.calibration.engine != "modelopt" and recipe.calibration.algorithm != "max":
        refuse(
            "calibration.algorithm", f"{recipe.calibration.algorithm!r} is modelopt's; set calibration.engine: modelopt"
        )


@_reads()
def _seeds(recipe: Recipe, refuse: Refuse) -> None:
    for field in ("calibration.seed", "fidelity.seed"):
        if _value(recipe, field) >= SEEDS:
            refuse(field, f"must be at least 0 and less than 2^64, got {_value(recipe, field)}")


@_reads("precision", "calibration.engine")
def _auto(recipe: Recipe, refuse: Refuse) -> None:
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
    if transformer.exclude == "auto" and recipe.calibration.engine == "none":
        refuse(
            "precision.transformer.exclude",
            "auto runs the model on calibration's prompts; with calibration.engine: none, list the layers",
        )
    budget = transformer.budget
    if (transformer.exclude == "auto") != (budget is not None):
        refuse(
            "precision.transformer.budget", "goes with `exclude: auto`, which needs it: {share: 0.03} or {error: 0.05}"
        )
    elif budget is not None and (budget.share is None) == (budget.error is None):
        refuse("precision.transformer.budget", "give either share or error, more than 0 and less than 1")


@_reads("precision", "calibration.engine")
def _rounding(recipe: Recipe, refuse: Refuse) -> None:
    engine = recipe.calibration.engine
    for name in QUANTIZED:
        precision = getattr(recipe.precision, name)
        asked = {"rounding": "gptq solves weights"} if precision.rounding != "nearest" else {}
        asked |= {"low_rank": "factors are fitted"} if precision.low_rank else {}
        asked |= {"smoothing": "channels are smoothed"} if precision.smoothing != "none" else {}
        for field, what in asked.items():
            if engine == "none":
                refuse(
                    f"precision.{name}.{field}",
                    f"{what} against inputs that calibration saw, and calibration.engine: none sees none",
                )
            elif engine == "modelopt" and name == "transformer":
                refuse(
                    f"precision.{name}.{field}",
                    f"{what} of layers that fluxc quantizes; calibration.engine: modelopt quantizes these itself",
                )


@_reads("precision")
def _ranks(recipe: Recipe, refuse: Refuse) -> None:
    for name in QUANTIZED:
        for at, entry in enumerate(getattr(recipe.precision, name).low_rank):
            if entry.rank % RANK_STEP:
                refuse(f"precision.{name}.low_rank[{at}].rank", f"must be a multiple of {RANK_STEP}, got {entry.rank}")


@_reads("precision", "targets", "calibration.amax")
def _smoothing(recipe: Recipe, refuse: Refuse) -> None:
    for name in QUANTIZED:
        precision, field = getattr(recipe.precision, name), f"precision.{name}.smoothing"
        if precision.smoothing == "none":
            continue
        if not precision.is_solved:
            refuse(field, "goes with `low_rank` or `rounding: gptq`, which solve the smoothed weights; add one of them")
        if recipe.calibration.amax != "max":
            refuse(
                field,
                "the range of smoothed inputs is known from the largest of every channel alone; leave it out, or "
                f"`calibration.amax: {recipe.calibration.amax}`",
            )
        if not any(target.rounds_inputs for target in recipe.targets):
            refuse(field, "no target of this recipe rounds inputs, so it would cost time for nothing; leave it out")


@_reads("precision", "sampling.steps", "targets", "calibration.engine")
def _precision_of_steps(recipe: Recipe, refuse: Refuse) -> None:
    rules, field = recipe.precision.steps, "precision.steps"
    if not rules:
        return
    for at, rule in enumerate(() if rules == "auto" else rules):
        given = {n: count for n in ("first", "last", "at", "worst") if (count := getattr(rule, n)) is not None}
        if len(given) != 1:
            refuse(f"{field}[{at}]", "give one of first, last, at and worst")
        for name, count in given.items():
            if (max(count) if name == "at" else count) > recipe.sampling.steps:
                refuse(f"{field}[{at}].{name}", f"an image has {recipe.sampling.steps} steps (sampling.steps)")
    if not any(target.rounds_inputs and target.runs_graphs for target in recipe.targets):
        refuse(field, "no target of this recipe rounds inputs, so all steps would be alike; leave it out")
    for at, target in enumerate(recipe.targets):
        if target.one_precision:
            refuse(f"targets[{at}]", f"cannot have precision.steps: {target.one_precision}")
    if rules != "auto" and not any(rule.is_measured for rule in rules):
        return
    if recipe.calibration.engine != "fluxc":
        engine = recipe.calibration.engine
        refuse(
            field, f"which steps are worst is measured by calibration.engine: fluxc, not {engine}; give first or last"
        )


@_reads("fidelity.attribution", "calibration.engine")
def _attributed(recipe: Recipe, refuse: Refuse) -> None:
    if recipe.fidelity.attribution and recipe.calibration.engine == "modelopt":
        refuse(
            "fidelity.attribution",
            "rounds weights as fluxc's own quantizer does; leave it out with calibration.engine: modelopt",
        )


@_reads("step_cache")
def _without_step_cache(recipe: Recipe, refuse: Refuse) -> None:
    if recipe.step_cache is None:
        for field in OF_STEP_CACHE:
            if _value(recipe, field) is not None:
                refuse(field, "there is no step_cache in this recipe")


@_reads("targets")
def _targets(recipe: Recipe, refuse: Refuse) -> None:
    for at, target in enumerate(recipe.targets):
        target.check(f"targets[{at}]", refuse)
    names = [target.name for target in recipe.targets]
    for at, target in enumerate(recipe.targets):
        if target.in_one and target.in_one.name not in names:
            refuse(
                f"targets[{at}]",
                f"what {target.ranks} processes generate is held against what one generates; add the same target without gpus",
            )
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            refuse("targets", f"{name!r} appears twice")


@_reads("targets")
def _compared_computing(recipe: Recipe, refuse: Refuse) -> None:
    if recipe.gates.compute_error is None:
        return
    names = [target.name for target in recipe.targets]
    rounding = [target for target in recipe.targets if target.exact]
    for target in rounding:
        if target.exact and target.exact.name not in names:
            refuse(
                "gates.compute_error",
                f"target {target.name} is compared with {target.exact.name}, which the recipe lacks; add it to targets",
            )
    if not rounding:
        refuse("gates.compute_error", "no target of this recipe computes in fewer bits than compute: exact")


@_reads("step_cache")
def _asked(recipe: Recipe, refuse: Refuse) -> None:
    cache = recipe.step_cache
    if cache and cache.skip is not None and cache.max_error is not None:
        refuse("step_cache", "give either skip or max_error")


@_reads("step_cache")
def _compared_traces(recipe: Recipe, refuse: Refuse) -> None:
    cache = recipe.step_cache
    if cache and cache.compare and cache.traced == "reference":
        refuse(
            "step_cache.compare",
            "compares the quantized model's trace with the reference's, and `traced: reference` takes the latter alone; leave "
            "one of the two out",
        )


@_reads("step_cache", "sampling.steps")
def _skipped(recipe: Recipe, refuse: Refuse) -> None:
    cache, steps = recipe.step_cache, recipe.sampling.steps
    if cache is None:
        return
    for field in ("first", "last"):
        if getattr(cache, field) > MOST_STEPS:
            refuse(f"step_cache.{field}", f"must be at most {MOST_STEPS}, got {getattr(cache, field)}")
    if steps < LEAST_STEPS:
        refuse(
            "step_cache",
            f"{steps} steps are too few to skip any (at least {LEAST_STEPS}): a model distilled to so few has none that "
            "resemble each other; leave step_cache out, or raise sampling.steps",
        )
        return
    most = most_skipped(steps, cache.first, cache.last, cache.max_consecutive_skips)
    if most < 1:
        refuse("step_cache", f"first and last compute all of the {steps} steps, so none can be skipped; lower them")
        return
    wanted: list[tuple[str, float]] = [("skip", cache.skip)] if isinstance(cache.skip, float) else []
    wanted += [("frontier", max(cache.frontier))] if cache.frontier and cache.frontier != "auto" else []
    for field, count in wanted:
        if count > most:
            refuse(
                f"step_cache.{field}",
                f"{count:g} of {steps} steps cannot be skipped; at most {most} can, see max_consecutive_skips",
            )


def _value(recipe: Recipe, field: str) -> Any:
    """What the recipe says under a name with dots; None where it has no such part."""
    found: Any = recipe
    for part in field.split("."):
        found = None if found is None else getattr(found, part)
    return found
