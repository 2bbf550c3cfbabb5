"""The calibration file: every layer's records, and what they were measured on.

Tensors are `component/layer/field`; histograms keep the bins from the first filled one to the last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fluxc.base.errors import BuildError, CheckpointError
from fluxc.base.measured import Kind, Origin, read_measured, write_measured
from fluxc.calibrate.records import BINS, LayerInputs

KIND = Kind("fluxc-calibration", 1, "calibration file", "calibrate")

FIELDS = {"amax": ("float32", 0), "first_bin": ("int64", 0), "histogram": ("int64", 1)}
FIELDS |= {"channel_amax": ("float32", 1), "rows": ("uint16", 2)}
"""Dtype and number of dimensions of what is kept of a layer."""

Records = dict[str, dict[str, LayerInputs]]
"""By component, then layer."""


@dataclass(frozen=True)
class CalibrationFile:
    """A calibration file that was read."""

    path: Path
    origin: Origin
    records: Records


def write_calibration(path: Path, origin: Origin, records: Records) -> None:
    """Write `path`; it appears when complete. Raises BuildError naming the layer that saw a NaN or infinity."""
    tensors: dict[str, np.ndarray] = {}
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
    origin, tensors = read_measured(path, KIND)
    try:
        return CalibrationFile(path, origin, _records(tensors))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged: {error}; {KIND.advice}") from error


def _records(tensors: dict[str, np.ndarray]) -> Records:
    """The records that `tensors` hold; KeyError, TypeError or ValueError for what write_calibration did not write."""
    fields: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for name, value in sorted(tensors.items()):
        component, layer, field = name.split("/")
        dtype, dimensions = FIELDS[field]
        if value.dtype != dtype or value.ndim != dimensions:
            raise ValueError(f"{name} is {value.dtype} {list(value.shape)}, not {dtype} of {dimensions} dimensions")
        fields.setdefault((component, layer), {})[field] = value
    records: Records = {}
    for (component, layer), of in fields.items():
        missing = sorted(FIELDS.keys() - of.keys())
        if missing:
            raise ValueError(f"{component}/{layer} lacks {', '.join(missing)}")
        first, filled = int(of["first_bin"]), of["histogram"]
        amax, channels = float(of["amax"]), of["channel_amax"]
        rows = (of["rows"].astype(np.uint32) << np.uint32(16)).view(np.float32)
        if not 0 <= first <= BINS - len(filled) or (filled < 0).any():
            raise ValueError(f"{component}/{layer}/histogram does not lie in its {BINS} bins")
        if not 0 <= amax < math.inf or not np.isfinite(channels).all() or not np.isfinite(rows).all():
            raise ValueError(f"{component}/{layer} holds NaN or infinity")
        histogram = np.zeros(BINS, np.int64)
        histogram[first : first + len(filled)] = filled
        records.setdefault(component, {})[layer] = LayerInputs(amax, histogram, channels, rows)
    return records
