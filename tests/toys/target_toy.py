"""A toy target: ONNX Runtime's graphs under another kind, run by a backend that counts what it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluxc.recipe.targets import OnnxRuntimeTarget
from fluxc.targets.onnxruntime.kind import OnnxRuntime
from fluxc.targets.registry import register
from fluxrt import manifest as format
from fluxrt.backends.onnxruntime import OnnxRuntimeBackend
from fluxrt.backends.registry import Kind
from fluxrt.backends.registry import register as register_backend

if TYPE_CHECKING:
    from collections.abc import Mapping


class ToyTarget(OnnxRuntimeTarget, frozen=True, tag="toy"):
    """Its options in a recipe."""

    beads: int = 10


class Toy(OnnxRuntime):
    """The compiler's side."""

    options = ToyTarget

    def describe(self, target: ToyTarget) -> str:
        return f"a toy: counts the graphs it runs with {target.beads} beads"


class ToyEntry(format.OnnxRuntimeTarget, frozen=True, tag="toy"):
    """Its entry in a manifest."""


class CountingBackend(OnnxRuntimeBackend):
    """The runtime's side."""

    runs = 0

    def run(self, graphs: tuple[str, ...], feedback: Mapping[str, str] | None = None) -> None:
        CountingBackend.runs += len(graphs)
        super().run(graphs, feedback)


register(Toy())
register_backend(Kind(ToyEntry, "cpu", 5, lambda *_: None, lambda bundle, target, *_: CountingBackend(bundle, target)))
