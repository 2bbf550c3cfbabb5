"""What fluxrt needs of a CUDA driver, and the driver itself through cuda-bindings."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fluxrt.errors import BackendError

if TYPE_CHECKING:
    import numpy as np


class OutOfMemoryError(BackendError):
    """The GPU has not enough free memory; whatever was allocated for the request is free again."""


@dataclass(frozen=True)
class Gpu:
    """A GPU: name, compute capability ("12.0"), and the CUDA version its driver supports ("13.0")."""

    name: str
    compute_capability: str
    driver: str


class Driver(Protocol):
    """One GPU with one stream; addresses and handles are integers, sizes bytes. Everything but `memory` follows the stream."""

    gpu: Gpu
    stream: int

    def activate(self) -> None:
        """Make the GPU's context current to this thread; before anything else a thread asks."""
        ...

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes."""
        ...

    def allocate(self, nbytes: int) -> int:
        """The address of new memory, aligned to 256 bytes; OutOfMemoryError when there is not enough."""
        ...

    def free(self, address: int) -> None:
        """Give memory back."""
        ...

    def upload(self, address: int, data: np.ndarray) -> None:
        """Copy contiguous `data` to the GPU; it may be changed only after `synchronize`."""
        ...

    def download(self, address: int, data: np.ndarray) -> None:
        """Copy into contiguous `data`, which is filled after `synchronize`."""
        ...

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy within the GPU's memory."""
        ...

    def synchronize(self) -> None:
        """Wait for everything that was asked of the stream."""
        ...

    def begin_capture(self) -> None:
        """Record what the stream is asked from here on instead of doing it."""
        ...

    def end_capture(self) -> int:
        """A graph of what was recorded, ready to be launched."""
        ...

    def abandon_capture(self) -> None:
        """End a capture that failed and drop what was recorded."""
        ...

    def launch(self, graph: int) -> None:
        """Do what a graph recorded."""
        ...

    def destroy(self, graph: int) -> None:
        """Give a graph back."""
        ...

    def close(self) -> None:
        """Give stream and context back."""
        ...


class CudaDriver:
    """The GPU `number` of those that CUDA shows (CUDA_VISIBLE_DEVICES chooses them), through its primary context."""

    def __init__(self, number: int = 0) -> None:
        self._api, count = _driver_api()
        if number >= count:
            raise BackendError(
                f"rank {number} needs a GPU of its own and the driver shows {count}; check CUDA_VISIBLE_DEVICES, or choose "
                "fewer --gpus"
            )
        self._graphs: dict[int, Any] = {}
        self._device = self._call("cuDeviceGet", number)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._call("cuCtxSetCurrent", self._context)
        self._thread = threading.get_ident()
        self.gpu = self._describe()
        self._stream = self._call("cuStreamCreate", self._api.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self.stream = int(self._stream)

    def activate(self) -> None:
        if self._thread != threading.get_ident():
            self._call("cuCtxSetCurrent", self._context)
            self._thread = threading.get_ident()

    def memory(self) -> tuple[int, int]:
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def allocate(self, nbytes: int) -> int:
        return int(self._call("cuMemAlloc", nbytes))

    def free(self, address: int) -> None:
        self._call("cuMemFree", address)

    def upload(self, address: int, data: np.ndarray) -> None:
        self._call("cuMemcpyHtoDAsync", address, data.ctypes.data, data.nbytes, self._stream)

    def download(self, address: int, data: np.ndarray) -> None:
        self._call("cuMemcpyDtoHAsync", data.ctypes.data, address, data.nbytes, self._stream)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self._call("cuMemcpyDtoDAsync", target, source, nbytes, self._stream)

    def synchronize(self) -> None:
        self._call("cuStreamSynchronize", self._stream)

    def begin_capture(self) -> None:
        mode = self._api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)

    def end_capture(self) -> int:
        recorded = self._call("cuStreamEndCapture", self._stream)
        try:
            graph = self._call("cuGraphInstantiate", recorded, 0)
        finally:
            self._call("cuGraphDestroy", recorded)
        self._graphs[int(graph)] = graph
        return int(graph)

    def abandon_capture(self) -> None:
        # A capture that was invalidated ends with an error, and the stream is usable again all the same.
        result, recorded = self._api.cuStreamEndCapture(self._stream)
        if result == self._api.CUresult.CUDA_SUCCESS and int(recorded):
            self._call("cuGraphDestroy", recorded)

    def launch(self, graph: int) -> None:
        self._call("cuGraphLaunch", self._graphs[graph], self._stream)

    def destroy(self, graph: int) -> None:
        self._call("cuGraphExecDestroy", self._graphs.pop(graph))

    def close(self) -> None:
        for graph in list(self._graphs):
            self.destroy(graph)
        self._call("cuStreamDestroy", self._stream)
        self._call("cuDevicePrimaryCtxRelease", self._device)

    def _describe(self) -> Gpu:
        attribute = self._api.CUdevice_attribute
        major, minor = (
            self._call("cuDeviceGetAttribute", which, self._device)
            for which in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        name = self._call("cuDeviceGetName", 128, self._device)
        version = self._call("cuDriverGetVersion")
        text = name.rstrip(b"\0").decode() if isinstance(name, bytes) else str(name)
        return Gpu(text, f"{major}.{minor}", f"{version // 1000}.{version % 1000 // 10}")

    def _call(self, name: str, *arguments: Any) -> Any:
        """The result of a driver function; BackendError with CUDA's own name for what went wrong."""
        result, *values = getattr(self._api, name)(*arguments)
        if result == self._api.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            _, free, total = self._api.cuMemGetInfo()
            asked = f"{arguments[0] / 2**20:,.0f} MiB asked for, " if name == "cuMemAlloc" else ""
            raise OutOfMemoryError(f"{name}: {asked}{free / 2**20:,.0f} of {total / 2**20:,.0f} MiB free")
        if result != self._api.CUresult.CUDA_SUCCESS:
            _, said = self._api.cuGetErrorName(result)
            raise BackendError(f"{name} failed: {said.decode() if isinstance(said, bytes) else said}")
        return values[0] if len(values) == 1 else tuple(values) or None


def first_gpu() -> Gpu:
    """The GPU a CudaDriver would use; BackendError without one, saying what is missing."""
    driver = CudaDriver()
    try:
        return driver.gpu
    finally:
        driver.close()


def count_gpus() -> int:
    """How many GPUs CUDA shows; BackendError without any."""
    return _driver_api()[1]


def _driver_api() -> tuple[Any, int]:
    """The driver's functions, and how many GPUs it shows."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BackendError(
            f"GPU targets need cuda-bindings, which is not installed ({error}); pip install 'fluxrt[cuda]', or choose a target "
            "that runs on the CPU with --target"
        ) from error
    try:
        (result,) = driver.cuInit(0)
        count = driver.cuDeviceGetCount()[1] if result == driver.CUresult.CUDA_SUCCESS else 0
    except Exception as error:  # cuda-pathfinder raises a class of its own for a library it does not find
        raise BackendError(
            f"no NVIDIA driver (libcuda) was found on this machine ({error}); install the driver, or choose a target that runs "
            "on the CPU with --target"
        ) from error
    if not count:
        raise BackendError(
            f"the NVIDIA driver shows no GPU on this machine ({result.name}); check CUDA_VISIBLE_DEVICES and the driver, or "
            "choose a target that runs on the CPU with --target"
        )
    return driver, int(count)
