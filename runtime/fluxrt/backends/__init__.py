"""Backends run a target's graphs on named buffers; all follow the `Backend` protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from fluxrt.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from fluxrt.bundle import Bundle, Target
    from fluxrt.group import Group


class Backend(Protocol):
    """Holds named buffers, on the host or on a GPU, and plays graphs that read and write them.

    `notes` says what did not go as it should and was worked around.
    """

    notes: list[str]

    def prepare(self, sizes: dict[str, int]) -> None:
        """Make ready for a picture in which dimensions count so much ("branches", "tokens", "rows", "columns")."""
        ...

    def put(self, name: str, array: np.ndarray) -> None:
        """Fill a buffer."""
        ...

    def get(self, name: str) -> np.ndarray:
        """A buffer's content; bf16 comes as fp32."""
        ...

    def play(self, graphs: tuple[str, ...], carry: Mapping[str, str] | None = None) -> None:
        """Run graphs one after the other, each on the buffers its inputs name, into those its outputs name.

        `carry` says which buffers become which others at the end, as a step's result becomes the next one's input.
        """
        ...

    def outputs(self, graph: str) -> tuple[str, ...]:
        """The buffers a graph leaves its results in."""
        ...

    def close(self) -> None:
        """Give back whatever the backend holds."""
        ...


def run(backend: Backend, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Put `inputs`, play one graph, and get its results."""
    for name, array in inputs.items():
        backend.put(name, array)
    backend.play((graph,))
    return {name: backend.get(name) for name in backend.outputs(graph)}


def make_backend(bundle: Bundle, target: Target, threads: int | None, group: Group | None = None) -> Backend:
    """The backend for `target.kind`, of a sharded target for one rank of `group`; BackendError when this fluxrt has none."""
    if target.kind == "onnxruntime" and target.device == "cuda":
        from fluxrt.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

        return OnnxRuntimeCudaBackend(bundle, target)
    if target.kind == "onnxruntime":
        from fluxrt.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(bundle, target, threads, group)
    if target.kind in ("tensorrt", "tensorrt_rtx"):
        from fluxrt.backends.tensorrt import TensorRTBackend

        return TensorRTBackend(bundle, target, group=group)
    raise BackendError(
        f"{bundle.root}: target {target.name!r} is of kind {target.kind!r}, which this fluxrt cannot run; "
        "choose another target of the bundle or install a newer fluxrt"
    )
