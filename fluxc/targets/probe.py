"""What a kind of target gives a build that asks whether an engine computes at all: a backend that looks at every GEMM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fluxrt.backends import Backend


@dataclass(frozen=True)
class Constant:
    """A GEMM whose result is `value` everywhere although no operand explains it: `node` of `graph`, an `op` of the engine's.

    `layer` is the Linear, convolution or other module whose weight it multiplies; None where it multiplies activations alone.
    """

    graph: str
    node: str
    op: str
    layer: str | None
    value: float

    def __str__(self) -> str:
        what = f"{self.layer} ({self.op} {self.node})" if self.layer else f"{self.op} {self.node}"
        return f"{what} in graph {self.graph} gives {self.value:g}"


class Probe(Backend, Protocol):
    """A backend that also looks at the result of every GEMM it computes.

    Results may differ from those of the target's own backend by rounding. Memory is that of the target's own, and a little.
    """

    def constants(self) -> list[Constant]:
        """What was found so far, in the order of computing."""
        ...
