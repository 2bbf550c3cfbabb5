"""Writes a component's one weights file: quantized Linears in ModelOpt layout, everything else byte for byte.

The header is written first, then every tensor in place, in row chunks, so memory follows the chunk and never the
checkpoint. The file appears by rename when complete. Order: FP32 scalars, copied tensors, quantized values, block scales;
inside each, forward order, so that the members of a fusion group lie side by side.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fluxc.checkpoint.safetensors_file import ITEM_BITS, TensorRef
from fluxc.errors import BuildError, CheckpointError
from fluxc.quantize import fp8, nvfp4
from fluxc.quantize.formats import BLOCK
from fluxc.quantize.plan import LayerPlan

CHUNK_BYTES = 16 << 20
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class LayerReport:
    """How well a quantized weight reproduces the original: signal-to-noise ratio in dB, 10 log10(|w|^2 / |w - q|^2)."""

    name: str
    format: str
    snr_db: float


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    rank: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BITS[self.dtype] // 8


def write_weights(
    path: Path,
    tensors: dict[str, TensorRef],
    plan: list[LayerPlan],
    input_amax: dict[str, float],
    on_progress: Callable[[int, int], None] | None = None,
) -> list[LayerReport]:
    """Write `path` from the checkpoint's `tensors` under `plan`; `input_amax` holds each layer's largest input magnitude.

    Returns one report a quantized layer. `on_progress(done, total)` counts source bytes. Raises CheckpointError naming
    tensor and position of a NaN or infinity; the file does not appear unless it is complete.
    """
    quantized = {f"{entry.layer.name}.weight": entry for entry in plan if entry.format != "bf16"}
    group_amax = _weight_amax(tensors, quantized)
    input_scale_amax = _group_input_amax(quantized, input_amax)
    order = [*(f"{entry.layer.name}.weight" for entry in plan)]
    order += [name for name in tensors if name not in set(order)]
    entries = _layout(tensors, quantized, order)
    total = sum(tensors[name].nbytes for name in order)
    reports, done = [], 0
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            offsets = _write_header(file, entries)
            for name in order:
                ref = tensors[name]
                if name in quantized:
                    entry = quantized[name]
                    group = entry.layer.group or entry.layer.name
                    scales = (group_amax[group], input_scale_amax[group])
                    reports.append(_write_quantized(file, offsets, ref, entry, *scales))
                else:
                    _copy(file, offsets[name], ref)
                done += ref.nbytes
                if on_progress:
                    on_progress(done, total)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return reports


def _layout(tensors: dict[str, TensorRef], quantized: dict[str, LayerPlan], order: list[str]) -> list[_Entry]:
    entries = []
    for name in order:
        ref = tensors[name]
        if name not in quantized:
            entries.append(_Entry(name, ref.dtype, ref.shape, {64: 0, 32: 1, 16: 2, 8: 5}[ITEM_BITS[ref.dtype]]))
            continue
        rows, columns = ref.shape
        layer = name.removesuffix(".weight")
        if quantized[name].format == "nvfp4":
            entries += [
                _Entry(f"{layer}.input_scale", "F32", (), 1),
                _Entry(f"{layer}.weight_scale_2", "F32", (), 1),
                _Entry(name, "U8", (rows, columns // 2), 3),
                _Entry(f"{layer}.weight_scale", "F8_E4M3", (rows, columns // BLOCK), 4),
            ]
        else:
            entries += [
                _Entry(f"{layer}.input_scale", "F32", (), 1),
                _Entry(f"{layer}.weight_scale", "F32", (), 1),
                _Entry(name, "F8_E4M3", (rows, columns), 3),
            ]
    return sorted(entries, key=lambda entry: entry.rank)


def _write_header(file, entries: list[_Entry]) -> dict[str, int]:
    """Write the header, padded so that the data starts on a multiple of 64 bytes; returns file offsets by tensor name."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    positions: dict[str, int] = {}
    position = 0
    for entry in entries:
        positions[entry.name] = position
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.nbytes],
        }
        position += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    file.write(len(text).to_bytes(8, "little") + text)
    start = 8 + len(text)
    file.truncate(start + position)
    return {name: start + offset for name, offset in positions.items()}


def _write_quantized(
    file, offsets: dict[str, int], ref: TensorRef, entry: LayerPlan, amax: float, input_amax: float
) -> LayerReport:
    layer, weight_amax = entry.layer.name, torch.tensor(amax)
    module = nvfp4 if entry.format == "nvfp4" else fp8
    scale = module.tensor_scale(weight_amax)
    signal = noise = 0.0
    for first, weight in _row_chunks(ref):
        if entry.format == "nvfp4":
            codes, scales = nvfp4.quantize(weight, scale)
            restored = nvfp4.dequantize(codes, scales, scale)
            width = scales.shape[1]
            _write_at(file, offsets[f"{layer}.weight_scale"] + first * width, scales.view(torch.uint8).numpy())
        else:
            codes = fp8.quantize(weight, scale)
            restored = fp8.dequantize(codes, scale)
        _write_at(file, offsets[f"{layer}.weight"] + first * codes.shape[1], codes.view(torch.uint8).numpy())
        exact = weight.double()
        signal += exact.square().sum().item()
        noise += (exact - restored.double()).square().sum().item()
    _write_at(
        file, offsets[f"{layer}.{'weight_scale_2' if entry.format == 'nvfp4' else 'weight_scale'}"], scale.numpy()
    )
    _write_at(file, offsets[f"{layer}.input_scale"], module.tensor_scale(torch.tensor(input_amax)).numpy())
    snr = 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else math.inf
    return LayerReport(layer, entry.format, snr)


def _weight_amax(tensors: dict[str, TensorRef], quantized: dict[str, LayerPlan]) -> dict[str, float]:
    """Largest magnitude of each fusion group's weights (of the layer alone where it has no group)."""
    found: dict[str, float] = {}
    for name, entry in quantized.items():
        group = entry.layer.group or entry.layer.name
        for first, weight in _row_chunks(tensors[name]):
            amax = weight.abs().amax().item()
            if not math.isfinite(amax):
                row, column = (~torch.isfinite(weight)).nonzero()[0].tolist()
                raise _not_finite(tensors[name], [first + row, column])
            found[group] = max(found.get(group, 0.0), amax)
    return found


def _group_input_amax(quantized: dict[str, LayerPlan], input_amax: dict[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for entry in quantized.values():
        layer = entry.layer.name
        amax = input_amax.get(layer)
        if amax is None:
            raise BuildError(f"calibration measured no input of {layer!r}, so it has no input_scale; calibrate again")
        if not math.isfinite(amax) or amax <= 0:
            raise BuildError(
                f"calibration measured {amax} as the largest input of {layer!r}; an input_scale needs a positive, "
                "finite number: check the checkpoint and the calibration prompts"
            )
        group = entry.layer.group or layer
        found[group] = max(found.get(group, 0.0), amax)
    return found


def _row_chunks(ref: TensorRef) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows of the matrix `ref`) in its own floating dtype, at most CHUNK_BYTES each."""
    if ref.dtype not in FLOATS:
        raise CheckpointError(
            f"{ref.file}: tensor {ref.name!r} is {ref.dtype}; only bf16, fp16 and fp32 can be quantized"
        )
    rows = ref.shape[0]
    row_bytes = ref.nbytes // rows
    step = max(1, CHUNK_BYTES // row_bytes)
    for first in range(0, rows, step):
        last = min(rows, first + step)
        raw = np.array(ref.bytes_view(first * row_bytes, last * row_bytes))
        yield first, torch.from_numpy(raw).view(FLOATS[ref.dtype]).reshape(last - first, *ref.shape[1:])


def _copy(file, offset: int, ref: TensorRef) -> None:
    for start in range(0, ref.nbytes, CHUNK_BYTES):
        data = np.array(ref.bytes_view(start, min(ref.nbytes, start + CHUNK_BYTES)))
        if ref.dtype in FLOATS:
            finite = torch.isfinite(torch.from_numpy(data).view(FLOATS[ref.dtype]))
            if not finite.all():
                at = start * 8 // ITEM_BITS[ref.dtype] + int((~finite).nonzero()[0])
                position = [int(i) for i in np.unravel_index(at, ref.shape)]
                raise _not_finite(ref, position)
        _write_at(file, offset + start, data)


def _not_finite(ref: TensorRef, position: list[int]) -> CheckpointError:
    return CheckpointError(
        f"{ref.file}: tensor {ref.name!r} is not finite (NaN or infinity) at {position}; "
        "the checkpoint is damaged, use it as published"
    )


def _write_at(file, offset: int, data: np.ndarray) -> None:
    file.seek(offset)
    file.write(np.ascontiguousarray(data).tobytes())
