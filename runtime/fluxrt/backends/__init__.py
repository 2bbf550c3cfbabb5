"""Backends run the graphs of one target kind; all follow the `Backend` protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from fluxrt.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from fluxrt.bundle import Bundle, Target


class Backend(Protocol):
    """Runs a target's graphs by name on named arrays."""

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run `graph` on the entries of `inputs` it declares and return its outputs by name."""
        ...


def make_backend(bundle: Bundle, target: Target, threads: int | None) -> Backend:
    """The backend for `target.kind`; BackendError when this fluxrt has none."""
    if target.kind == "onnxruntime":
        from fluxrt.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(bundle, target, threads)
    raise BackendError(
        f"{bundle.root}: target {target.name!r} is of kind {target.kind!r}, which this fluxrt cannot run; "
        "choose another target of the bundle or install a newer fluxrt"
    )
