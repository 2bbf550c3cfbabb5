"""Which of a bundle's targets this machine can run, and which of them is best."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fluxrt.errors import BackendError, RequestError

if TYPE_CHECKING:
    from fluxrt.bundle import Bundle, Target
    from fluxrt.cuda import Gpu

BEST_FIRST = (
    ("tensorrt", "cuda"),
    ("tensorrt_rtx", "cuda"),
    ("visual_gen", "cuda"),
    ("onnxruntime", "cuda"),
    ("onnxruntime", "cpu"),
)


@dataclass(frozen=True)
class Machine:
    """What targets need: a GPU, or why there is none, and how many; versions of the libraries installed; ONNX Runtime's
    providers."""

    gpu: Gpu | None
    no_gpu: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    gpus: int = 1


def this_machine() -> Machine:
    """What is installed here; imports the GPU libraries that are."""
    from fluxrt.cuda import count_gpus, first_gpu

    gpu, count, reason = None, 0, ""
    try:
        gpu, count = first_gpu(), count_gpus()
    except BackendError as error:
        reason = str(error)
    versions = {}
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            versions[name] = str(importlib.import_module(name).__version__)
        except (ImportError, OSError):
            continue
    import onnxruntime

    return Machine(gpu, reason, versions, tuple(onnxruntime.get_available_providers()), count)


def obstacle(bundle: Bundle, target: Target, machine: Machine) -> str | None:
    """Why `target` does not run on `machine`, in one sentence or two; None if it does."""
    from fluxrt.backends.library import EXTRA, check_finished, check_gpu, check_gpus, check_version
    from fluxrt.visual_gen import how_to_serve, is_installed

    if (target.kind, target.device) not in BEST_FIRST:
        return f"this fluxrt cannot run targets of kind {target.kind!r}; install a newer one"
    if target.device == "cpu":
        return None
    if target.visual_gen and not is_installed():
        return f"needs tensorrt-llm, which is not installed; where it is: {how_to_serve(bundle, target)}"
    if machine.gpu is None:
        return machine.no_gpu
    if target.visual_gen:
        return None
    if target.engine is None:
        if "CUDAExecutionProvider" not in machine.providers:
            return "the installed onnxruntime has no CUDA provider; pip install onnxruntime-gpu in its place"
        return None
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


def choose(bundle: Bundle, machine: Machine | None = None, gpus: int = 1) -> tuple[Target, dict[str, str | None]]:
    """The best target for `gpus` GPUs that `machine` (this one by default) runs, and by target what stands in its way.

    Of equally good targets the first listed is taken. Raises BackendError naming every obstacle when none runs, and
    RequestError when the bundle has no target for so many.
    """
    targets = [target for target in bundle.manifest.targets if target.runs_on(gpus)]
    if not targets:
        known = ", ".join(f"{target.name} for {target.gpus}" for target in bundle.manifest.targets)
        raise RequestError(
            f"{bundle.root}: no target of this bundle is for {gpus} GPUs; it has {known}. Ask for one of these with --gpus, or "
            f"add `gpus: {gpus}` to a target of the recipe and rebuild"
        )
    if machine is None and all(target.device == "cpu" for target in targets):
        machine = Machine(None)
    found = machine or this_machine()
    obstacles = {target.name: obstacle(bundle, target, found) for target in targets}
    able = [target for target in targets if obstacles[target.name] is None]
    if not able:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in obstacles.items())
        raise BackendError(f"{bundle.root}: no target of this bundle runs on this machine. {reasons}")
    return min(able, key=lambda target: BEST_FIRST.index((target.kind, target.device))), obstacles
