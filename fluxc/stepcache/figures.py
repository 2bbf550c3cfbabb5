"""What the report says and shows of a step cache: quality by method and skipped steps, points of the trace, images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fluxc.base.numbers import as_json, significant
from fluxc.stepcache.choose import points
from fluxc.stepcache.trace import StepTrace
from fluxrt.pipeline import to_image

MOST_POINTS = 300
FILE = "step-cache.json"


@dataclass(frozen=True)
class Compared:
    """`points` are figures by skipped steps and method, `chosen` those of the policy that serves, `reference` those of the one
    that the trace of the checkpoint's own model came to.

    Images are fp32 [prompts, height, width, 3]: `full` with every step, `served` with the policy, `by_count` with its mode at
    every point.
    """

    points: dict[int, dict[str, Any]]
    chosen: dict[str, Any]
    full: np.ndarray
    served: np.ndarray
    by_count: dict[int, np.ndarray]
    reference: dict[str, Any] | None = None


def write(folder: Path, target: str, compared: Compared, trace: StepTrace) -> None:
    """Write FILE and report/images/step-cache-*.png below `folder`: every prompt with the step cache, and of the worst prompt
    the image with every step, and with each number of steps skipped."""
    images = folder / "report" / "images"
    images.mkdir(parents=True)
    for number, image in enumerate(compared.served):
        to_image(image).save(images / f"step-cache-{number}.png")
    worst = compared.chosen["worst_prompt"]
    to_image(compared.full[worst]).save(images / "step-cache-every-step.png")
    for count, found in compared.by_count.items():
        to_image(found[worst]).save(images / f"step-cache-skipped-{count}.png")
    figures = {
        "target": target,
        "chosen": compared.chosen,
        "reference": compared.reference,
        "frontier": {str(count): found for count, found in compared.points.items()},
        "changes": traced_points(trace),
        "onset": list(compared.by_count),
    }
    (folder / FILE).write_text(as_json(figures, "step cache"))


def traced_points(trace: StepTrace) -> list[list[float]]:
    """At most MOST_POINTS of the trace's (change, change of the residual), evenly from all."""
    x, y = points(trace, "residual_change")
    chosen = np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_POINTS)).round().astype(int))
    return [[significant(float(x[at])), significant(float(y[at]))] for at in chosen]
