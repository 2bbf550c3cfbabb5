"""What this machine has that targets need."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fluxrt.errors import BackendError
from fluxrt.system import installed_driver, old_driver, pairs_apart, reaches, shared_memory

if TYPE_CHECKING:
    from fluxrt.cuda import Gpu


@dataclass(frozen=True)
class Machine:
    """What targets need: a GPU, or why there is none, and how many; versions of the libraries installed; ONNX Runtime's
    providers; the version of NVIDIA's kernel driver, bytes of /dev/shm, and pairs of GPUs that do not reach each other."""

    gpu: Gpu | None
    no_gpu: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    gpus: int = 1
    driver: str | None = None
    shared_memory: int | None = None
    apart: tuple[tuple[int, int], ...] = ()


def this_machine() -> Machine:
    """What is installed here; imports the GPU libraries that are."""
    from fluxrt.cuda import count_gpus, first_gpu

    gpu, count, reason, driver = None, 0, "", installed_driver()
    apart: tuple[tuple[int, int], ...] = ()
    try:
        gpu, count = first_gpu(), count_gpus()
        apart = pairs_apart(count, reaches)
    except BackendError as error:
        # With a driver that is too old, CUDA says whatever fails first.
        reason = old_driver(driver) or str(error)
    versions = {}
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            versions[name] = str(importlib.import_module(name).__version__)
        except (ImportError, OSError):
            continue
    import onnxruntime

    providers = tuple(onnxruntime.get_available_providers())
    return Machine(gpu, reason, versions, providers, count, driver, shared_memory(), apart)
