"""The kinds of targets this fluxrt runs: how good each is, what stands in its way on a machine, and its backend.

A further kind is a `Kind` with the struct of its manifest entries, and a line that registers it. Backends are imported when
one is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic

from fluxrt.bundle import (
    TARGETS,
    AnyTarget,
    OnnxRuntimeTarget,
    Target,
    TensorRTRtxTarget,
    TensorRTTarget,
    VisualGenTarget,
    kind_name,
)
from fluxrt.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fluxrt.backends import Backend
    from fluxrt.bundle import Bundle
    from fluxrt.group import Group
    from fluxrt.machine import Machine


@dataclass(frozen=True)
class Kind(Generic[AnyTarget]):
    """Targets whose manifest entry is an `entry`, on `device`; of those that run on a machine the one of the highest
    `preference` is chosen.

    `obstacle(bundle, target, machine)` says why one does not run there, None if it does. `make(bundle, target, threads, group)`
    makes its backend, of a sharded target for one rank of `group`; None for a kind that is no backend of fluxrt's own.
    """

    entry: type[AnyTarget]
    device: str
    preference: int
    obstacle: Callable[[Bundle, AnyTarget, Machine], str | None]
    make: Callable[[Bundle, AnyTarget, int | None, Group | None], Backend] | None


KINDS: dict[tuple[str, str], Kind[Any]] = {}


def register(kind: Kind[AnyTarget]) -> None:
    """Make `kind` known, and with it the entries of manifests that it is for."""
    name = kind_name(kind.entry)
    KINDS[name, kind.device] = kind
    TARGETS[name] = kind.entry


def find_kind(target: Target) -> Kind[Any] | None:
    """The kind of `target`, None for one that this fluxrt does not know."""
    return KINDS.get((target.kind, target.device))


def make_backend(bundle: Bundle, target: Target, threads: int | None, group: Group | None = None) -> Backend:
    """The backend of `target`, of a sharded one for one rank of `group`; BackendError when this fluxrt has none."""
    kind = find_kind(target)
    if kind is None or kind.make is None:
        raise BackendError(
            f"{bundle.root}: target {target.name!r} is of kind {target.kind!r}, which this fluxrt cannot run; "
            "choose another target of the bundle or install a newer fluxrt"
        )
    return kind.make(bundle, target, threads, group)


def _nothing(bundle: Bundle, target: Target, machine: Machine) -> str | None:
    return None


def _onnxruntime(bundle: Bundle, target: OnnxRuntimeTarget, threads: int | None, group: Group | None) -> Backend:
    from fluxrt.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(bundle, target, threads, group)


def _onnxruntime_cuda(bundle: Bundle, target: OnnxRuntimeTarget, threads: int | None, group: Group | None) -> Backend:
    from fluxrt.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

    return OnnxRuntimeCudaBackend(bundle, target)


def _tensorrt(bundle: Bundle, target: TensorRTTarget, threads: int | None, group: Group | None) -> Backend:
    from fluxrt.backends.tensorrt import TensorRTBackend

    return TensorRTBackend(bundle, target, group=group)


def _no_cuda_provider(bundle: Bundle, target: Target, machine: Machine) -> str | None:
    if machine.gpu is None:
        return machine.no_gpu
    if "CUDAExecutionProvider" not in machine.providers:
        return "the installed onnxruntime has no CUDA provider; pip install onnxruntime-gpu in its place"
    return None


def _no_tensorrt(bundle: Bundle, target: TensorRTTarget, machine: Machine) -> str | None:
    from fluxrt.backends.library import EXTRA, check_finished, check_gpu, check_gpus, check_version

    if machine.gpu is None:
        return machine.no_gpu
    version = machine.versions.get(target.engine.library)
    if version is None:
        extra = EXTRA[target.engine.library]
        return f"{target.engine.library} is not installed; pip install 'fluxrt[{extra}]'"
    try:
        check_finished(bundle, target)
        check_version(bundle, target, version)
        check_gpu(bundle, target, machine.gpu)
        check_gpus(target, machine.gpus)
    except BackendError as error:
        return str(error)
    return None


def _no_visual_gen(bundle: Bundle, target: VisualGenTarget, machine: Machine) -> str | None:
    from fluxrt.visual_gen import how_to_serve, is_installed

    if not is_installed():
        return f"needs tensorrt-llm, which is not installed; where it is: {how_to_serve(bundle, target)}"
    return machine.no_gpu if machine.gpu is None else None


BUILT_IN: tuple[Kind[Any], ...] = (
    Kind(OnnxRuntimeTarget, "cpu", 10, _nothing, _onnxruntime),
    Kind(OnnxRuntimeTarget, "cuda", 20, _no_cuda_provider, _onnxruntime_cuda),
    Kind(VisualGenTarget, "cuda", 30, _no_visual_gen, None),
    Kind(TensorRTRtxTarget, "cuda", 40, _no_tensorrt, _tensorrt),
    Kind(TensorRTTarget, "cuda", 50, _no_tensorrt, _tensorrt),
)
for _kind in BUILT_IN:
    register(_kind)
