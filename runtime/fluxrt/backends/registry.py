"""The kinds of targets this fluxrt runs: how good each is, what stands in its way on a machine, and its backend or pipeline.

A further kind is a `Kind` with the struct of its manifest entries, and a line that registers it. Backends and pipelines are
imported when one is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol

from fluxrt.backends import openvino_target
from fluxrt.errors import BackendError, RequestError
from fluxrt.install import update
from fluxrt.manifest import (
    TARGETS,
    AnyTarget,
    OnnxRuntimeTarget,
    Target,
    TensorRTRtxTarget,
    TensorRTTarget,
    VisualGenTarget,
    kind_name,
)
from fluxrt.texts import TEXT_CACHE

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from fluxrt.backends import Backend
    from fluxrt.bundle import Bundle
    from fluxrt.group import Group
    from fluxrt.machine import Machine
    from fluxrt.memory import Memory
    from fluxrt.request import Request
    from fluxrt.result import OnImage, OnStep, Result


class AnyPipeline(Protocol):
    """A loaded target of any kind, which generates images until it is closed; `with` closes it.

    `notes` says what did not go as it should and was worked around.
    """

    bundle: Bundle

    @property
    def target(self) -> Target: ...

    @property
    def notes(self) -> list[str]: ...

    def generate(self, request: Request, on_step: OnStep | None = None, on_image: OnImage | None = None) -> Result:
        """One image a prompt; `on_step(done, total)` says how far it is, `on_image(number, image, skipped)` gives an image as
        soon as it is made. Threads that call it are served one at a time. RequestError for what the bundle cannot do."""
        ...

    def close(self) -> None:
        """Give back whatever the pipeline holds."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


@dataclass(frozen=True)
class Holding:
    """How a pipeline holds a model: `memory`, and bytes of encoded prompts that it keeps."""

    memory: Memory = "auto"
    text_cache: int = TEXT_CACHE


def backend_pipeline(
    bundle: Bundle, target: Target, threads: int | None, gpus: int | None, holding: Holding | None = None
) -> AnyPipeline:
    """The pipeline of a kind that has a backend: of a sharded target one that starts its ranks."""
    from fluxrt.backends.library import check_gpus
    from fluxrt.machine import this_machine
    from fluxrt.pipeline import Pipeline
    from fluxrt.ranked import RankedPipeline

    held = holding or Holding()
    if gpus is not None and target.gpus != gpus:
        raise RequestError(
            f"target {target.name!r} is for {target.gpus} GPUs, not {gpus}; leave gpus out, or the target"
        )
    if target.gpus > 1:
        if target.device == "cuda":
            # Before ranks are started, which may be minutes until one of them says so.
            check_gpus(target, this_machine())
        return RankedPipeline(bundle, target, threads=threads, memory=held.memory, text_cache=held.text_cache)
    return Pipeline(bundle, target=target.name, threads=threads, memory=held.memory, text_cache=held.text_cache)


@dataclass(frozen=True)
class Kind(Generic[AnyTarget]):
    """Targets whose manifest entry is an `entry`, on `device`; of those that run on a machine the one of the highest
    `preference` is chosen.

    `obstacle(bundle, target, machine)` says why one does not run there, None if it does. Either the kind has a backend, which
    `backend(bundle, target, threads, group)` makes, of a sharded target for one rank of `group`; or it brings a pipeline of its
    own, which `pipeline(bundle, target, threads, gpus)` makes, with `gpus` None where the caller leaves them to the target.
    """

    entry: type[AnyTarget]
    device: str
    preference: int
    obstacle: Callable[[Bundle, AnyTarget, Machine], str | None]
    backend: Callable[[Bundle, AnyTarget, int | None, Group | None], Backend] | None = None
    pipeline: Callable[[Bundle, AnyTarget, int | None, int | None], AnyPipeline] = backend_pipeline


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
    if kind is None or kind.backend is None:
        raise _unknown(bundle, target)
    return kind.backend(bundle, target, threads, group)


def make_pipeline(
    bundle: Bundle, target: Target, threads: int | None, gpus: int | None, holding: Holding | None = None
) -> AnyPipeline:
    """The pipeline that generates with `target`; BackendError when this fluxrt has none, RequestError for other `gpus`, and for
    a way of holding the model where the kind's own pipeline sees to that."""
    kind = find_kind(target)
    if kind is None:
        raise _unknown(bundle, target)
    if kind.pipeline is backend_pipeline:
        return backend_pipeline(bundle, target, threads, gpus, holding)
    if holding and holding.memory != "auto":
        raise RequestError(
            f"target {target.name!r}, of kind {target.kind}, sees to its memory itself; leave --memory out, or choose another "
            "--target"
        )
    return kind.pipeline(bundle, target, threads, gpus)


def _unknown(bundle: Bundle, target: Target) -> BackendError:
    return BackendError(
        f"{bundle.root}: target {target.name!r} is of kind {target.kind!r}, which this fluxrt cannot run; "
        f"choose another target of the bundle, or {update('fluxrt')}"
    )


def _nothing(bundle: Bundle, target: Target, machine: Machine) -> str | None:
    return None


def _onnxruntime(bundle: Bundle, target: OnnxRuntimeTarget, threads: int | None, group: Group | None) -> Backend:
    from fluxrt.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(bundle, target, threads, group)


def _openvino(
    bundle: Bundle, target: openvino_target.OpenVinoTarget, threads: int | None, group: Group | None
) -> Backend:
    from fluxrt.backends.openvino import OpenVinoBackend

    return OpenVinoBackend(bundle, target, threads)


def _onnxruntime_cuda(bundle: Bundle, target: OnnxRuntimeTarget, threads: int | None, group: Group | None) -> Backend:
    from fluxrt.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

    backend = OnnxRuntimeCudaBackend(bundle, target)
    backend.try_graphs()
    return backend


def _tensorrt(bundle: Bundle, target: TensorRTTarget, threads: int | None, group: Group | None) -> Backend:
    from fluxrt.backends.tensorrt import TensorRTBackend

    return TensorRTBackend(bundle, target, group=group)


def _visual_gen(bundle: Bundle, target: VisualGenTarget, threads: int | None, gpus: int | None) -> AnyPipeline:
    from fluxrt.visual_gen import VisualGenPipeline

    return VisualGenPipeline(bundle, target, gpus or 1)


def _no_cuda_provider(bundle: Bundle, target: Target, machine: Machine) -> str | None:
    from fluxrt.backends.onnxruntime_cuda import PROVIDER, how_to_install
    from fluxrt.system import check_driver

    if machine.gpu is None:
        return machine.no_gpu
    try:
        check_driver(machine.gpu)
    except BackendError as error:
        return str(error)
    return (
        None if PROVIDER in machine.providers else f"the installed onnxruntime has no CUDA provider; {how_to_install()}"
    )


def _no_tensorrt(bundle: Bundle, target: TensorRTTarget, machine: Machine) -> str | None:
    from fluxrt.backends.library import check_finished, check_gpu, check_gpus, check_version, how_to_install
    from fluxrt.system import check_driver

    if machine.gpu is None:
        return machine.no_gpu
    version = machine.versions.get(target.engine.library)
    try:
        check_driver(machine.gpu)
        if version is None:
            return f"{target.engine.library} is not installed; {how_to_install(target.engine)}"
        check_finished(bundle, target)
        check_version(bundle, target, version)
        check_gpu(bundle, target, machine.gpu)
        check_gpus(target, machine)
    except BackendError as error:
        return str(error)
    return None


def _no_visual_gen(bundle: Bundle, target: VisualGenTarget, machine: Machine) -> str | None:
    from fluxrt.visual_gen import how_to_serve, is_installed

    if machine.gpu is None:
        return machine.no_gpu
    if not is_installed():
        return f"needs tensorrt-llm, which is not installed; where it is: {how_to_serve(bundle, target)}"
    return None


BUILT_IN: tuple[Kind[Any], ...] = (
    Kind(OnnxRuntimeTarget, "cpu", 10, _nothing, _onnxruntime),
    Kind(openvino_target.OpenVinoTarget, "cpu", 10, openvino_target.obstacle, _openvino),
    Kind(openvino_target.OpenVinoTarget, "npu", 14, openvino_target.obstacle, _openvino),
    Kind(openvino_target.OpenVinoTarget, "gpu", 16, openvino_target.obstacle, _openvino),
    Kind(OnnxRuntimeTarget, "cuda", 20, _no_cuda_provider, _onnxruntime_cuda),
    Kind(VisualGenTarget, "cuda", 30, _no_visual_gen, pipeline=_visual_gen),
    Kind(TensorRTRtxTarget, "cuda", 40, _no_tensorrt, _tensorrt),
    Kind(TensorRTTarget, "cuda", 50, _no_tensorrt, _tensorrt),
)
for _kind in BUILT_IN:
    register(_kind)
