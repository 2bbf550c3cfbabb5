"""The TensorRT library an engine needs: importing it, and refusing what would not load, before anything is loaded."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from fluxrt.errors import BackendError
from fluxrt.install import extra_requirements, install, install_extra
from fluxrt.system import DOCKERS_SHM, MORE_SHM

if TYPE_CHECKING:
    from fluxrt.bundle import Bundle
    from fluxrt.cuda import Gpu
    from fluxrt.machine import Machine
    from fluxrt.manifest import Engine, Target, TensorRTTarget

PACKAGE = {"tensorrt": "tensorrt-cu13", "tensorrt_rtx": "tensorrt-rtx-cu13"}


def load_library(engine: Engine) -> Any:
    """The module that runs `engine`; BackendError says how to install it."""
    try:
        return importlib.import_module(engine.library)
    except (ImportError, OSError) as error:
        raise BackendError(
            f"this target needs {engine.library} {engine.version}, which is not installed ({error}); "
            f"{how_to_install(engine)}, or choose another --target"
        ) from error


def how_to_install(engine: Engine) -> str:
    """What to do for the one version of the library in which the engine's plans load, and the driver's bindings, as a clause
    that starts with a verb.

    Our extra's own pin may be of another version.
    """
    exact = f"=={engine.version}" if engine.version else ""
    return f"run `{install(*extra_requirements('fluxrt', 'cuda'), PACKAGE[engine.library] + exact)}`"


def check_finished(bundle: Bundle, target: TensorRTTarget) -> None:
    """Refuse an engine whose plans were not built yet."""
    if target.engine.unfinished:
        raise BackendError(
            f"{bundle.root}: target {target.name!r} has plans that are built on the GPU itself "
            f"({', '.join(target.engine.unfinished[:3])}, ...); run `fluxc finish {bundle.root}` on a machine with compute "
            f"capability {', '.join(target.engine.compute_capabilities)}, or choose another --target"
        )


def check_version(bundle: Bundle, target: TensorRTTarget, version: str) -> None:
    """Refuse a library of another version than the plans were built with; plans load in that one alone."""
    built = str(target.engine.version)
    if version.split(".")[:3] != built.split(".")[:3]:
        raise BackendError(
            f"{bundle.root}: the plans of target {target.name!r} were built with {target.engine.library} {built}, installed is "
            f"{version}; run `{install(f'{PACKAGE[target.engine.library]}=={built}')}`, or rebuild the bundle with {version}"
        )


def check_gpu(bundle: Bundle, target: TensorRTTarget, gpu: Gpu) -> None:
    """Refuse a GPU the plans were not built for."""
    if gpu.compute_capability not in target.engine.compute_capabilities:
        raise BackendError(
            f"{bundle.root}: the plans of target {target.name!r} are for compute capability "
            f"{', '.join(target.engine.compute_capabilities)}, this GPU is a {gpu.name} with {gpu.compute_capability}; choose "
            "another --target, or rebuild with this one under the target's compute_capabilities"
        )


def make_logger(trt: Any) -> Any:
    """A logger that keeps the last errors, for the message of the call that failed."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self._lines = [*self._lines[-4:], message.strip()]

        def told(self) -> str:
            return "; ".join(self._lines) or "it gave no reason"

    return Logger()


def check_gpus(target: Target, machine: Machine) -> None:
    """Refuse a machine with fewer GPUs than `target` is sharded for, without NCCL, or where NCCL would have no way from GPU to
    GPU: where they do not reach each other it goes through /dev/shm, of which a container has next to nothing."""
    if target.gpus > machine.gpus:
        raise BackendError(
            f"target {target.name!r} is sharded for {target.gpus} GPUs, this machine shows {machine.gpus}; check "
            "CUDA_VISIBLE_DEVICES, or choose another --target"
        )
    if target.gpus == 1:
        return
    if importlib.util.find_spec("nccl") is None:
        raise BackendError(
            f"target {target.name!r} needs NCCL for its {target.gpus} GPUs; run `{install_extra('fluxrt', 'nccl')}`"
        )
    apart = [pair for pair in machine.apart if max(pair) < target.gpus]
    if apart and machine.shared_memory is not None and machine.shared_memory <= DOCKERS_SHM:
        raise BackendError(
            f"target {target.name!r}: GPUs {apart[0][0]} and {apart[0][1]} do not reach each other's memory (no P2P), so NCCL "
            f"needs /dev/shm, which has {machine.shared_memory >> 20} MiB here; {MORE_SHM}, or choose another --target"
        )
