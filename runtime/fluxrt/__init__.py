"""fluxrt draws pictures from fluxc bundles with numpy and ONNX Runtime; it never imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluxrt.errors import BackendError, BundleError, FluxError, RequestError

if TYPE_CHECKING:
    from os import PathLike

    from fluxrt.pipeline import Pipeline
    from fluxrt.ranked import RankedPipeline
    from fluxrt.visual_gen import VisualGenPipeline

__version__ = "0.1.0"
__all__ = ["BackendError", "BundleError", "FluxError", "Pipeline", "RankedPipeline", "RequestError", "load"]


def load(
    path: str | PathLike[str], *, target: str | None = None, threads: int | None = None, gpus: int | None = None
) -> Pipeline | RankedPipeline | VisualGenPipeline:
    """Open the bundle at `path` and return what draws with `target`, by default the best that this machine runs.

    With `gpus` that is one sharded for so many GPUs, or on a CPU processes: a RankedPipeline, which starts them at once, one
    a rank, and is to be closed. A visual_gen target is a VisualGenPipeline. Otherwise a Pipeline, of which only the manifest is
    read here; graphs and weights are loaded by the first picture. `threads` limits the CPU threads a graph of one rank uses
    (all cores by default, divided among ranks).
    Raises BundleError for a damaged bundle or a target it does not have, RequestError for a target with other `gpus`.
    """
    from fluxrt.bundle import VisualGenTarget, open_bundle
    from fluxrt.choose import choose
    from fluxrt.pipeline import Pipeline
    from fluxrt.ranked import RankedPipeline
    from fluxrt.visual_gen import VisualGenPipeline

    bundle = open_bundle(path)
    chosen = choose(bundle, gpus=gpus or 1)[0] if target is None else bundle.target(target)
    if isinstance(chosen, VisualGenTarget):
        return VisualGenPipeline(bundle, chosen, gpus or 1)
    if gpus is not None and chosen.gpus != gpus:
        raise RequestError(
            f"target {chosen.name!r} is for {chosen.gpus} GPUs, not {gpus}; leave gpus out, or the target"
        )
    if chosen.gpus > 1:
        return RankedPipeline(bundle, chosen, threads=threads)
    return Pipeline(bundle, target=chosen.name, threads=threads)


def __getattr__(name: str) -> object:
    if name == "Pipeline":
        from fluxrt.pipeline import Pipeline

        return Pipeline
    if name == "RankedPipeline":
        from fluxrt.ranked import RankedPipeline

        return RankedPipeline
    raise AttributeError(f"module 'fluxrt' has no attribute {name!r}")
