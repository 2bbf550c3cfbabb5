"""CudaDriver's calls, on a rendering of the driver API that keeps its rules: what needs a current context, and in which thread.

Nothing here ran on a GPU.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fluxrt.cuda import CudaDriver, Gpu, OutOfMemoryError, count_gpus, first_gpu
from fluxrt.errors import BackendError

OK, NO_MEMORY, NO_CONTEXT, BAD_HANDLE = (
    SimpleNamespace(name=name)
    for name in ("CUDA_SUCCESS", "CUDA_ERROR_OUT_OF_MEMORY", "CUDA_ERROR_INVALID_CONTEXT", "CUDA_ERROR_INVALID_HANDLE")
)
WITHOUT_CONTEXT = {
    "cuInit",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDriverGetVersion",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease",
    "cuCtxSetCurrent",
    "cuGetErrorName",
}


class Api(ModuleType):
    """cuda.bindings.driver: handles are small numbers, memory the process's own, a thread has no context until one is set."""

    CUresult = SimpleNamespace(
        CUDA_SUCCESS=OK,
        CUDA_ERROR_OUT_OF_MEMORY=NO_MEMORY,
        CUDA_ERROR_INVALID_CONTEXT=NO_CONTEXT,
        CUDA_ERROR_INVALID_HANDLE=BAD_HANDLE,
    )
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major", CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor"
    )
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.calls: list[str] = []
        self.contexts = 0
        self.free_memory = 1 << 20
        self._current = threading.local()
        self._events: set[int] = set()
        self._memory: dict[int, Any] = {}

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("cu"):
            return found

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if name not in WITHOUT_CONTEXT and getattr(self._current, "context", None) != "primary":
                return (NO_CONTEXT, None)
            result: tuple[Any, ...] = found(*arguments)
            return result

        return call

    def make_current(self, context: object) -> None:
        self._current.context = context

    def cuInit(self, flags: int) -> tuple[Any, ...]:
        return (OK,)

    def cuDeviceGetCount(self) -> tuple[Any, ...]:
        return OK, 1

    def cuDeviceGet(self, number: int) -> tuple[Any, ...]:
        return OK, f"device {number}"

    def cuDeviceGetName(self, length: int, device: str) -> tuple[Any, ...]:
        return OK, b"a GPU\0left over".ljust(length, b"\0")

    def cuDeviceGetAttribute(self, which: str, device: str) -> tuple[Any, ...]:
        return OK, {"major": 12, "minor": 1}[which]

    def cuDriverGetVersion(self) -> tuple[Any, ...]:
        return OK, 13020

    def cuDevicePrimaryCtxRetain(self, device: str) -> tuple[Any, ...]:
        self.contexts += 1
        return OK, "primary"

    def cuDevicePrimaryCtxRelease(self, device: str) -> tuple[Any, ...]:
        self.contexts -= 1
        return (OK,)

    def cuCtxSetCurrent(self, context: str) -> tuple[Any, ...]:
        self.make_current(context)
        return (OK,)

    def cuGetErrorName(self, result: Any) -> tuple[Any, ...]:
        return OK, result.name.encode()

    def cuStreamCreate(self, flags: int) -> tuple[Any, ...]:
        return OK, 7

    def cuStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        return (OK,)

    def cuStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        return (OK,)

    def cuMemGetInfo(self) -> tuple[Any, ...]:
        return OK, self.free_memory, 1 << 21

    def cuMemAlloc(self, nbytes: int) -> tuple[Any, ...]:
        if nbytes > self.free_memory:
            return NO_MEMORY, None
        memory = ctypes.create_string_buffer(nbytes)
        self._memory[ctypes.addressof(memory)] = memory
        return OK, ctypes.addressof(memory)

    cuMemAllocHost = cuMemAlloc

    def cuMemFree(self, address: int) -> tuple[Any, ...]:
        del self._memory[address]
        return (OK,)

    cuMemFreeHost = cuMemFree

    def cuMemcpyHtoDAsync(self, target: int, source: int, nbytes: int, stream: int) -> tuple[Any, ...]:
        ctypes.memmove(target, source, nbytes)
        return (OK,)

    def cuMemcpyDtoHAsync(self, target: int, source: int, nbytes: int, stream: int) -> tuple[Any, ...]:
        return self.cuMemcpyHtoDAsync(target, source, nbytes, stream)[:1]

    def cuMemsetD8Async(self, address: int, value: int, nbytes: int, stream: int) -> tuple[Any, ...]:
        ctypes.memset(address, value, nbytes)
        return (OK,)

    def cuEventCreate(self, flags: int) -> tuple[Any, ...]:
        self._events.add(len(self.calls))
        return OK, len(self.calls)

    def cuEventRecord(self, event: int, stream: int) -> tuple[Any, ...]:
        return (OK if event in self._events else BAD_HANDLE,)

    def cuEventSynchronize(self, event: int) -> tuple[Any, ...]:
        return (OK if event in self._events else BAD_HANDLE,)

    def cuEventDestroy(self, event: int) -> tuple[Any, ...]:
        self._events.remove(event)
        return (OK,)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    made = Api()
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=made))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", made)
    return made


def test_describing_a_gpu_takes_no_context_on_it(api: Api) -> None:
    assert first_gpu() == Gpu("a GPU", "12.1", "13.2")
    assert count_gpus() == 1
    assert api.contexts == 0
    assert set(api.calls) <= WITHOUT_CONTEXT


def test_the_context_is_made_current_whatever_another_library_did(api: Api) -> None:
    driver = CudaDriver()
    address = driver.allocate(16)
    api.make_current("another library's")
    with pytest.raises(BackendError, match="cuMemAlloc failed: CUDA_ERROR_INVALID_CONTEXT"):
        driver.allocate(16)
    driver.activate()
    driver.free(address)
    errors: list[BaseException] = []

    def in_a_thread() -> None:
        try:
            driver.activate()
            driver.free(driver.allocate(16))
            driver.close()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert errors == []
    assert api.contexts == 0


def test_page_locked_memory_marks_and_copies(api: Api) -> None:
    driver = CudaDriver()
    memory, address = driver.pin(64), driver.allocate(64)
    memory[:] = np.arange(64)
    driver.upload(address, memory)
    mark = driver.mark()
    driver.wait(mark)
    with pytest.raises(KeyError):
        driver.wait(mark)
    driver.fill(address, 4, 0xFF)
    back = np.empty(64, np.uint8)
    driver.download(address, back)
    driver.synchronize()
    np.testing.assert_array_equal(back, [255, 255, 255, 255, *range(4, 64)])
    driver.unpin(memory)
    driver.free(address)
    driver.mark()
    driver.close()
    assert api._memory == {}
    assert api._events == set()


def test_no_room_names_what_was_asked_for_and_what_there_is(api: Api) -> None:
    driver = CudaDriver()
    with pytest.raises(OutOfMemoryError, match=r"^cuMemAlloc: 8 MiB asked for, 1 of 2 MiB free$"):
        driver.allocate(8 << 20)
    with pytest.raises(OutOfMemoryError, match=r"^cuMemAllocHost: 8 MiB of the host's memory asked for$"):
        driver.pin(8 << 20)


def test_a_rank_without_a_gpu_is_told(api: Api) -> None:
    with pytest.raises(BackendError, match=r"rank 1 needs a GPU of its own and the driver shows 1"):
        CudaDriver(1)
