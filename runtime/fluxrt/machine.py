"""What this machine has that targets need."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fluxrt.errors import BackendError

if TYPE_CHECKING:
    from fluxrt.cuda import Gpu


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
