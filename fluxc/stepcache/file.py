"""The trace file: what every step of some images changed, and which of the request's images they are.

Traces of parts of the prompts, made on several machines, merge into one. A trace belongs to one checkpoint, size and number of
steps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from fluxc.base.errors import BuildError, CheckpointError
from fluxc.base.measured import Kind, Origin, read_measured, write_measured
from fluxc.stepcache.trace import StepTrace, joined

KIND = Kind("fluxc-step-trace", 1, "trace file", "trace")


@dataclass(frozen=True)
class TraceFile:
    """A trace file that was read; `images` are the numbers of its images among the request's prompts."""

    path: Path
    origin: Origin
    images: list[int]
    trace: StepTrace


def write_trace(path: Path, origin: Origin, images: list[int], trace: StepTrace) -> None:
    """Write `path`; it appears when complete. Raises BuildError where a step saw a NaN or infinity."""
    if not trace.is_finite():
        raise BuildError(
            "step trace: a step's velocity or modulated input holds NaN or infinity; the checkpoint is damaged, or does not "
            "run in fidelity.reference's dtype"
        )
    tensors = {f.name: np.ascontiguousarray(getattr(trace, f.name)) for f in fields(StepTrace)}
    write_measured(path, KIND, origin, tensors | {"images": np.array(images, np.int64)})


def read_trace(path: Path) -> TraceFile:
    """Read `path`; errors as in read_measured."""
    origin, tensors = read_measured(path, KIND)
    try:
        images = [int(number) for number in tensors.pop("images")]
        trace = StepTrace(**tensors)
        _check_shapes(images, trace, origin.request["prompts"], origin.request["steps"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged: its trace is incomplete ({error!r}); {KIND.advice}") from error
    return TraceFile(path, origin, images, trace)


def _check_shapes(images: list[int], trace: StepTrace, prompts: list[str], steps: int) -> None:
    """ValueError for a trace that is not one of `images`, each the number of a prompt, with so many steps."""
    if not images or not set(images) <= set(range(len(prompts))):
        raise ValueError(f"images {images} of {len(prompts)} prompts")
    expected = (len(images), steps)
    for field in fields(StepTrace):
        found = getattr(trace, field.name)
        if (
            found.dtype != np.float64
            or found.shape[:2] != expected
            or found.ndim != (2 if field.name == "change" else 3)
        ):
            raise ValueError(f"{field.name} {found.dtype} {found.shape}")
    if not trace.is_finite():
        raise ValueError("NaN or infinity")


def model_in_words(origin: Origin) -> str:
    """Which model a trace is of."""
    rounded = origin.request.get("precision")
    if rounded is None:
        return "the checkpoint's own model"
    return f"the model as planned, weights{' and inputs' if rounded['inputs_rounded'] else ' alone'} rounded"


def merge_traces(files: list[TraceFile]) -> tuple[Origin, list[int], StepTrace]:
    """Traces of parts of one request as one, its images in order; BuildError naming what does not belong together."""
    first, *others = files
    owner = dict.fromkeys(first.images, first.path)
    for file in others:
        for field in ("checkpoint", "request", "tools"):
            if getattr(file.origin, field) != getattr(first.origin, field):
                what = _differing(getattr(file.origin, field), getattr(first.origin, field))
                raise BuildError(
                    f"{file.path}: its {field} is not that of {first.path} ({what} differs); trace it again"
                )
        twice = [number for number in file.images if number in owner]
        if twice:
            raise BuildError(
                f"{file.path}: prompt {twice[0] + 1} is also in {owner[twice[0]]}; give every part of the prompts once"
            )
        owner |= dict.fromkeys(file.images, file.path)
    images = [number for file in files for number in file.images]
    order = sorted(range(len(images)), key=images.__getitem__)
    ran = "; ".join(dict.fromkeys(file.origin.ran for file in files))
    origin = Origin(first.origin.checkpoint, first.origin.request, ran, first.origin.tools)
    return origin, sorted(images), joined([file.trace for file in files]).of(order)


def check_complete(file: TraceFile) -> None:
    """Refuse a trace that lacks images of its request (BuildError)."""
    asked = len(file.origin.request["prompts"])
    missing = sorted(set(range(asked)) - set(file.images))
    if missing:
        raise BuildError(
            f"{file.path}: holds {len(file.images)} of {asked} prompts, prompt {missing[0] + 1} is missing; put the parts "
            "together with `fluxc merge-traces`"
        )


def _differing(ours: dict[str, object], theirs: dict[str, object]) -> str:
    return ", ".join(repr(key) for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key))
