"""Runs one TensorRT plan on values that are made up, as often as it takes to know how long it takes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxc.base.numbers import significant
from fluxrt.backends.buffers import Sizes, profile_for, resolve
from fluxrt.backends.library import make_logger
from fluxrt.errors import BackendError
from fluxrt.weights import size_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from fluxrt.cuda import Driver
    from fluxrt.manifest import Plan

MADE_UP = {
    "bfloat16": (0x3C00, 0x3D00, np.uint16),
    "float16": (0x2000, 0x2400, np.uint16),
    "float8_e4m3fn": (0x30, 0x40, np.uint8),
    "float4_e2m1": (0, 256, np.uint8),
    "bool": (1, 2, np.uint8),
    "int64": (1, 2, np.int64),
}
"""By dtype the range of bit patterns that values are drawn from: around 0.01 to 1, and every code of E2M1; fp32 is 0.01."""
COPY_BYTES = 64 << 20


class PlanRunner:
    """A plan on the GPU, bound to memory of its own; close it. BackendError with TensorRT's words for what it refuses."""

    def __init__(self, driver: Driver, library: Any, name: str, plan: Plan, data: bytes, sizes: Sizes) -> None:
        self._driver, self._trt, self._name = driver, library, name
        self._memory: list[int] = []
        self._graph: int | None = None
        self._logger = make_logger(library)
        self._runtime = library.Runtime(self._logger)
        driver.activate()
        self._engine = self._runtime.deserialize_cuda_engine(data)
        self._expect(self._engine is not None, f"to load it on {driver.gpu.name}")
        self._profile = profile_for(name, plan, sizes) if plan.profiles else None
        wanted = int(self._engine.get_device_memory_size_for_profile_v2(self._profile or 0))
        self._scratch = (self._allocate(wanted), wanted)
        rng = np.random.default_rng(0)
        inputs = {port.name: resolve(port.shape, sizes) for port in plan.inputs}
        self._shapes = inputs if plan.profiles else {}
        self._addresses = {}
        for port in plan.inputs:
            self._addresses[port.name] = self._filled(rng, port.dtype, size_of(port.dtype, inputs[port.name]))
        for weight in plan.weights:
            self._addresses[weight.name] = self._filled(rng, weight.dtype, size_of(weight.dtype, weight.shape))
        for port in plan.outputs:
            self._addresses[port.name] = self._allocate(size_of(port.dtype, resolve(port.shape, sizes)))
        self._contexts = {"eager": self._ready_context()}

    def enqueue(self) -> None:
        """Ask for one run."""
        self._run(self._contexts["eager"])

    def capture(self) -> str | None:
        """Capture one run as a CUDA graph, which `launch` launches; why TensorRT does not let it be, else None."""
        context = self._contexts["captured"] = self._ready_context()
        if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(self._driver.stream):
            return f"TensorRT says that {self._name} cannot be captured"
        self._driver.begin_capture()
        try:
            self._run(context)
            self._graph = self._driver.end_capture()
        except (BackendError, RuntimeError) as error:
            self._driver.abandon_capture()
            return str(error)
        return None

    def launch(self) -> None:
        """Launch what was captured."""
        assert self._graph is not None
        self._driver.launch(self._graph)

    def kernels(self) -> dict[str, float]:
        """Milliseconds of one run by kernel, as the library's profiler says; empty where it has none or says nothing."""
        if not hasattr(self._trt, "IProfiler"):
            return {}
        base: Any = self._trt.IProfiler

        class Profiler(base):
            def __init__(self) -> None:
                base.__init__(self)
                self.found: dict[str, float] = {}

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                self.found[layer_name] = self.found.get(layer_name, 0.0) + ms

        context = self._contexts["profiled"] = self._ready_context()
        profiler = context.profiler = Profiler()
        self._run(context)
        self._driver.synchronize()
        return dict(profiler.found)

    def close(self) -> None:
        """Give back the graph, the contexts and the memory."""
        self._driver.synchronize()
        if self._graph is not None:
            self._driver.destroy(self._graph)
        self._contexts.clear()
        self._engine = self._runtime = None
        for address in self._memory:
            self._driver.free(address)

    def _ready_context(self) -> Any:
        """A context of its own for each use, bound, that has run once: TensorRT-RTX compiles kernels then."""
        context = self._make_context()
        self._expect(context is not None, "an execution context")
        if self._profile is not None:
            chosen = context.set_optimization_profile_async(self._profile, self._driver.stream)
            self._expect(chosen, f"optimization profile {self._profile}")
        context.set_device_memory(*self._scratch)
        for port, shape in self._shapes.items():
            self._expect(context.set_input_shape(port, shape), f"{port} as {list(shape)}")
        for port, address in self._addresses.items():
            self._expect(context.set_tensor_address(port, address), f"an address of {port}")
        self._run(context)
        self._driver.synchronize()
        return context

    def _make_context(self) -> Any:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not (hasattr(self._engine, "create_runtime_config") and hasattr(self._trt, "CudaGraphStrategy")):
            return self._engine.create_execution_context(strategy)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.DISABLED
        eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = eager
        return self._engine.create_execution_context(config)

    def _run(self, context: Any) -> None:
        self._expect(context.execute_async_v3(self._driver.stream), "to run")

    def _filled(self, rng: np.random.Generator, dtype: str, nbytes: int) -> int:
        data = _values(rng, dtype, nbytes)
        address = self._allocate(data.nbytes)
        self._driver.upload(address, data)
        self._driver.synchronize()
        return address

    def _allocate(self, nbytes: int) -> int:
        self._memory.append(self._driver.allocate(max(nbytes, 256)))
        return self._memory[-1]

    def _expect(self, done: bool, what: str) -> None:
        if not done:
            raise BackendError(f"plan {self._name}: TensorRT refused {what}: {self._logger.told()}")


@contextlib.contextmanager
def running(*arguments: Any) -> Iterator[PlanRunner]:
    """A PlanRunner that is closed afterwards."""
    runner = PlanRunner(*arguments)
    try:
        yield runner
    finally:
        runner.close()


def timed(driver: Driver, runner: PlanRunner, runs: int) -> dict[str, Any]:
    """Milliseconds of a run, from the time of `runs` that follow one another: each call by itself, and as a CUDA graph."""
    figures: dict[str, Any] = {"eager_ms": _mean_ms(driver, runner.enqueue, runs)}
    refused = runner.capture()
    if refused:
        return figures | {"graph_ms": None, "not_captured": refused}
    return figures | {"graph_ms": _mean_ms(driver, runner.launch, runs)}


def copy_rate(driver: Driver, runs: int, nbytes: int = COPY_BYTES) -> float:
    """Bytes a second that a copy within the GPU's memory moves (each is read once and written once)."""
    driver.activate()
    source, target = driver.allocate(nbytes), driver.allocate(nbytes)
    try:
        took = _mean_ms(driver, lambda: driver.copy(target, source, nbytes), runs)
    finally:
        driver.synchronize()
        driver.free(source)
        driver.free(target)
    return significant(nbytes / (took / 1e3))


def _mean_ms(driver: Driver, work: Callable[[], None], runs: int) -> float:
    work()
    driver.synchronize()
    began = time.perf_counter()
    for _ in range(runs):
        work()
    driver.synchronize()
    return significant(1e3 * (time.perf_counter() - began) / runs)


def _values(rng: np.random.Generator, dtype: str, nbytes: int) -> np.ndarray:
    if dtype not in MADE_UP:
        return np.full(nbytes // 4, 0.01, np.float32)
    low, high, stored = MADE_UP[dtype]
    return rng.integers(low, high, nbytes // np.dtype(stored).itemsize, dtype=stored)
