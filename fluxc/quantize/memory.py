"""Memory a component's weights take: in bf16, with every Linear in FP8, and as planned; scales included."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fluxc.formats.registry import FORMATS
from fluxc.quantize.plan import LayerPlan


@dataclass(frozen=True)
class WeightsMemory:
    """Bytes of weights, on an engine that holds them as the bundle stores them."""

    bf16: int
    fp8: int
    planned: int

    def __add__(self, other: WeightsMemory) -> WeightsMemory:
        return WeightsMemory(self.bf16 + other.bf16, self.fp8 + other.fp8, self.planned + other.planned)

    @property
    def fp8_change(self) -> float:
        """Relative to bf16: -0.5 is half."""
        return self.fp8 / self.bf16 - 1

    @property
    def planned_change(self) -> float:
        """Relative to bf16: -0.5 is half."""
        return self.planned / self.bf16 - 1


def weights_memory(
    shapes: Mapping[str, tuple[int, ...]], plan: list[LayerPlan], stored: Mapping[str, int] | None = None
) -> WeightsMemory:
    """The memory of the tensors `shapes` (name to shape), of which `plan` covers the Linears.

    `stored` holds the tensors' bytes in the checkpoint, which is what unquantized ones keep (else bf16).
    """
    layers = {f"{entry.layer.name}.weight": entry for entry in plan}
    bf16 = fp8 = planned = 0
    for name, shape in shapes.items():
        two_bytes_each = 2 * math.prod(shape)
        entry = layers.get(name)
        bf16 += two_bytes_each
        fp8 += FORMATS["fp8"].nbytes(entry.layer.out_features, entry.layer.in_features) if entry else two_bytes_each
        if entry and entry.format != "bf16":
            planned += entry.bytes_after
        else:
            planned += two_bytes_each if stored is None else stored[name]
    return WeightsMemory(bf16, fp8, planned)
