"""Fakes of the CUDA driver's and TensorRT's interfaces, for a machine without a GPU: they prove nothing about either.

Memory is real bytes at made-up addresses, and a plan "runs" as the graph it was built from, in ONNX's reference evaluator, on
whatever lies at the addresses bound to its ports. So a wrong address, a stale buffer or a missing copy gives a wrong number,
and what is done, captured and launched is recorded in order.

They refuse what the real ones refuse or take without a word and do wrong:

- a call from a thread to which another context, or none, is current;
- memory that is allocated, waited for or copied to and from the host while a capture goes on;
- memory that is given back while work that was asked for may still use it; a graph whose memory is gone;
- nothing is done before somebody waits: an upload reads the host's memory as it is then, a download fills it then;
- working memory that is smaller than the plan at hand wants, which differs from plan to plan;
- shapes that are set while a capture goes on, and a capture before a context has run once with its shapes;
- a context that a graph holds, bound anew or captured into another one;
- a collective that some ranks launch as part of a graph and others run by itself; joining a communicator waits for all ranks.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
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

Action = Callable[[], None]
RTX = Gpu("a made-up RTX", "12.0", "13.0")


def all_to_all(group: Group, driver: FakeDriver) -> type[OpRun]:
    """DistCollective among ranks that are threads of this process."""

    class DistCollective(OpRun):
        op_domain = "trt"

        def _run(self, x: np.ndarray, **attributes: Any) -> tuple[np.ndarray]:
            assert (attributes["collective_operation"], attributes["nb_rank"]) == ("all_to_all", group.ranks)
            launched = [bool(flag[0]) for flag in group.gather(np.array([driver.launching], np.float32))]
            assert len(set(launched)) == 1, "a collective is captured on all ranks or on none"
            return (group.all_to_all(np.ascontiguousarray(x)),)

    return DistCollective


class FakeDriver:
    """fluxrt.cuda.Driver over host memory.

    `capacity` limits it, `refuses_capture` makes every capture fail, and the allocations numbered in `fails_at`, counted from 0
    over the GPU's and page-locked memory, find no room. `most` are the most bytes that were allocated on the GPU at once.
    """

    def __init__(
        self,
        gpu: Gpu = RTX,
        capacity: int = 1 << 34,
        refuses_capture: bool = False,
        fails_at: frozenset[int] = frozenset(),
    ) -> None:
        self.gpu, self.stream, self.capacity, self.refuses_capture = gpu, 77, capacity, refuses_capture
        self.fails_at, self.allocations, self.most = fails_at, 0, 0
        self.blocks: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.graphs: dict[int, list[Action]] = {}
        self.log: list[str] = []
        self.recording: list[Action] | None = None
        self.captures = 0
        self.launching = False
        self.closed = False
        self._pending: list[Action] = []
        self._launched: list[int] = []
        self._marks: dict[int, int] = {}
        self._done = 0
        self._current = {threading.get_ident()}
        self._next = 1 << 20

    def activate(self) -> None:
        self._current.add(threading.get_ident())

    @property
    def is_idle(self) -> bool:
        """Whether everything it was asked for is done."""
        return not self._pending

    def make_another_current(self) -> None:
        """What another CUDA library of this thread may do."""
        self._current.discard(threading.get_ident())

    def memory(self) -> tuple[int, int]:
        self._check_current()
        return self.capacity - sum(len(block) for block in self.blocks.values()), self.capacity

    def allocate(self, nbytes: int) -> int:
        self._check_current()
        assert self.recording is None, "memory must not be allocated in a capture"
        if nbytes > self.memory()[0] or self._fails():
            raise OutOfMemoryError("as the driver would say")
        address, self._next = self._next, self._next + -(-nbytes // 256) * 256 + 4096
        # What a GPU's fresh memory holds is anything; NaN shows whoever reads before writing.
        self.blocks[address] = np.full(nbytes, 0xFF, np.uint8)
        self.most = max(self.most, self.capacity - self.memory()[0])
        return address

    def free(self, address: int) -> None:
        self._check_current()
        assert not self._pending, "memory must not be given back before what uses it is done"
        del self.blocks[address]

    def at(self, address: int, nbytes: int) -> np.ndarray:
        """The bytes at an address, which must lie in one allocation."""
        for start, block in self.blocks.items():
            if start <= address and address + nbytes <= start + len(block):
                return block[address - start : address - start + nbytes]
        raise AssertionError(f"{nbytes} bytes at {address:#x} are not allocated")

    def pin(self, nbytes: int) -> np.ndarray:
        self._check_current()
        assert self.recording is None, "memory must not be allocated in a capture"
        if self._fails():
            raise OutOfMemoryError("as the driver would say of the host's memory")
        memory = np.full(nbytes, 0xFF, np.uint8)
        self.pinned[memory.ctypes.data] = memory
        return memory

    def unpin(self, memory: np.ndarray) -> None:
        self._check_current()
        assert not self._pending, "page-locked memory must not be given back before it is copied"
        del self.pinned[memory.ctypes.data]

    def mark(self) -> int:
        self._check_current()
        assert self.recording is None
        number = len(self.log)
        self.log.append("mark")
        self._marks[number] = self._done + len(self._pending)
        return number

    def wait(self, mark: int) -> None:
        self._check_current()
        assert self.recording is None, "an event must not be waited for in a capture"
        self._work(self._marks.pop(mark) - self._done)

    def upload(self, address: int, data: np.ndarray) -> None:
        self._check_current()
        assert self.recording is None, "host memory must not be read in a capture"
        assert data.flags.c_contiguous
        self.at(address, data.nbytes)

        def copy() -> None:
            self.at(address, data.nbytes)[:] = data.reshape(-1).view(np.uint8)

        self.do(f"upload {data.nbytes}", copy)

    def download(self, address: int, data: np.ndarray) -> None:
        self._check_current()
        assert self.recording is None, "host memory must not be written in a capture"

        def copy() -> None:
            data.reshape(-1).view(np.uint8)[:] = self.at(address, data.nbytes)

        self.do("download", copy)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self._check_current()
        self.do("copy", lambda: np.copyto(self.at(target, nbytes), self.at(source, nbytes)))

    def fill(self, address: int, nbytes: int, value: int) -> None:
        self._check_current()
        self.do("fill", lambda: self.at(address, nbytes).fill(value))

    def synchronize(self) -> None:
        self._check_current()
        assert self.recording is None, "a stream must not be waited for in a capture"
        self._work(len(self._pending))

    def begin_capture(self) -> None:
        self._check_current()
        assert self.recording is None
        self.recording = []
        self.captures += 1
        self.log.append("begin capture")

    def end_capture(self) -> int:
        self._check_current()
        if self.refuses_capture:
            raise BackendError("cuStreamEndCapture failed: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
        assert self.recording is not None
        graph = self.captures
        self.graphs[graph], self.recording = self.recording, None
        self.log.append(f"captured {len(self.graphs[graph])}")
        return graph

    def abandon_capture(self) -> None:
        self._check_current()
        self.recording = None

    def launch(self, graph: int) -> None:
        self._check_current()
        assert self.recording is None
        actions = self.graphs[graph]

        def launched() -> None:
            self.launching = True
            try:
                for action in actions:
                    action()
            finally:
                self.launching = False
                self._launched.remove(graph)

        self._launched.append(graph)

        self.do("launch", launched)

    def destroy(self, graph: int) -> None:
        self._check_current()
        assert graph not in self._launched, "a graph must not be given back before it is done"
        del self.graphs[graph]

    def close(self) -> None:
        self._check_current()
        assert not self._pending
        assert not self.blocks
        assert not self.pinned
        assert not self.graphs
        assert not self._marks
        self.closed = True

    def do(self, what: str, action: Action) -> None:
        """Do it when somebody waits, or record it while a capture goes on."""
        if self.recording is None:
            self.log.append(what)
            self._pending.append(action)
        else:
            self.recording.append(action)

    def _work(self, count: int) -> None:
        for _ in range(count):
            action = self._pending.pop(0)
            self._done += 1
            action()

    def _fails(self) -> bool:
        self.allocations += 1
        return self.allocations - 1 in self.fails_at

    def _check_current(self) -> None:
        assert threading.get_ident() in self._current, "CUDA_ERROR_INVALID_CONTEXT: another context is current"


class FakeLibrary:
    """The part of the tensorrt_rtx module that fluxrt runs with.

    `scratch` is the working memory each plan wants, `not_capturable` are plans that must not be captured, and `late_addresses`
    makes launches read a context's addresses as they are then, as a context would that copies them when it runs.
    """

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
        operators = [*OPERATORS, *([all_to_all(group, driver)] if group else [])]
        self.__version__ = version or str(target.engine.version)
        self.driver, self.group = driver, group
        self.not_capturable: set[str] = set()
        self.late_addresses = False
        self.plans: dict[str, tuple[str, Plan, ReferenceEvaluator]] = {}
        self.compiled: set[str] = set()
        self.found: set[str] = set()
        # The VAE's is the largest by far in truth too.
        self.scratch = {name: 4096 * (64 if "vae" in name else 1 + n) for n, name in enumerate(target.engine.plans)}
        for name, plan in target.engine.plans.items():
            model = onnx.load(bundle.path(plan.source))
            digest = bundle.manifest.files[str(plan.file)].sha256
            self.plans[digest] = (name, plan, ReferenceEvaluator(model, new_ops=operators))

    def Runtime(self, logger: Any) -> FakeLibrary:
        return self

    def deserialize_cuda_engine(self, data: bytes) -> FakeEngine:
        return FakeEngine(self, *self.plans[hashlib.sha256(data).hexdigest()])


class FakeCache:
    """A runtime cache: the name of its plan once it was compiled or found; it takes no other bytes."""

    def __init__(self, library: FakeLibrary, name: str) -> None:
        self._library, self._name = library, name

    def serialize(self) -> bytes:
        known = self._library.compiled | self._library.found
        return f"kernels of {self._name}".encode() if self._name in known else b""

    def deserialize(self, data: bytes) -> bool:
        if data != f"kernels of {self._name}".encode():
            return False
        self._library.found.add(self._name)
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
        return self.library.scratch[self.name]

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
        self._capture, self._has_run = 0, False
        plan = engine.plan
        ports: tuple[Port | WeightPort, ...] = (*plan.inputs, *plan.outputs, *plan.weights)
        self._ports = {port.name: port for port in ports}

    def set_communicator(self, capsule: object) -> bool:
        assert self._engine.plan.expected["collectives"]
        library = self._engine.library
        assert library.group
        library.group.gather(np.zeros(1, np.float32))
        self._communicator = capsule
        return not library.refuses_communicator

    def set_device_memory(self, address: int, nbytes: int) -> None:
        self._check_free()
        self._scratch = (address, nbytes)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == self._driver.stream
        assert self._driver.recording is None, "a profile must not be set in a capture"
        self._profile = profile
        return profile < len(self._engine.plan.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._driver.recording is None, "shapes must not be set in a capture"
        self._check_free()
        profile = self._engine.plan.profiles[self._profile]
        for dimension, size in zip(self._ports[name].shape, shape, strict=True):
            if isinstance(dimension, str):
                symbol, _, more = dimension.partition(" + ")
                least, _, greatest = profile[symbol]
                if not least <= size - int(more or 0) <= greatest:
                    return False
        if self._shapes.get(name) != shape:
            self._has_run = False
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0
        self._check_free()
        self._addresses[name] = address
        return name in self._ports

    def is_stream_capturable(self, stream: int) -> bool:
        assert self._addresses.keys() == self._ports.keys()
        return self._engine.name not in self._engine.library.not_capturable

    def execute_async_v3(self, stream: int) -> bool:
        library, driver = self._engine.library, self._driver
        assert stream == driver.stream
        assert self._addresses.keys() == self._ports.keys(), "every port must be bound"
        assert self._scratch[1] >= library.scratch[self._engine.name], "the working memory is too small for this plan"
        assert self._communicator or not self._engine.plan.expected["collectives"], "a collective needs a communicator"
        driver.at(*self._scratch)
        self._check_free()
        if driver.recording is None:
            self._has_run = True
        else:
            assert self._has_run, "a context must run once with its shapes before it is captured"
            self._capture = driver.captures
        late = library.late_addresses and driver.recording is not None
        addresses = self._addresses if late else dict(self._addresses)
        shapes, scratch = dict(self._shapes), self._scratch
        library.compiled.add(self._engine.name)
        driver.do(f"run {self._engine.name}", lambda: self._run(addresses, shapes, scratch))
        return True

    def _check_free(self) -> None:
        """Refuse to change a context from which a graph was captured that is still there."""
        graphs = self._driver.graphs
        assert self._capture not in graphs, f"a graph holds this context of {self._engine.name}"

    def _run(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]], scratch: tuple[int, int]) -> None:
        plan = self._engine.plan
        self._driver.at(*scratch)
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
