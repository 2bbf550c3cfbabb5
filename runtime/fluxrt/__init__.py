"""fluxrt draws pictures from fluxc bundles with numpy and ONNX Runtime; it never imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluxrt.errors import BackendError, BundleError, FluxError, RequestError

if TYPE_CHECKING:
    from os import PathLike

    from fluxrt.pipeline import Pipeline

__version__ = "0.1.0"
__all__ = ["BackendError", "BundleError", "FluxError", "Pipeline", "RequestError", "load"]


def load(path: str | PathLike[str], *, target: str | None = None, threads: int | None = None) -> Pipeline:
    """Open the bundle at `path` and return a `Pipeline` that draws with `target`, by default the best that this machine runs.

    Only the manifest is read here; graphs and weights are loaded by the first picture.
    `threads` limits the CPU threads a graph uses (all cores by default).
    Raises BundleError for a damaged bundle and RequestError for a target it does not have.
    """
    from fluxrt.bundle import open_bundle
    from fluxrt.pipeline import Pipeline

    return Pipeline(open_bundle(path), target=target, threads=threads)


def __getattr__(name: str) -> object:
    if name == "Pipeline":
        from fluxrt.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'fluxrt' has no attribute {name!r}")
