"""Fakes of the CUDA driver's and TensorRT's interfaces, for a machine without a GPU: they prove nothing about either.

Memory is real bytes at made-up addresses, and a plan "runs" as the graph it was built from, in ONNX's reference evaluator, on
whatever lies at the addresses bound to its ports. So a wrong address, a stale buffer or a missing copy gives a wrong number,
and what is done, captured and launched is recorded in order.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from fluxc.rehearsal.operators import BF16, DTYPES, E2M1, OPERATORS
from fluxrt.bundle import Bundle
from fluxrt.cuda import Gpu, OutOfMemoryError
from fluxrt.errors import BackendError
from fluxrt.group import Group
from fluxrt.manifest import Plan, Port, TensorRTTarget, WeightPort
from fluxrt.weights import size_of


def all_to_all(group: Group) -> type[OpRun]:
    """DistCollective among ranks that are threads of this process."""

    class DistCollective(OpRun):
        op_domain = "trt"

        def _run(self, x: np.ndarray, **attributes: Any) -> tuple[np.ndarray]:
            assert (attributes["collective_operation"], attributes["nb_rank"]) == ("all_to_all", group.ranks)
            return (group.all_to_all(np.ascontiguousarray(x)),)

    return DistCollective


RTX = Gpu("a made-up RTX", "12.0", "13.0")


class FakeDriver:
    """fluxrt.cuda.Driver over host memory; `capacity` limits it, `refuses_capture` makes every capture fail."""

    def __init__(self, gpu: Gpu = RTX, capacity: int = 1 << 34, refuses_capture: bool = False) -> None:
        self.gpu, self.stream, self.capacity, self.refuses_capture = gpu, 77, capacity, refuses_capture
        self.blocks: dict[int, np.ndarray] = {}
        self.graphs: dict[int, list[Any]] = {}
        self.log: list[str] = []
        self.recording: list[Any] | None = None
        self.closed = False
        self._next = 1 << 20

    def activate(self) -> None:
        self.active = True

    def memory(self) -> tuple[int, int]:
        return self.capacity - sum(len(block) for block in self.blocks.values()), self.capacity

    def allocate(self, nbytes: int) -> int:
        assert self.recording is None, "memory must not be allocated in a capture"
        if nbytes > self.memory()[0]:
            raise OutOfMemoryError("as the driver would say")
        address, self._next = self._next, self._next + -(-nbytes // 256) * 256 + 4096
        # What a GPU's fresh memory holds is anything; NaN shows whoever reads before writing.
        self.blocks[address] = np.full(nbytes, 0xFF, np.uint8)
        return address

    def free(self, address: int) -> None:
        del self.blocks[address]

    def at(self, address: int, nbytes: int) -> np.ndarray:
        """The bytes at an address, which must lie in one allocation."""
        for start, block in self.blocks.items():
            if start <= address and address + nbytes <= start + len(block):
                return block[address - start : address - start + nbytes]
        raise AssertionError(f"{nbytes} bytes at {address:#x} are not allocated")

    def upload(self, address: int, data: np.ndarray) -> None:
        assert self.recording is None, "host memory must not be read in a capture"
        assert data.flags.c_contiguous
        self.at(address, data.nbytes)[:] = data.reshape(-1).view(np.uint8)
        self.log.append(f"upload {data.nbytes}")

    def download(self, address: int, data: np.ndarray) -> None:
        assert self.recording is None
        data.reshape(-1).view(np.uint8)[:] = self.at(address, data.nbytes)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self.do("copy", lambda: np.copyto(self.at(target, nbytes), self.at(source, nbytes)))

    def synchronize(self) -> None:
        assert self.recording is None, "a stream must not be waited for in a capture"

    def begin_capture(self) -> None:
        assert self.recording is None
        self.recording = []
        self.log.append("begin capture")

    def end_capture(self) -> int:
        if self.refuses_capture:
            raise BackendError("cuStreamEndCapture failed: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
        assert self.recording is not None
        graph = len(self.log)
        self.graphs[graph], self.recording = self.recording, None
        self.log.append(f"captured {len(self.graphs[graph])}")
        return graph

    def abandon_capture(self) -> None:
        self.recording = None

    def launch(self, graph: int) -> None:
        self.log.append("launch")
        for action in self.graphs[graph]:
            action()

    def destroy(self, graph: int) -> None:
        del self.graphs[graph]

    def close(self) -> None:
        assert not self.blocks
        assert not self.graphs
        self.closed = True

    def do(self, what: str, action: Any) -> None:
        """Do it, or record it while a capture goes on."""
        if self.recording is None:
            self.log.append(what)
            action()
        else:
            self.recording.append(action)


class FakeLibrary:
    """The part of the tensorrt_rtx module that fluxrt runs with."""

    class ILogger:
        class Severity:
            ERROR = 1

    class ExecutionContextAllocationStrategy:
        USER_MANAGED = "user managed"

    class CudaGraphStrategy:
        DISABLED = "disabled"

    class DynamicShapesKernelSpecializationStrategy:
        EAGER = "eager"

    def __init__(
        self,
        bundle: Bundle,
        target: TensorRTTarget,
        driver: FakeDriver,
        version: str | None = None,
        group: Group | None = None,
        refuses_communicator: bool = False,
    ) -> None:
        self.refuses_communicator = refuses_communicator
        operators = [*OPERATORS, *([all_to_all(group)] if group else [])]
        self.__version__ = version or str(target.engine.version)
        self.driver, self.scratch = driver, 4096
        self.not_capturable: set[str] = set()
        self.plans: dict[str, tuple[str, Plan, ReferenceEvaluator]] = {}
        self.compiled: set[str] = set()
        for name, plan in target.engine.plans.items():
            model = onnx.load(bundle.path(plan.source))
            digest = bundle.manifest.files[str(plan.file)].sha256
            self.plans[digest] = (name, plan, ReferenceEvaluator(model, new_ops=operators))

    def Runtime(self, logger: Any) -> FakeLibrary:
        return self

    def deserialize_cuda_engine(self, data: bytes) -> FakeEngine:
        return FakeEngine(self, *self.plans[hashlib.sha256(data).hexdigest()])


class FakeCache:
    """A runtime cache: the names of the plans that were compiled; it takes no other bytes."""

    def __init__(self, library: FakeLibrary, name: str) -> None:
        self._library, self._name = library, name

    def serialize(self) -> bytes:
        return f"kernels of {self._name}".encode() if self._name in self._library.compiled else b""

    def deserialize(self, data: bytes) -> bool:
        if data != f"kernels of {self._name}".encode():
            return False
        self._library.compiled.add(self._name)
        return True


class FakeConfig:
    def __init__(self, library: FakeLibrary, name: str) -> None:
        self._library, self._name = library, name
        self.cuda_graph_strategy = "whole graph"
        self.dynamic_shapes_kernel_specialization_strategy = "lazy"
        self.strategy = "static"
        self.cache: FakeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> FakeCache:
        return FakeCache(self._library, self._name)

    def set_runtime_cache(self, cache: FakeCache) -> bool:
        self.cache = cache
        return True


class FakeEngine:
    def __init__(self, library: FakeLibrary, name: str, plan: Plan, evaluator: ReferenceEvaluator) -> None:
        self.library, self.name, self.plan, self.evaluator = library, name, plan, evaluator

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return self.library.scratch

    def create_runtime_config(self) -> FakeConfig:
        return FakeConfig(self.library, self.name)

    def create_execution_context(self, config: FakeConfig) -> FakeContext:
        assert (config.strategy, config.cuda_graph_strategy) == ("user managed", "disabled")
        assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
        return FakeContext(self)


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self._engine, self._driver = engine, engine.library.driver
        self._profile = 0
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._scratch = (0, 0)
        self._communicator: object = None
        plan = engine.plan
        ports: tuple[Port | WeightPort, ...] = (*plan.inputs, *plan.outputs, *plan.weights)
        self._ports = {port.name: port for port in ports}

    def set_communicator(self, capsule: object) -> bool:
        assert self._engine.plan.expected["collectives"]
        self._communicator = capsule
        return not self._engine.library.refuses_communicator

    def set_device_memory(self, address: int, nbytes: int) -> None:
        self._scratch = (address, nbytes)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == self._driver.stream
        self._profile = profile
        return profile < len(self._engine.plan.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        profile = self._engine.plan.profiles[self._profile]
        for dimension, size in zip(self._ports[name].shape, shape, strict=True):
            if isinstance(dimension, str):
                symbol, _, more = dimension.partition(" + ")
                least, _, greatest = profile[symbol]
                if not least <= size - int(more or 0) <= greatest:
                    return False
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0
        self._addresses[name] = address
        return name in self._ports

    def is_stream_capturable(self, stream: int) -> bool:
        assert self._addresses.keys() == self._ports.keys()
        return self._engine.name not in self._engine.library.not_capturable

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self._driver.stream
        assert self._addresses.keys() == self._ports.keys(), "every port must be bound"
        assert self._scratch[1] >= self._engine.library.scratch
        assert self._communicator or not self._engine.plan.expected["collectives"], "a collective needs a communicator"
        self._driver.at(*self._scratch)
        addresses, shapes = dict(self._addresses), dict(self._shapes)
        self._engine.library.compiled.add(self._engine.name)
        self._driver.do(f"run {self._engine.name}", lambda: self._run(addresses, shapes))
        return True

    def _run(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        plan = self._engine.plan
        feeds = {}
        ports: tuple[Port | WeightPort, ...] = (*plan.inputs, *plan.weights)
        for port in ports:
            shape = tuple(int(size) for size in shapes.get(port.name, port.shape))
            data = self._driver.at(addresses[port.name], size_of(port.dtype, shape)).copy()
            if port.dtype == "float4_e2m1":
                feeds[port.name] = np.stack([data & 15, data >> 4], axis=-1).reshape(shape).view(E2M1)
            else:
                feeds[port.name] = data.view(DTYPES[port.dtype]).reshape(shape)
        for output, value in zip(plan.outputs, self._engine.evaluator.run(None, feeds), strict=True):
            raw = np.ascontiguousarray(value.view(np.uint16) if value.dtype == BF16 else value)
            self._driver.at(addresses[output.name], raw.nbytes)[:] = raw.reshape(-1).view(np.uint8)
