"""What a bundle gains: bytes of weights against bf16 and FP8, and predicted times and memory on GPUs that are not here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import median

from fluxc.base.errors import RecipeError
from fluxc.base.numbers import significant
from fluxc.predict.gpus import GPUS
from fluxc.predict.published import checked
from fluxc.predict.scaling import Prediction as Point
from fluxc.predict.scaling import Subject, predict, recipe_model
from fluxc.quantize.source import Source
from fluxc.quantize.source_memory import memory_by_component
from fluxc.recipe.load import LoadedRecipe
from fluxc.report.structs import Predicted, Prediction, Size

SHOWN = ("rtx-5090", "rtx-pro-6000", "b200")
"""The GPUs a report predicts for, whatever the recipe's targets."""


def sizes_of(source: Source) -> tuple[Size, ...]:
    """Bytes of weights by component, and of `all` together."""
    memory = memory_by_component(source)
    return tuple(
        Size(component=name, bf16=found.bf16, fp8=found.fp8, planned=found.planned) for name, found in memory.items()
    )


def predicted(loaded: LoadedRecipe, source: Source) -> Prediction | None:
    """Predictions for SHOWN, on one GPU and on as many as the recipe's targets have; None where no number of GPUs can share
    the model."""
    counts = tuple(sorted({1, *(target.ranks for target in loaded.recipe.targets)}))
    try:
        points = tuple(_points(recipe_model(loaded, source), source, counts))
    except RecipeError:
        return None
    errors = [abs(point.error_without) for point in checked()]
    return Prediction(
        points=points, median_error=significant(median(errors), 2), largest_error=significant(max(errors), 2)
    )


def _points(subject: Subject, source: Source, counts: tuple[int, ...]) -> Iterator[Predicted]:
    memory = memory_by_component(source)["transformer"]
    fp8 = _in_format(subject, "fp8", memory.fp8)
    bf16 = _in_format(subject, "bf16", memory.bf16)
    for name in SHOWN:
        gpu = GPUS[name]
        ways = [predict(how, gpu, counts).predictions for how in (subject, fp8, bf16)]
        for planned, in_fp8, in_bf16 in zip(*ways, strict=True):
            yield Predicted(
                gpu=gpu.name,
                gpus=planned.gpus,
                step_ms=_milliseconds(planned),
                step_ms_fp8=_milliseconds(in_fp8),
                step_ms_bf16=_milliseconds(in_bf16),
                weights_bytes=significant(planned.first.weights, 6),
                working_bytes=significant(planned.first.working, 6),
                buffers_bytes=significant(planned.first.buffers, 6),
                gpu_bytes=gpu.memory,
            )


def _in_format(subject: Subject, format: str, weights: int) -> Subject:
    """`subject` with every Linear of the transformer in `format`, whose weights then take so many bytes."""
    plan = [replace(entry, format=format) for entry in subject.plan]
    return replace(subject, plan=plan, weights=weights, bodies={})


def _milliseconds(point: Point) -> float:
    """Of a step, on average over an image's."""
    return significant(1e3 * point.image_seconds / point.steps)
