"""What fluxrt needs of a CUDA driver, and the driver itself through cuda-bindings."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fluxrt.errors import BackendError
from fluxrt.install import install_extra
from fluxrt.system import has_nvidia_gpu

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
        """Make the GPU's context current to this thread, whatever else was; before anything else a thread asks."""
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

    def fill(self, address: int, nbytes: int, value: int) -> None:
        """Set every byte to `value`."""
        ...

    def pin(self, nbytes: int) -> np.ndarray:
        """Host memory, uint8 [nbytes], that the GPU copies from by itself; OutOfMemoryError when there is not enough."""
        ...

    def unpin(self, memory: np.ndarray) -> None:
        """Give what `pin` gave back; nothing may be copied from it any more."""
        ...

    def mark(self) -> int:
        """A mark in the stream, which is reached when everything asked before it is done."""
        ...

    def wait(self, mark: int) -> None:
        """Wait until a mark is reached, and drop it."""
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
        self._marks: dict[int, Any] = {}
        self._device = self._call("cuDeviceGet", number)
        self.gpu = _describe(self._api, self._device)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self.activate()
        self._stream = self._call("cuStreamCreate", self._api.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self.stream = int(self._stream)

    def activate(self) -> None:
        # Every time: another library of this thread may have made another context current.
        self._call("cuCtxSetCurrent", self._context)

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

    def fill(self, address: int, nbytes: int, value: int) -> None:
        self._call("cuMemsetD8Async", address, value, nbytes, self._stream)

    def pin(self, nbytes: int) -> np.ndarray:
        import numpy as np

        address = int(self._call("cuMemAllocHost", nbytes))
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    def unpin(self, memory: np.ndarray) -> None:
        self._call("cuMemFreeHost", memory.ctypes.data)

    def mark(self) -> int:
        event = self._call("cuEventCreate", self._api.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        self._marks[int(event)] = event
        self._call("cuEventRecord", event, self._stream)
        return int(event)

    def wait(self, mark: int) -> None:
        self._call("cuEventSynchronize", self._marks[mark])
        self._call("cuEventDestroy", self._marks.pop(mark))

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
        for mark in list(self._marks):
            self.wait(mark)
        self._call("cuStreamDestroy", self._stream)
        self._call("cuDevicePrimaryCtxRelease", self._device)

    def _call(self, name: str, *arguments: Any) -> Any:
        return _call(self._api, name, *arguments)


def first_gpu() -> Gpu:
    """The GPU a CudaDriver would use; BackendError without one, saying what is missing. It takes no memory there."""
    api, _ = _driver_api()
    return _describe(api, _call(api, "cuDeviceGet", 0))


def free_memory() -> int:
    """Bytes that are free on the GPU a CudaDriver would use; BackendError without one."""
    driver = CudaDriver()
    try:
        return driver.memory()[0]
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
        if not has_nvidia_gpu():
            raise BackendError(
                "no NVIDIA GPU was found on this machine (neither a driver nor a device); choose a target that runs on the CPU "
                "with --target"
            ) from error
        raise BackendError(
            f"GPU targets need cuda-bindings, which is not installed ({error}); run `{install_extra('fluxrt', 'cuda')}`, or "
            "choose a target that runs on the CPU with --target"
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


def _describe(api: Any, device: Any) -> Gpu:
    attribute = api.CUdevice_attribute
    major, minor = (
        _call(api, "cuDeviceGetAttribute", which, device)
        for which in (
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    name = _call(api, "cuDeviceGetName", 128, device)
    version = _call(api, "cuDriverGetVersion")
    text = name.split(b"\0")[0].decode() if isinstance(name, bytes) else str(name)
    return Gpu(text, f"{major}.{minor}", f"{version // 1000}.{version % 1000 // 10}")


def _call(api: Any, name: str, *arguments: Any) -> Any:
    """The result of a driver function; BackendError with CUDA's own name for what went wrong."""
    result, *values = getattr(api, name)(*arguments)
    if result == api.CUresult.CUDA_ERROR_OUT_OF_MEMORY and name == "cuMemAllocHost":
        raise OutOfMemoryError(f"{name}: {arguments[0] / 2**20:,.0f} MiB of the host's memory asked for")
    if result == api.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        _, free, total = api.cuMemGetInfo()
        asked = f"{arguments[0] / 2**20:,.0f} MiB asked for, " if name == "cuMemAlloc" else ""
        raise OutOfMemoryError(f"{name}: {asked}{free / 2**20:,.0f} of {total / 2**20:,.0f} MiB free")
    if result != api.CUresult.CUDA_SUCCESS:
        _, said = api.cuGetErrorName(result)
        raise BackendError(f"{name} failed: {said.decode() if isinstance(said, bytes) else said}")
    return values[0] if len(values) == 1 else tuple(values) or None
