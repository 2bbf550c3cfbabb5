"""Writes a component's weights: quantized Linears in ModelOpt layout, everything else byte for byte.

1. Headers are written first, then every tensor in place, in row chunks read by memory map, so memory follows the chunk and
   never the checkpoint, however many files it has.
2. A fusion group is read twice: for its largest magnitude, then to be quantized; the second time it is in the page cache.
3. Order inside a file: FP32 scalars; copied tensors, factors of low rank and smoothing; quantized values; block scales; inside
   each, forward order, so that the members of a fusion group lie side by side. With `shard_bytes`, files are filled in
   forward order and a group is never parted.
4. Files are synchronised and appear by rename when all are complete; an index comes last.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fluxc.base.errors import BuildError, CheckpointError
from fluxc.base.progress import Report
from fluxc.base.safetensors import ITEM_BITS, TensorRef
from fluxc.formats import cpu
from fluxc.formats.base import Format, Parts
from fluxc.formats.bf16 import in_bf16
from fluxc.formats.low_rank import A, B
from fluxc.formats.registry import FORMATS
from fluxc.formats.smoothing import ONE, PRE_QUANT_SCALE
from fluxc.quantize.plan import LayerPlan, to_quantize
from fluxc.quantize.solved import Layer
from fluxc.recipe.structs import Scales

CHUNK_BYTES = 16 << 20
# Every input with every output is one sample of a layer's error; these are enough to know it to a tenth of a decibel or two.
INPUT_ROWS, OUTPUTS = 16, 1024

Rows = Callable[[str], np.ndarray | None]


@dataclass(frozen=True)
class LayerReport:
    """How well a quantized layer reproduces the original, as signal-to-noise ratios in dB.

    `snr_db`: 10 log10(|W|^2 / |W - Q|^2). `output_snr_db`: the same of x W^T over calibration's sampled inputs x, kept in
    full precision, over evenly spaced outputs where there are more than OUTPUTS; None without them. Q is what is stored,
    with the product of factors of low rank, times the smoothing.
    """

    name: str
    format: str
    snr_db: float
    output_snr_db: float | None = None


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    rank: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BITS[self.dtype] // 8


@dataclass
class _Sums:
    """Energies of a layer's weight and output, and of their errors."""

    weight: np.ndarray = field(default_factory=lambda: np.zeros(2))
    output: np.ndarray = field(default_factory=lambda: np.zeros(2))

    @staticmethod
    def decibels(sums: np.ndarray) -> float:
        signal, noise = sums
        # "not equal", so that a NaN is not taken for no error.
        return math.inf if noise == 0 else 10 * float(np.log10(signal / noise))


class _File:
    """A safetensors file being written: header first, then tensors at their places, in any order."""

    def __init__(self, path: Path, entries: list[_Entry]) -> None:
        self.path = path
        self.names = [entry.name for entry in entries]
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        self._offsets = {}
        for entry in entries:
            self._offsets[entry.name] = position
            end = position + entry.nbytes
            header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [position, end]}
            position = end
        self.data_bytes = position
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)
        self._start = 8 + len(text)
        os.ftruncate(self._descriptor, self._start + position)
        self._write_at(0, np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8))

    def write(self, name: str, offset: int, data: np.ndarray) -> None:
        """Write `data` at `offset` bytes into tensor `name`."""
        self._write_at(self._start + self._offsets[name] + offset, data)

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)

    def _write_at(self, position: int, data: np.ndarray) -> None:
        rest = np.ascontiguousarray(data).data.cast("B")
        while rest:
            written = os.pwrite(self._descriptor, rest, position)
            rest, position = rest[written:], position + written


def write_weights(
    path: Path,
    tensors: dict[str, TensorRef],
    plan: list[LayerPlan],
    input_amax: dict[str, float],
    *,
    scales: Scales = "max",
    input_rows: Rows | None = None,
    solved: Mapping[str, Layer] | None = None,
    shard_bytes: int | None = None,
    apart: Container[str] = (),
    narrow: Container[str] = (),
    on_progress: Report | None = None,
) -> list[LayerReport]:
    """Write `path` from the checkpoint's `tensors` under `plan`; `input_amax` holds each layer's largest input magnitude.

    `scales` says how NVFP4 block scales are chosen (see cpu.nvfp4_scales), `input_rows` gives sampled inputs fp32 [rows, in]
    of a layer for its output error. Layers in `solved` are stored as they were solved; factors of low
    rank that the plan has and `solved` has not are zero, and so a smoothing is 1. When the tensors exceed `shard_bytes`,
    NAME-0000i-of-0000n.safetensors and NAME.safetensors.index.json are written in place of `path`; tensors in `apart` get
    files of their own, the last. fp32 tensors in `narrow` that are not quantized are rounded to bf16. Returns one report a
    quantized layer. `on_progress` counts source bytes. Raises CheckpointError naming tensor and position of a NaN or infinity;
    no file appears unless all are complete.
    """
    quantized = {f"{entry.layer.name}.weight": entry for entry in to_quantize(plan)}
    input_scale_amax = _group_input_amax(quantized, input_amax)
    units = _units(tensors, plan)
    shards = []
    for is_apart in (False, True):
        some = [unit for unit in units if any(name in apart for name in unit) == is_apart]
        shards += _shards(some, tensors, quantized, shard_bytes, narrow) if some else []
    names = _file_names(path.name, len(shards))
    progress = _Progress(sum(ref.nbytes for ref in tensors.values()), len(tensors), on_progress)
    reports: list[LayerReport] = []
    partial = {name: path.with_name(f".{name}.partial") for name in names}
    files: list[_File] = []
    # A layer may have been solved that a rule gives another format.
    able = {entry.layer.name for entry in quantized.values() if FORMATS[entry.format].solves}
    taken = {name: layer for name, layer in (solved or {}).items() if name in able}
    quantizer = _Quantizer(input_scale_amax, scales, input_rows, taken, progress)
    try:
        for name, shard in zip(names, shards, strict=True):
            file = _File(partial[name], _layout(tensors, quantized, [t for unit in shard for t in unit], narrow))
            files.append(file)
            for unit in shard:
                members = [t for t in unit if t in quantized]
                if members:
                    refs = [(tensors[t], quantized[t]) for t in members]
                    reports += quantizer.write(file, refs)
                for tensor in (t for t in unit if t not in quantized):
                    _copy(file, tensors[tensor], progress, tensor in narrow)
            file.sync()
        if len(files) > 1:
            index = {
                "metadata": {"total_size": sum(file.data_bytes for file in files)},
                "weight_map": {t: name for name, file in zip(names, files, strict=True) for t in sorted(file.names)},
            }
            (path.with_name(f".{path.name}.index.partial")).write_text(json.dumps(index, indent=1) + "\n")
        for name in names:
            partial[name].replace(path.with_name(name))
        if len(files) > 1:
            path.with_name(f".{path.name}.index.partial").replace(path.with_name(f"{path.name}.index.json"))
    finally:
        for file in files:
            file.close()
        for leftover in (*partial.values(), path.with_name(f".{path.name}.index.partial")):
            leftover.unlink(missing_ok=True)
    return reports


@dataclass(frozen=True)
class View:
    """Bytes `start:stop` of a tensor under another name and shape."""

    name: str
    shape: tuple[int, ...]
    ref: TensorRef
    start: int
    stop: int


def write_views(path: Path, views: list[View], report: Report | None = None) -> int:
    """Write `path` with these tensors, copied in chunks; the bytes of their data. It appears when complete."""
    partial = path.with_name(f".{path.name}.partial")
    file = _File(partial, [_Entry(view.name, view.ref.dtype, view.shape, 0) for view in views])
    progress = _Progress(file.data_bytes, len(views), report)
    try:
        for view in views:
            for start in range(view.start, view.stop, CHUNK_BYTES):
                data = view.ref.bytes_view(start, min(view.stop, start + CHUNK_BYTES))
                file.write(view.name, start - view.start, data)
                progress.add(len(data))
            progress.add(0, finished=1)
        file.sync()
        partial.replace(path)
    finally:
        file.close()
        partial.unlink(missing_ok=True)
    return file.data_bytes


def planned_tensors(tensors: dict[str, TensorRef], plan: list[LayerPlan]) -> dict[str, TensorRef]:
    """What write_weights makes of `tensors` under `plan`: names, dtypes and shapes as they will be, not yet in any file."""
    quantized = {f"{entry.layer.name}.weight": entry for entry in to_quantize(plan)}
    order = [name for unit in _units(tensors, plan) for name in unit]
    return {
        entry.name: TensorRef(entry.name, entry.dtype, entry.shape, Path(), 0, entry.nbytes)
        for entry in _layout(tensors, quantized, order)
    }


class _Progress:
    """Counts bytes and tensors, and says how fast they go by."""

    def __init__(self, total: int, tensors: int, report: Report | None) -> None:
        self._total, self._tensors, self._report = total, tensors, report
        self._done = self._finished = 0
        self._began = time.perf_counter()

    def add(self, nbytes: int, finished: int = 0) -> None:
        self._done += nbytes
        self._finished += finished
        if self._report:
            rate = self._done / max(time.perf_counter() - self._began, 1e-9) / 1e9
            self._report(self._done, self._total, f"{self._finished}/{self._tensors} tensors, {rate:.2f} GB/s")


def _units(tensors: dict[str, TensorRef], plan: list[LayerPlan]) -> list[list[str]]:
    """The tensors in the order they are written, those that must stay together in one list: a fusion group's, or one alone."""
    groups: dict[str, list[str]] = {}
    for entry in plan:
        layer = entry.layer.name
        parts = entry.parts or ("weight",)
        groups.setdefault(entry.layer.group or layer, []).extend(
            f"{layer}.{part}" for part in parts if f"{layer}.{part}" in tensors
        )
    planned = {name for unit in groups.values() for name in unit}
    return [*groups.values(), *([name] for name in tensors if name not in planned)]


def _shards(
    units: list[list[str]],
    tensors: dict[str, TensorRef],
    quantized: dict[str, LayerPlan],
    limit: int | None,
    narrow: Container[str],
) -> list[list[list[str]]]:
    shards: list[list[list[str]]] = [[]]
    size = 0
    for unit in units:
        nbytes = sum(entry.nbytes for entry in _layout(tensors, quantized, unit, narrow))
        if limit is not None and shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(unit)
        size += nbytes
    return shards


def _file_names(name: str, count: int) -> list[str]:
    stem = name.removesuffix(".safetensors")
    return [name] if count == 1 else [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def _layout(
    tensors: dict[str, TensorRef], quantized: dict[str, LayerPlan], order: list[str], narrow: Container[str] = ()
) -> list[_Entry]:
    entries = []
    for name in order:
        ref = tensors[name]
        if name not in quantized:
            dtype = "BF16" if name in narrow else ref.dtype
            entries.append(_Entry(name, dtype, ref.shape, {64: 0, 32: 1, 16: 2, 8: 5}[ITEM_BITS[dtype]]))
            continue
        rows, columns = ref.shape
        layer = name.removesuffix(".weight")
        for part, (dtype, shape) in FORMATS[quantized[name].format].parts(rows, columns).items():
            rank = 1 if shape == () else 3 if part == "weight" else 4
            entries.append(_Entry(f"{layer}.{part}", dtype, shape, rank))
        if low_rank := quantized[name].rank:
            factors = {A: (low_rank, columns), B: (rows, low_rank)}
            entries += [_Entry(f"{layer}.{part}", "BF16", shape, 2) for part, shape in factors.items()]
        if quantized[name].is_smoothed:
            entries.append(_Entry(f"{layer}.{PRE_QUANT_SCALE}", "BF16", (columns,), 2))
    return sorted(entries, key=lambda entry: entry.rank)


@dataclass(frozen=True)
class _Quantizer:
    """Writes fusion groups, and reports on their layers; arguments as those of write_weights."""

    input_amax: dict[str, float]
    scales: Scales
    input_rows: Rows | None
    solved: Mapping[str, Layer]
    progress: _Progress

    def write(self, file: _File, members: list[tuple[TensorRef, LayerPlan]]) -> list[LayerReport]:
        """Quantize the Linears of one fusion group under their joint tensor scale."""
        entry = members[0][1]
        format = FORMATS[entry.format]
        amaxes = [_amax_by_chunk(ref, format, self.progress) for ref, _ in members]
        scale = self._scale(members, format, amaxes)
        scalars = dict.fromkeys(format.scalars, scale)
        if "input_scale" in scalars:
            scalars["input_scale"] = format.input_scale(self.input_amax[entry.layer.group or entry.layer.name])
        return [
            self._layer(file, ref, planned, chunks, scalars, scale)
            for (ref, planned), chunks in zip(members, amaxes, strict=True)
        ]

    def _scale(
        self, members: list[tuple[TensorRef, LayerPlan]], format: Format, amaxes: list[list[np.ndarray]]
    ) -> np.float32:
        """The tensor scale of a group: the one its layers were solved under, where some were."""
        for _, planned in members:
            if planned.layer.name in self.solved:
                return self.solved[planned.layer.name].scale
        amax = max(
            cpu.largest(chunk, ref.dtype) for (ref, _), chunks in zip(members, amaxes, strict=True) for chunk in chunks
        )
        return format.group_scale([(cpu.patterns_in(ref), ref.dtype) for ref, _ in members], amax, self.scales)

    def _layer(
        self,
        file: _File,
        ref: TensorRef,
        planned: LayerPlan,
        amaxes: list[np.ndarray],
        scalars: dict[str, np.float32],
        scale: np.float32,
    ) -> LayerReport:
        layer, format = planned.layer.name, FORMATS[planned.format]
        rows = self.input_rows(layer) if self.input_rows else None
        rows = None if rows is None else rows[:: max(1, len(rows) // INPUT_ROWS)][:INPUT_ROWS]
        solved, every, sums = self.solved.get(layer), max(1, ref.shape[0] // OUTPUTS), _Sums()
        beside = _Beside.of(solved)
        for (first, patterns), amax in zip(_row_chunks(ref), amaxes, strict=True):
            if solved is None:
                parts = format.encode(patterns, ref.dtype, amax, scale, self.scales)
            else:
                parts = solved.rows(first, len(patterns), ref.shape[0])
            here = beside.of_rows(slice(first, first + len(patterns)))
            sums.weight += _error(format, patterns, ref.dtype, parts, scale, here)
            for part, rows_of in parts.items():
                file.write(f"{layer}.{part}", first * rows_of.nbytes // len(rows_of), rows_of)
            if rows is not None:
                sampled = slice(-first % every, None, every)
                restored = format.decode({part: rows_of[sampled] for part, rows_of in parts.items()}, scale)
                restored = here.of_rows(sampled).whole(restored)
                exact = cpu.values(np.ascontiguousarray(patterns[sampled]), ref.dtype)
                sums.output += [np.square(rows @ w.T, dtype=np.float64).sum() for w in (exact, exact - restored)]
            self.progress.add(patterns.nbytes // 2)
        for part, value in scalars.items():
            file.write(f"{layer}.{part}", 0, value.reshape(1))
        # A layer that is better without keeps its factors, all zero: what was planned, and compiled, for it stays true.
        for part, factor in (solved.factors if solved else {}).items():
            file.write(f"{layer}.{part}", 0, factor)
        if planned.is_smoothed:
            found = solved.pre_quant_scale if solved else None
            file.write(f"{layer}.{PRE_QUANT_SCALE}", 0, np.full(ref.shape[1], ONE) if found is None else found)
        self.progress.add(ref.nbytes - 2 * (ref.nbytes // 2), finished=1)
        output = None if rows is None else _Sums.decibels(sums.output)
        return LayerReport(layer, planned.format, _Sums.decibels(sums.weight), output)


@dataclass(frozen=True)
class _Beside:
    """What makes some rows of a weight out of its decoded values: factors of low rank, b of these rows, and its smoothing."""

    b: np.ndarray | None = None
    a: np.ndarray | None = None
    smoothing: np.ndarray | None = None

    @staticmethod
    def of(solved: Layer | None) -> _Beside:
        """Of all rows."""
        b, a = (solved.low_rank() if solved else None) or (None, None)
        return _Beside(b, a, solved.smoothing if solved else None)

    def of_rows(self, rows: slice) -> _Beside:
        """Of some of them."""
        return replace(self, b=None if self.b is None else self.b[rows])

    @property
    def is_nothing(self) -> bool:
        """Whether decoded values are the weight."""
        return self.b is None and self.smoothing is None

    def whole(self, decoded: np.ndarray) -> np.ndarray:
        """(Q + b a) * p of Q fp32, in the place of it."""
        if self.b is not None and self.a is not None:
            decoded += self.b @ self.a
        if self.smoothing is not None:
            decoded *= self.smoothing
        return decoded


def _error(
    format: Format, patterns: np.ndarray, dtype: str, parts: Parts, scale: np.float32, beside: _Beside
) -> tuple[float, float]:
    """(sum of w^2, sum of (w - restored)^2) in float64; restored with what is `beside` the decoded values."""
    if beside.is_nothing:
        return format.error(patterns, dtype, parts, scale)
    exact = cpu.values(patterns, dtype)
    wrong = exact - beside.whole(format.decode(parts, scale))
    return float(np.square(exact, dtype=np.float64).sum()), float(np.square(wrong, dtype=np.float64).sum())


def _amax_by_chunk(ref: TensorRef, format: Format, progress: _Progress) -> list[np.ndarray]:
    """The largest magnitudes, as patterns, that the format encodes with, a chunk at a time."""
    found = []
    for first, patterns in _row_chunks(ref):
        try:
            found.append(format.amaxes(patterns, ref.dtype))
        except cpu.NotFiniteError as error:
            row, *rest = error.position
            raise not_finite(ref, (first + row, *rest)) from None
        progress.add(patterns.nbytes - patterns.nbytes // 2)
    return found


def _group_input_amax(quantized: dict[str, LayerPlan], input_amax: dict[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for entry in quantized.values():
        layer = entry.layer.name
        if not FORMATS[entry.format].calibrated:
            continue
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


def _row_chunks(ref: TensorRef) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, bit patterns of the rows of the matrix `ref`), at most CHUNK_BYTES each."""
    rows = ref.shape[0]
    step = max(1, CHUNK_BYTES // (ref.nbytes // rows))
    for first in range(0, rows, step):
        yield first, cpu.patterns_in(ref, first, min(rows, first + step))


def _copy(file: _File, ref: TensorRef, progress: _Progress, narrow: bool = False) -> None:
    for start in range(0, ref.nbytes, CHUNK_BYTES):
        data = ref.bytes_view(start, min(ref.nbytes, start + CHUNK_BYTES))
        if ref.dtype in cpu.PATTERNS:
            dtype = cpu.PATTERNS[ref.dtype]
            bad = cpu.first_non_finite(
                (data if data.ctypes.data % dtype.itemsize == 0 else data.copy()).view(dtype), ref.dtype
            )
            if bad:
                at = start // dtype.itemsize + bad[0]
                raise not_finite(ref, tuple(int(i) for i in np.unravel_index(at, ref.shape)))
        if narrow:
            file.write(ref.name, start // 2, in_bf16(np.ascontiguousarray(data).view(np.uint32)))
        else:
            file.write(ref.name, start, data)
        progress.add(len(data))
    progress.add(0, finished=1)


def not_finite(ref: TensorRef, position: tuple[int, ...]) -> CheckpointError:
    """What is raised where a tensor of the checkpoint holds a NaN or infinity."""
    return CheckpointError(
        f"{ref.file}: tensor {ref.name!r} is not finite (NaN or infinity) at {list(position)}; "
        "the checkpoint is damaged, use it as published"
    )
