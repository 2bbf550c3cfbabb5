"""fluxrt generates images from fluxc bundles with numpy and ONNX Runtime; it never imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluxrt.errors import BackendError, BundleError, FluxError, OutputError, RequestError, VerifyError

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
    "VerifyError",
    "load",
]


def load(
    path: str | PathLike[str],
    *,
    target: str | None = None,
    threads: int | None = None,
    gpus: int | None = None,
    require: str | None = None,
    memory: str = "auto",
    text_cache: int | None = None,
) -> AnyPipeline:
    """Open the bundle at `path` and return what generates with `target`, by default the best that this machine runs.

    With `gpus` that is one sharded for so many GPUs, or on a CPU processes: a RankedPipeline, which starts them at once, one
    a rank, and is to be closed. Otherwise it is a Pipeline, of which only the manifest is read here; graphs and weights are
    loaded by the first request. A kind may bring a pipeline of its own, as visual_gen does. `threads` limits the CPU threads a
    graph of one rank uses (all cores by default, divided among ranks).

    `require` is "gpu", or the name of a target: what falls short of it is an error here, where otherwise the next best target
    would serve. The logger `fluxrt` gets a line with the target, and one for each better target with the reason why it does not
    run, as a warning where the machine has a GPU.

    `memory` is "staged" (text encoder, transformer and decoder are loaded, used and freed in turn), "resident" (all stay), or
    "auto": staged where not everything fits into the memory that is free. Images are the same to the bit. `text_cache` is how
    many bytes of encoded prompts are kept for requests that repeat them, 64 MiB by default; 0 keeps none.

    Raises BundleError for a damaged bundle, RequestError for a target it does not have or one for other `gpus`, BackendError
    where the target asked for does not run on this machine.
    """
    from fluxrt.checks import check_gpus, check_memory, check_name, check_path, check_text_cache, check_threads

    threads = None if threads is None else check_threads(threads)
    gpus = None if gpus is None else check_gpus(gpus)
    target = None if target is None else check_name("target", target)
    require = None if require is None else check_name("require", require)
    memory, text_cache = check_memory(memory), check_text_cache(text_cache)
    root = check_path(path)
    from fluxrt.backends.registry import Holding, make_pipeline
    from fluxrt.bundle import open_bundle
    from fluxrt.choose import pick

    bundle = open_bundle(root)
    picked = pick(bundle, target, gpus, require)
    if threads is not None and picked.device != "cpu":
        import logging

        said = "threads %d changes nothing: target %s computes on the GPU"
        logging.getLogger("fluxrt").warning(said, threads, picked.name)
    return make_pipeline(bundle, picked, threads, gpus, Holding(memory, text_cache))


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
