"""What a number format is to the rest of fluxc: how a Linear is stored in it, and what it loses.

Matrices come as bit patterns [rows, columns] with the safetensors dtype they lie in (fluxc.formats.cpu). Stored tensors are
named by part: `weight`, and beside it scales.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from fluxc.recipe.structs import Scales

if TYPE_CHECKING:
    import torch

Parts = dict[str, np.ndarray]
Matrix = tuple[np.ndarray, str]
"""Bit patterns [rows, columns] and their dtype."""


class GraphBuilder(Protocol):
    """Adds nodes of standard ONNX to a graph, each shared part once."""

    def tensor(self, name: str) -> str:
        """A tensor of the weights file as a value; binding gives it its type."""
        ...

    def constant(self, name: str, kind: int, shape: list[int], values: list[int] | list[float]) -> str:
        """A constant of an ONNX element type."""
        ...

    def node(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        """One node and its output's name."""
        ...


class Format(ABC):
    """A format by `name`, with values along in_features in blocks of `block`.

    `algorithm` and `group_size` are ModelOpt's words for it, `variants` its words for the format with a further part
    (`pre_quant_scale`, `svdquant_lora_a`), `bits` and `number` (float or int) those of a value. `scalars` are the parts a
    fusion group shares, `calibrated` whether inputs are rounded under a static scale, which calibration finds.
    `searches_scales`: whether a recipe's `scales` changes anything; `solves`: the format whose weights a recipe's `rounding`
    solves, empty where it changes nothing. `multiplies`: the format that a GPU multiplies in, where that is another one.
    `weights_alone`: the format with the same weights whose inputs are not rounded, empty where there is none.
    `margin`: how many times the largest input that calibration saw the static scale stands for, where a recipe does not say.
    `values` are what the part `weight` holds where a value is that times its scales, the parts whose name begins with
    `weight_scale`; None for a format that is not of this kind.
    """

    name: str
    block: int = 1
    bits: int = 8
    number: str = "float"
    algorithm: str = ""
    variants: Mapping[str, str] = MappingProxyType({})
    group_size: int | None = None
    scalars: tuple[str, ...] = ()
    calibrated: bool = True
    searches_scales: bool = False
    solves: str = ""
    multiplies: str | None = None
    weights_alone: str = ""
    margin: float = 1.0
    values: Literal["e2m1", "e4m3"] | None = None

    @abstractmethod
    def parts(self, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Safetensors dtype and shape of every tensor of a Linear [rows, columns], by part."""

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of the tensors of a Linear [rows, columns]."""
        parts = self.parts(rows, columns).values()
        return sum(_BYTES[dtype] * math.prod(shape) for dtype, shape in parts)

    def bits_with_scales(self, columns: int) -> float:
        """Bits of a value in a row of `columns`, with its share of the row's scales."""
        parts = [(dtype, shape) for dtype, shape in self.parts(1, columns).values() if shape]
        return 8 * sum(_BYTES[dtype] * math.prod(shape) for dtype, shape in parts) / columns

    def recognises(self, dtypes: Mapping[str, str]) -> bool:
        """Whether a layer whose `weight` and `weight_scale` have these dtypes is stored so."""
        own = {part: dtype for part, (dtype, _) in self.parts(self.block, self.block).items()}
        return all(dtypes.get(part, own.get(part)) == own.get(part) for part in ("weight", "weight_scale"))

    @abstractmethod
    def amaxes(self, patterns: np.ndarray, dtype: str) -> np.ndarray:
        """The largest magnitudes, as patterns, that `encode` takes; NotFiniteError at the first NaN or infinity."""

    def group_scale(self, members: list[Matrix], amax: np.float32, scales: Scales) -> np.float32:
        """The tensor scale that a fusion group shares; 1 for a format without one."""
        return np.float32(1)

    def input_scale(self, amax: float) -> np.float32:
        """The static scale of inputs whose largest magnitude is `amax`."""
        return np.float32(1)

    @abstractmethod
    def encode(self, patterns: np.ndarray, dtype: str, amax: np.ndarray, scale: np.float32, scales: Scales) -> Parts:
        """The parts of these rows that grow with rows; `amax` as `amaxes` gives it, `scale` as `group_scale`."""

    def solve(
        self, weight: np.ndarray, factor: tuple[np.ndarray, np.ndarray], scale: np.float32, scales: Scales
    ) -> Parts:
        """As `encode`, of rows fp32 that are rounded for the inputs that `factor` and its order stand for (formats.gptq)."""
        raise NotImplementedError

    @abstractmethod
    def decode(self, parts: Parts, scale: np.float32) -> np.ndarray:
        """fp32 [rows, columns] of encoded rows."""

    @abstractmethod
    def error(self, patterns: np.ndarray, dtype: str, parts: Parts, scale: np.float32) -> tuple[float, float]:
        """(sum of w^2, sum of (w - restored)^2) in float64."""

    @abstractmethod
    def dequantize(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """fp32 [out, in] of a stored Linear, as torch tensors by part."""

    def fake_quantize(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """What hardware makes of inputs `x` under the static `scale`: fp32; `x` itself where they are not rounded."""
        return x

    def tensor_scale(self, amax: torch.Tensor) -> torch.Tensor:
        """`input_scale` in torch."""
        import torch

        return torch.ones_like(amax)

    @abstractmethod
    def reference_form(self, graph: GraphBuilder, layer: str, rows: int, columns: int) -> str:
        """The dense weight fp32 [rows, columns] of `layer`, in standard ONNX, for targets that have no form of their own."""


_BYTES = {"U8": 1, "I8": 1, "F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4}
