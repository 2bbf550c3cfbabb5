"""The calibration file: every layer's records, the calls that were kept, and what they were measured on.

Tensors are `component/layer/field`; histograms keep the bins from the first filled one to the last. Those of calls (calls.py)
begin with `calls/`; they are the most of the file, and read only by who asks for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fluxc.base.errors import BuildError, CheckpointError
from fluxc.base.measured import Kind, Origin, read_measured, write_measured
from fluxc.base.safetensors import read_header
from fluxc.calibrate.records import BINS, LayerInputs

if TYPE_CHECKING:
    from fluxc.calibrate.calls import Calls

KIND = Kind("fluxc-calibration", 1, "calibration file", "calibrate")

CALLS = "calls/"

Records = dict[str, dict[str, LayerInputs]]
"""By component, then layer."""


@dataclass(frozen=True)
class CalibrationFile:
    """A calibration file that was read."""

    path: Path
    origin: Origin
    records: Records


def write_calibration(path: Path, origin: Origin, records: Records, calls: Mapping[str, Calls] | None = None) -> None:
    """Write `path`; it appears when complete. Raises BuildError naming the layer that saw a NaN or infinity."""
    tensors: dict[str, np.ndarray] = {}
    for component, kept in (calls or {}).items():
        tensors |= {f"{CALLS}{name}": array for name, array in kept.arrays(component).items()}
    for component, layers in records.items():
        for layer, record in layers.items():
            if not math.isfinite(record.amax):
                raise BuildError(
                    f"calibration: the inputs of {component} layer {layer!r} hold NaN or infinity; "
                    "the checkpoint is damaged, or does not run in bfloat16"
                )
            filled = np.flatnonzero(record.histogram)
            first, last = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 0)
            fields = {
                "amax": np.float32(record.amax).reshape(()),
                "first_bin": np.int64(first).reshape(()),
                "histogram": record.histogram[first:last],
                "channel_amax": record.channel_amax,
                "rows": (record.rows.view(np.uint32) >> np.uint32(16)).astype(np.uint16),
            }
            tensors |= {f"{component}/{layer}/{name}": np.asarray(value, order="C") for name, value in fields.items()}
    write_measured(path, KIND, origin, tensors)


def read_calibration(path: Path) -> CalibrationFile:
    """Read `path`. Raises CheckpointError if it is damaged or no calibration file, BuildError if it is of another version."""
    origin, tensors = read_measured(path, KIND, lambda name: not name.startswith(CALLS))
    try:
        return CalibrationFile(path, origin, _records(tensors))
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged: its records are incomplete ({error!r}); {KIND.advice}") from error


def has_calls(path: Path, component: str) -> bool:
    """Whether `path`, a calibration file that is whole, holds calls of `component`."""
    return any(name.startswith(f"{CALLS}{component}/") for name in read_header(path))


def read_calls(path: Path) -> dict[str, Calls]:
    """The calls by component that `path` holds; errors as read_calibration."""
    from fluxc.calibrate.calls import of_arrays

    _, tensors = read_measured(path, KIND, lambda name: name.startswith(CALLS))
    try:
        return of_arrays({name.removeprefix(CALLS): array for name, array in tensors.items()})
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged: its calls are incomplete ({error!r}); {KIND.advice}") from error


def _records(tensors: dict[str, np.ndarray]) -> Records:
    """The records that the tensors of a file hold; an exception of numpy's or a dictionary's where they hold none."""
    fields: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for name, value in sorted(tensors.items()):
        component, layer, field = name.split("/")
        fields.setdefault((component, layer), {})[field] = value
    records: Records = {}
    for (component, layer), of in fields.items():
        histogram = np.zeros(BINS, np.int64)
        first, counts = int(of["first_bin"]), of["histogram"]
        if not 0 <= first <= BINS - len(counts) or counts.dtype != np.int64 or counts.min(initial=0) < 0:
            raise ValueError(f"histogram of {layer}")
        histogram[first : first + len(counts)] = counts
        rows, channels = of["rows"], of["channel_amax"]
        if rows.dtype != np.uint16 or channels.dtype != np.float32 or rows.shape[1:] != channels.shape:
            raise ValueError(f"rows of {layer}")
        amax, inputs = float(of["amax"]), (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
        is_finite = all(np.isfinite(part).all() for part in (np.float64(amax), channels, inputs))
        if not is_finite or min(amax, channels.min(initial=0)) < 0:
            raise ValueError(f"magnitudes of {layer}")
        records.setdefault(component, {})[layer] = LayerInputs(amax, histogram, channels, inputs)
    return records
