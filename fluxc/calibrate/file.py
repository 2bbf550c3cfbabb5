"""The calibration file: one safetensors file with every layer's records, and what they were measured on.

Metadata holds one entry, `fluxc`, JSON: format version, hashes of the checkpoint's files, the request (prompts, steps,
guidance, size, seed, text length), how the model ran, and the tools. Tensors are `component/layer/field`; histograms keep the
bins from the first filled one to the last. The same records give the same bytes.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fluxc.calibrate.records import BINS, LayerInputs
from fluxc.checkpoint.safetensors_file import read_header
from fluxc.errors import BuildError, CheckpointError

FORMAT = "fluxc-calibration"
FORMAT_VERSION = 1
CHECKPOINT_PARTS = ("", "transformer", "text_encoder", "tokenizer", "scheduler")

Records = dict[str, dict[str, LayerInputs]]
"""By component, then layer."""


@dataclass(frozen=True)
class Origin:
    """What was measured: {component: {file: SHA-256}}, the request, where and how the model ran, tool versions."""

    checkpoint: dict[str, dict[str, str]]
    request: dict[str, Any]
    ran: str
    tools: dict[str, str]


@dataclass(frozen=True)
class CalibrationFile:
    """A calibration file that was read."""

    path: Path
    origin: Origin
    records: Records


def write_calibration(path: Path, origin: Origin, records: Records) -> None:
    """Write `path`; it appears when complete. Raises BuildError naming the layer that saw a NaN or infinity."""
    from safetensors.numpy import save

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
    about = {"format": FORMAT, "format_version": FORMAT_VERSION, **origin.__dict__}
    data = save(tensors, metadata={"fluxc": json.dumps(about, sort_keys=True)})
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_calibration(path: Path) -> CalibrationFile:
    """Read `path`. Raises CheckpointError if it is damaged or no calibration file, BuildError if it is of another version."""
    from safetensors.numpy import load

    advice = "`fluxc calibrate RECIPE --out FILE` makes one"
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such calibration file; {advice}")
    try:
        read_header(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: damaged, or not a calibration file ({error}); {advice}") from error
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    try:
        about = json.loads(header["__metadata__"]["fluxc"])
        known = about.pop("format") == FORMAT
        version = about.pop("format_version")
    except (KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise CheckpointError(f"{path}: not a calibration file; {advice}")
    if version != FORMAT_VERSION:
        raise BuildError(
            f"{path}: calibration format {version}, this fluxc reads {FORMAT_VERSION}; calibrate again with this version"
        )
    tensors = load(raw)
    fields: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for name, value in sorted(tensors.items()):
        component, layer, field = name.split("/")
        fields.setdefault((component, layer), {})[field] = value
    records: Records = {}
    for (component, layer), of in fields.items():
        histogram = np.zeros(BINS, np.int64)
        first = int(of["first_bin"])
        histogram[first : first + len(of["histogram"])] = of["histogram"]
        records.setdefault(component, {})[layer] = LayerInputs(
            float(of["amax"]),
            histogram,
            of["channel_amax"],
            (of["rows"].astype(np.uint32) << np.uint32(16)).view(np.float32),
        )
    return CalibrationFile(path, Origin(**about), records)


def check_origin(file: CalibrationFile, checkpoint: dict[str, dict[str, str]], request: dict[str, Any]) -> None:
    """Refuse a calibration file of another checkpoint or of another request, naming what differs (BuildError)."""
    for part in CHECKPOINT_PARTS:
        theirs, ours = file.origin.checkpoint.get(part, {}), checkpoint.get(part, {})
        for name in sorted({*theirs, *ours}):
            if theirs.get(name) != ours.get(name):
                raise BuildError(
                    f"{file.path}: made from another checkpoint: {'/'.join(filter(None, (part, name)))} is a different "
                    "file there; calibrate this checkpoint, or point the recipe at the other one"
                )
    for name, asked in request.items():
        measured = file.origin.request.get(name)
        if measured != asked:
            shown = "" if name == "prompts" else f" ({measured} there, {asked} in the recipe)"
            raise BuildError(
                f"{file.path}: made with other {name}{shown}; calibrate again, or set the recipe back to what it was"
            )
