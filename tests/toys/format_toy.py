"""A toy format: int8 rows, each with an fp32 scale; inputs are left alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from fluxc.formats import cpu
from fluxc.formats.base import Format, GraphBuilder, Parts
from fluxc.formats.registry import register
from fluxc.recipe.structs import Scales

if TYPE_CHECKING:
    import torch


class Int8Rows(Format):
    """value = code * weight_scale of the row, codes -127 to 127."""

    name = "int8-rows"
    algorithm = "INT8_ROWS"
    number = "int"
    calibrated = False

    def parts(self, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"weight": ("I8", (rows, columns)), "weight_scale": ("F32", (rows, 1))}

    def amaxes(self, patterns: np.ndarray, dtype: str) -> np.ndarray:
        return cpu.row_amax(patterns, dtype)

    def encode(self, patterns: np.ndarray, dtype: str, amax: np.ndarray, scale: np.float32, scales: Scales) -> Parts:
        weight = cpu.values(patterns, dtype)
        row = np.maximum(np.abs(weight).max(axis=1, keepdims=True), 1e-30) / 127
        return {"weight_scale": row.astype(np.float32), "weight": np.rint(weight / row).astype(np.int8)}

    def decode(self, parts: Parts, scale: np.float32) -> np.ndarray:
        return parts["weight"].astype(np.float32) * parts["weight_scale"]

    def error(self, patterns: np.ndarray, dtype: str, parts: Parts, scale: np.float32) -> tuple[float, float]:
        return cpu.squared_sums(cpu.values(patterns, dtype), self.decode(parts, scale))

    def dequantize(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return parts["weight"].float() * parts["weight_scale"]

    def reference_form(self, graph: GraphBuilder, layer: str, rows: int, columns: int) -> str:
        codes = graph.node("Cast", [graph.tensor(f"{layer}.weight")], f"{layer}.weight/numbers", to=1)
        return graph.node("Mul", [codes, graph.tensor(f"{layer}.weight_scale")], f"{layer}.weight/fp32")


INT8_ROWS = Int8Rows()

register(INT8_ROWS)
