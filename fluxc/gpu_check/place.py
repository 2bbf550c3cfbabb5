"""Where checks run: this machine's GPUs through the driver, or whatever stands in for them in a rehearsal."""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fluxrt.errors import BackendError

if TYPE_CHECKING:
    from fluxc.targets.tensorrt.audit import Expected
    from fluxc.targets.tensorrt.builder import PlanRequest
    from fluxc.targets.tensorrt.library import Library
    from fluxrt.backends import Backend
    from fluxrt.bundle import Bundle
    from fluxrt.cuda import Driver
    from fluxrt.machine import Machine
    from fluxrt.manifest import Target
    from fluxrt.ranked import RankedPipeline


class Place(Protocol):
    """What a check needs of the place it runs at; it goes to a child process, so it can be pickled."""

    @property
    def is_rehearsal(self) -> bool: ...

    def describe(self) -> dict[str, Any]:
        """The GPUs in order, `peers` [from][to] that can read each other's memory, the `driver` and the `cuda` version it has.

        Of each GPU: name, compute_capability, memory_bytes, and an `id` made from its UUID. BackendError without a GPU."""
        ...

    def machine(self, bundle: Bundle) -> Machine:
        """What the targets of `bundle` are held against."""
        ...

    def driver(self) -> Driver:
        """The first GPU."""
        ...

    def library(self, bundle: Bundle, target: Target, driver: Driver) -> Any:
        """The TensorRT module that runs `target`."""
        ...

    def backend(self, bundle: Bundle, target: Target, driver: Driver, captures: bool) -> Backend:
        """The backend of a target for one GPU; `captures` is for kinds that capture steps."""
        ...

    def build(self, request: PlanRequest, expected: Expected, path: Path) -> dict[str, Any]:
        """Build a plan of a block for this GPU into the file `path`; what the audit found in it."""
        ...

    def ranked(self, bundle: Bundle, target: Target) -> RankedPipeline | None:
        """The ranks of a sharded target, started; None where nothing here can stand in for them."""
        ...


@dataclass(frozen=True)
class GpuPlace:
    """The GPUs of this machine."""

    is_rehearsal: bool = False

    def describe(self) -> dict[str, Any]:
        from fluxrt.cuda import count_gpus, first_gpu
        from fluxrt.system import installed_driver, old_driver

        version = installed_driver()
        if old := old_driver(version):
            raise BackendError(old)
        count, first = count_gpus(), first_gpu()
        from cuda.bindings import driver

        def call(name: str, *arguments: Any) -> Any:
            result, *values = getattr(driver, name)(*arguments)
            if result != driver.CUresult.CUDA_SUCCESS:
                raise BackendError(f"{name} failed: {result.name}; check the driver with nvidia-smi")
            return values[0]

        which = driver.CUdevice_attribute
        capability = (
            which.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            which.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
        devices = [call("cuDeviceGet", number) for number in range(count)]
        gpus = []
        for device in devices:
            name = call("cuDeviceGetName", 128, device)
            gpus.append(
                {
                    "name": name.split(b"\0")[0].decode() if isinstance(name, bytes) else str(name),
                    "compute_capability": ".".join(str(call("cuDeviceGetAttribute", c, device)) for c in capability),
                    "memory_bytes": int(call("cuDeviceTotalMem", device)),
                    "id": hashlib.sha256(bytes(call("cuDeviceGetUuid", device).bytes)).hexdigest()[:12],
                }
            )
        peers = [
            [one == other or bool(call("cuDeviceCanAccessPeer", one, other)) for other in devices] for one in devices
        ]
        return {"gpus": gpus, "peers": peers, "driver": version or "unknown", "cuda": first.driver}

    def machine(self, bundle: Bundle) -> Machine:
        from fluxrt.machine import this_machine

        return this_machine()

    def driver(self) -> Driver:
        from fluxrt.cuda import CudaDriver

        return CudaDriver(0)

    def library(self, bundle: Bundle, target: Target, driver: Driver) -> Any:
        return importlib.import_module(target.kind)

    def backend(self, bundle: Bundle, target: Target, driver: Driver, captures: bool) -> Backend:
        from fluxrt.backends.registry import make_backend
        from fluxrt.backends.tensorrt import TensorRTBackend
        from fluxrt.manifest import TensorRTTarget

        if isinstance(target, TensorRTTarget):
            return TensorRTBackend(bundle, target, driver, captures=captures)
        return make_backend(bundle, target, None)

    def build(self, request: PlanRequest, expected: Expected, path: Path) -> dict[str, Any]:
        from fluxc.targets.tensorrt.build import build_audited

        library = builder_for(request.compute_capabilities[0])
        assert library is not None
        return build_audited(importlib.import_module(library.kind), request, expected, path).as_json()

    def ranked(self, bundle: Bundle, target: Target) -> RankedPipeline | None:
        from fluxrt.ranked import RankedPipeline

        return RankedPipeline(bundle, target)


def builder_for(capability: str) -> Library | None:
    """The TensorRT library that builds for a GPU of `capability` and is installed here, else None."""
    from fluxc.targets.tensorrt.library import LIBRARIES, installed_version

    able = [library for library in LIBRARIES.values() if capability in library.compute_capabilities]
    return next((library for library in able if installed_version(library.kind)), None)
