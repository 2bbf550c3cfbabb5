"""fluxrt generates images from fluxc bundles with numpy and ONNX Runtime; it never imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluxrt.errors import BackendError, BundleError, FluxError, OutputError, RequestError

if TYPE_CHECKING:
    from os import PathLike

    from fluxrt.backends.registry import AnyPipeline
    from fluxrt.pipeline import Pipeline
    from fluxrt.ranked import RankedPipeline
    from fluxrt.request import Request

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "BundleError",
    "FluxError",
    "OutputError",
    "Pipeline",
    "RankedPipeline",
    "Request",
    "RequestError",
    "load",
]


def load(
    path: str | PathLike[str], *, target: str | None = None, threads: int | None = None, gpus: int | None = None
) -> AnyPipeline:
    """Open the bundle at `path` and return what generates with `target`, by default the best that this machine runs.

    With `gpus` that is one sharded for so many GPUs, or on a CPU processes: a RankedPipeline, which starts them at once, one
    a rank, and is to be closed. Otherwise it is a Pipeline, of which only the manifest is read here; graphs and weights are
    loaded by the first request. A kind may bring a pipeline of its own, as visual_gen does. `threads` limits the CPU threads a
    graph of one rank uses (all cores by default, divided among ranks).
    Raises BundleError for a damaged bundle or a target it does not have, RequestError for a target with other `gpus`.
    """
    from fluxrt.backends.registry import make_pipeline
    from fluxrt.bundle import open_bundle
    from fluxrt.checks import check_gpus, check_threads
    from fluxrt.choose import choose

    threads = None if threads is None else check_threads(threads)
    gpus = None if gpus is None else check_gpus(gpus)
    bundle = open_bundle(path)
    chosen = choose(bundle, gpus=gpus or 1)[0] if target is None else bundle.target(target)
    return make_pipeline(bundle, chosen, threads, gpus)


def __getattr__(name: str) -> object:
    if name == "Pipeline":
        from fluxrt.pipeline import Pipeline

        return Pipeline
    if name == "RankedPipeline":
        from fluxrt.ranked import RankedPipeline

        return RankedPipeline
    if name == "Request":
        from fluxrt.request import Request

        return Request
    raise AttributeError(f"module 'fluxrt' has no attribute {name!r}")
