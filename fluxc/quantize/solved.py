"""Weights that were solved against calibration (GPTQ, low rank), on their way from the stage that solves them to the one that
writes.

A folder of safetensors files, one for each part of the model, with the parts of each solved Linear that grow with its rows, its
factors of low rank and its smoothing as bf16 patterns, and the tensor scale of its fusion group; of each layer the metadata
says how it was rounded.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from fluxc.base.errors import CheckpointError
from fluxc.base.safetensors import TensorRef, read_header
from fluxc.formats import cpu
from fluxc.formats.base import Parts
from fluxc.formats.low_rank import A, B
from fluxc.formats.smoothing import PRE_QUANT_SCALE, values_of
from fluxrt.safetensors import raw_header

KEY = "fluxc"


class Rounding(msgspec.Struct, frozen=True):
    """How the weight of one layer was rounded, `gptq` or `nearest`, beside factors of rank `low_rank`, 0 for none; `why` says
    what kept it from being as the recipe asks.

    `damping`: share of the mean diagonal that was added to the second moments. `snr_db` and `nearest_snr_db`: signal-to-noise
    of the layer's output on inputs that were held out, solved and rounded to nearest; None where there were none, or nothing
    was solved, or no error at all. `smoothed`: its inputs are multiplied by a `pre_quant_scale`. Where that was tried,
    `smoothed_snr_db` and `unsmoothed_snr_db` are the same ratio with those inputs rounded too, with it and without.
    """

    rounding: str
    damping: float | None = None
    snr_db: float | None = None
    nearest_snr_db: float | None = None
    why: str = ""
    low_rank: int = 0
    smoothed: bool = False
    smoothed_snr_db: float | None = None
    unsmoothed_snr_db: float | None = None


@dataclass(frozen=True)
class Layer:
    """A solved Linear: its parts by name, the scale its fusion group shares, and its factors and `pre_quant_scale`, if any, as
    bf16 patterns."""

    parts: dict[str, TensorRef]
    scale: np.float32
    factors: dict[str, np.ndarray] = field(default_factory=dict)
    pre_quant_scale: np.ndarray | None = None

    def rows(self, first: int, count: int, of: int) -> Parts:
        """Its parts for `count` rows from `first`, of so many."""
        found = {}
        for name, ref in self.parts.items():
            width = ref.nbytes // of
            found[name] = ref.bytes_view(first * width, (first + count) * width).reshape(count, width)
        return found

    def low_rank(self) -> tuple[np.ndarray, np.ndarray] | None:
        """fp32 b [out, rank] and a [rank, in], whose product is added to the weight; None without factors."""
        if not self.factors:
            return None
        return cpu.values(self.factors[B], "BF16"), cpu.values(self.factors[A], "BF16")

    @property
    def smoothing(self) -> np.ndarray | None:
        """fp32 [in], by which inputs are multiplied and what `parts` and factors stand for was divided; None without."""
        return None if self.pre_quant_scale is None else values_of(self.pre_quant_scale)


class Solved:
    """What a folder of them holds: `roundings` of all layers, and the `layers` that were solved."""

    def __init__(self, folder: Path) -> None:
        self.roundings: dict[str, Rounding] = {}
        self.layers: dict[str, Layer] = {}
        for path in sorted(folder.glob("*.safetensors")):
            self.roundings |= read_roundings(path)
            by_layer: dict[str, dict[str, TensorRef]] = {}
            for name, ref in read_header(path).items():
                layer, _, part = name.rpartition(".")
                by_layer.setdefault(layer, {})[part] = ref
            for layer, parts in by_layer.items():
                scale = parts.pop(SCALE).bytes_view().view(np.float32)[0]
                refs = {part: parts.pop(part) for part in (A, B, PRE_QUANT_SCALE) if part in parts}
                beside = {part: ref.bytes_view().view(np.uint16).reshape(ref.shape) for part, ref in refs.items()}
                self.layers[layer] = Layer(parts, np.float32(scale), beside, beside.pop(PRE_QUANT_SCALE, None))

    @property
    def smoothing(self) -> dict[str, np.ndarray]:
        """By layer that is smoothed, fp32 [in] by which its inputs are multiplied."""
        return {name: values for name, layer in self.layers.items() if (values := layer.smoothing) is not None}


SCALE = "scale"


def write_solved(path: Path, solved: dict[str, tuple[Parts, np.float32]], roundings: dict[str, Rounding]) -> None:
    """Write `path`; it appears when complete."""
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}
    for layer, (parts, scale) in solved.items():
        tensors |= {f"{layer}.{part}": np.ascontiguousarray(value) for part, value in parts.items()}
        tensors[f"{layer}.{SCALE}"] = np.array([scale], np.float32)
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, partial, metadata={KEY: json.dumps(msgspec.to_builtins(roundings), sort_keys=True)})
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_roundings(path: Path) -> dict[str, Rounding]:
    """How each layer of `path` was rounded; CheckpointError where it is not one of these files, or not whole."""
    read_header(path)
    try:
        return msgspec.json.decode(raw_header(path)[0]["__metadata__"][KEY], type=dict[str, Rounding])
    except (KeyError, TypeError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path}: no file of solved weights") from error
