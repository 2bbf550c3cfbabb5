"""Runs TensorRT and TensorRT-RTX engines: weights go to the GPU once, a step becomes one CUDA graph.

1. Everything that can be wrong with library, GPU and bundle is checked before anything is loaded.
2. A plan is read only after its SHA-256 matched.
3. Buffers keep their addresses for as long as the sizes stay the same, so what was captured stays valid.
4. A sequence of graphs runs eagerly the first time (TensorRT-RTX compiles kernels then), is captured the second time, and is
   launched from then on. What the host puts goes before the launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fluxrt.backends.buffers import (
    ALIGNMENT,
    Arena,
    Buffer,
    Sizes,
    buffer_of,
    check_sizes,
    plan_arena,
    plan_buffers,
    profile_for,
    resolve,
)
from fluxrt.backends.kernel_cache import KernelCaches
from fluxrt.backends.library import check_finished, check_gpu, check_version, load_library, make_logger
from fluxrt.backends.nccl import Communicator
from fluxrt.backends.numbers import from_bf16, to_bf16
from fluxrt.cuda import CudaDriver, Driver, OutOfMemoryError
from fluxrt.errors import BackendError, RequestError
from fluxrt.weights import component_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from fluxrt.bundle import Bundle
    from fluxrt.group import Group
    from fluxrt.manifest import Program, TensorRTTarget

UPLOAD_BYTES = 64 << 20


@dataclass
class _Loaded:
    """A program on the GPU: where its weights lie."""

    arena: Arena
    address: int


@dataclass
class _Sequence:
    """How often a sequence of graphs was run, and its CUDA graph once it was captured."""

    runs: int = 0
    graph: int | None = None
    refused: bool = False


class TensorRTBackend:
    """One target of a bundle on one GPU. `notes` says what did not go as it should and was worked around."""

    def __init__(
        self,
        bundle: Bundle,
        target: TensorRTTarget,
        driver: Driver | None = None,
        library: Any | None = None,
        group: Group | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        self._bundle, self._target, self._engine = bundle, target, target.engine
        check_finished(bundle, target)
        self._trt = load_library(target.engine) if library is None else library
        check_version(bundle, target, str(self._trt.__version__))
        self._driver: Driver = CudaDriver(group.rank if group else 0) if driver is None else driver
        check_gpu(bundle, target, self._driver.gpu)
        if group and communicator is None:
            communicator = Communicator(group)
        self._communicator = communicator
        self.notes: list[str] = []
        self._logger = make_logger(self._trt)
        self._runtime = self._trt.Runtime(self._logger)
        self._engines: dict[str, Any] = {}
        self._contexts: dict[tuple[str, int], Any] = {}
        self._caches = KernelCaches(self._driver.gpu, str(self._trt.__version__), self.notes)
        self._programs: dict[str, _Loaded] = {}
        self._sequences: dict[tuple[tuple[str, ...], tuple[tuple[str, str], ...]], _Sequence] = {}
        self._sizes: Sizes | None = None
        self._buffers: dict[str, Buffer] = {}
        self._addresses: dict[str, int] = {}
        self._memory: list[int] = []
        self._buffer_memory = 0
        self._scratch = (0, 0)
        self._alive: list[Any] = []
        self._written: set[str] = set()

    def prepare(self, sizes: dict[str, int]) -> None:
        """Allocate every buffer for these sizes; those of other sizes, and what was captured on them, are given back."""
        self._driver.activate()
        if sizes == self._sizes:
            return
        check_sizes(self._engine, sizes)
        buffers = plan_buffers(self._engine, sizes)
        self._forget()
        offsets, end = {}, 0
        for name, buffer in buffers.items():
            offsets[name] = end
            end += -(-max(buffer.nbytes, 1) // ALIGNMENT) * ALIGNMENT
        self._buffer_memory = self._allocate(end, f"the buffers of {sizes['tokens']} image tokens")
        self._buffers, self._sizes = buffers, dict(sizes)
        self._addresses = {name: self._buffer_memory + offset for name, offset in offsets.items()}

    def put(self, name: str, array: np.ndarray) -> None:
        """Copy `array` into a buffer; fp32 given for bf16 is rounded to nearest even."""
        import numpy as np

        self._driver.activate()
        buffer = self._buffer(name)
        if tuple(array.shape) != buffer.shape:
            raise RequestError(
                f"{name} has shape {list(array.shape)}, the plans were compiled for {list(buffer.shape)}; "
                "ask for what the bundle was built for, or rebuild it"
            )
        data = np.ascontiguousarray(_to_device(array, buffer.dtype))
        self._alive.append(data)
        self._driver.upload(self._addresses[name], data)
        self._written.add(name)

    def get(self, name: str) -> np.ndarray:
        """A buffer's content, bf16 as fp32."""
        import numpy as np

        self._driver.activate()
        buffer = self._buffer(name)
        if name not in self._written:
            raise BackendError(f"nothing has produced {name!r}")
        data = np.empty(buffer.nbytes, np.uint8)
        self._driver.download(self._addresses[name], data)
        self._driver.synchronize()
        self._alive.clear()
        return _from_device(data, buffer)

    def run(self, graphs: tuple[str, ...], feedback: Mapping[str, str] | None = None) -> None:
        """Run programs in order on the buffers; see Backend.run."""
        self._driver.activate()
        moves = tuple((feedback or {}).items())
        for graph in graphs:
            self._load(graph)
        self._check_written(graphs)
        sequence = self._sequences.setdefault((graphs, moves), _Sequence())
        if sequence.graph is not None:
            self._driver.launch(sequence.graph)
        elif sequence.runs == 0 or sequence.refused:
            self._enqueue(graphs, moves)
            if sequence.runs == 0:
                self._driver.synchronize()
                self._alive.clear()
                self._caches.save()
        else:
            self._capture(sequence, graphs, moves)
        sequence.runs += 1

    def outputs(self, graph: str) -> tuple[str, ...]:
        """The buffers the program `graph` leaves its results in."""
        return self._program(graph).outputs

    def close(self) -> None:
        """Give back graphs, contexts, engines, weights and buffers, and the GPU itself."""
        self._driver.activate()
        self._release()
        if self._communicator:
            self._communicator.close()
        self._driver.close()

    def _capture(self, sequence: _Sequence, graphs: tuple[str, ...], moves: tuple[tuple[str, str], ...]) -> None:
        refusing = self._not_capturable(graphs)
        if refusing:
            self._refuse_capture(sequence, graphs, f"TensorRT says that {', '.join(refusing)} cannot be")
            self._enqueue(graphs, moves)
            return
        self._driver.begin_capture()
        try:
            self._enqueue(graphs, moves)
            sequence.graph = self._driver.end_capture()
        except OutOfMemoryError as error:
            self._driver.abandon_capture()
            raise self._out_of_memory(f"a CUDA graph of {', '.join(graphs)}", error) from error
        except BaseException as error:
            self._driver.abandon_capture()
            # TensorRT's own errors are RuntimeErrors; an interrupt must not be taken for a refusal.
            if not isinstance(error, BackendError | RuntimeError):
                raise
            self._refuse_capture(sequence, graphs, str(error))
            self._enqueue(graphs, moves)
            return
        self._driver.launch(sequence.graph)

    def _not_capturable(self, graphs: tuple[str, ...]) -> list[str]:
        """The plans of these graphs that TensorRT-RTX does not let be captured; full TensorRT has no such question."""
        plans = dict.fromkeys(call.plan for graph in graphs for call in self._program(graph).calls)
        contexts = {name: self._context(name) for name in plans}
        return [
            name
            for name, context in contexts.items()
            if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(self._driver.stream)
        ]

    def _refuse_capture(self, sequence: _Sequence, graphs: tuple[str, ...], why: str) -> None:
        sequence.refused = True
        self.notes.append(f"{', '.join(graphs)}: not captured as a CUDA graph, every call is launched: {why}")

    def _enqueue(self, graphs: tuple[str, ...], moves: tuple[tuple[str, str], ...]) -> None:
        assert self._sizes is not None
        for graph in graphs:
            loaded = self._programs[graph]
            for number, call in enumerate(self._program(graph).calls):
                plan = self._engine.plans[call.plan]
                context = self._context(call.plan)
                for port in (*plan.inputs, *plan.outputs):
                    self._bind(context, port.name, self._addresses[buffer_of(call, port)])
                for port in plan.inputs:
                    shape = resolve(port.shape, self._sizes)
                    if plan.profiles and not context.set_input_shape(port.name, shape):
                        raise BackendError(
                            f"plan {call.plan} refused {port.name} as {list(shape)}: {self._logger.told()}"
                        )
                for weight in plan.weights:
                    self._bind(context, weight.name, loaded.address + loaded.arena.offsets[number, weight.name])
                if not context.execute_async_v3(self._driver.stream):
                    raise BackendError(
                        f"plan {call.plan} of {graph}, call {number}, did not run: {self._logger.told()}"
                    )
        for source, target in moves:
            self._driver.copy(self._addresses[target], self._addresses[source], self._buffers[source].nbytes)

    def _check_written(self, graphs: tuple[str, ...]) -> None:
        """Refuse to compute with a buffer that nothing has put or computed; what these graphs leave counts as filled."""
        for graph in graphs:
            for call in self._program(graph).calls:
                plan = self._engine.plans[call.plan]
                missing = [name for port in plan.inputs if (name := buffer_of(call, port)) not in self._written]
                if missing:
                    raise BackendError(f"graph {graph!r} needs {', '.join(missing)}, which nothing has produced")
                self._written.update(buffer_of(call, port) for port in plan.outputs)

    def _bind(self, context: Any, port: str, address: int) -> None:
        if not context.set_tensor_address(port, address):
            raise BackendError(f"a plan has no input or output {port!r}; the bundle is wrong, rebuild it")

    def _load(self, graph: str) -> None:
        """Bring a program's weights and engines to the GPU, once, and the contexts of the present sizes."""
        program = self._program(graph)
        if self._sizes is None:
            raise BackendError(f"{graph}: no sizes were prepared")
        names = list(dict.fromkeys(call.plan for call in program.calls))
        for name in names:
            if name not in self._engines:
                self._engines[name] = self._deserialize(name)
        self._reserve_scratch(names)
        for name in names:
            self._make_context(name)
        if graph not in self._programs:
            self._programs[graph] = self._upload(graph, program)

    def _deserialize(self, name: str) -> Any:
        file = self._engine.plans[name].file
        assert file is not None
        engine = self._runtime.deserialize_cuda_engine(self._bundle.checked_file(file).read_bytes())
        if engine is None:
            raise BackendError(
                f"{self._bundle.root / file}: {self._target.kind} {self._trt.__version__} does not load it on "
                f"{self._driver.gpu.name}: {self._logger.told()}; rebuild the bundle for this GPU and version"
            )
        return engine

    def _reserve_scratch(self, names: list[str]) -> None:
        """One piece of working memory for all plans, which never run at the same time, as large as the hungriest needs."""
        assert self._sizes is not None
        wanted = max(
            int(
                self._engines[n].get_device_memory_size_for_profile_v2(
                    profile_for(n, self._engine.plans[n], self._sizes)
                )
            )
            for n in names
        )
        address, size = self._scratch
        if wanted > size:
            self._driver.synchronize()
            self._drop_graphs()
            if size:
                self._free(address)
            self._scratch = (0, 0)
            self._scratch = (self._allocate(wanted, "the plans' working memory"), wanted)
            for context in self._contexts.values():
                context.set_device_memory(*self._scratch)

    def _make_context(self, name: str) -> None:
        assert self._sizes is not None
        profile = profile_for(name, self._engine.plans[name], self._sizes)
        if (name, profile) in self._contexts:
            return
        engine = self._engines[name]
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(engine, "create_runtime_config") and hasattr(self._trt, "CudaGraphStrategy"):
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.DISABLED
            # Compiled in the background, kernels for the shapes at hand would be ready only after a step was captured without.
            eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
            file = self._engine.plans[name].file
            self._caches.attach(config, name, self._bundle.manifest.files[str(file)].sha256)
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(strategy)
        if context is None:
            raise BackendError(f"plan {name}: no execution context on {self._driver.gpu.name}: {self._logger.told()}")
        # The profile first: how much working memory a context wants depends on it.
        profiles = self._engine.plans[name].profiles
        if profiles and not context.set_optimization_profile_async(profile, self._driver.stream):
            raise BackendError(f"plan {name}: its optimization profile {profile} was refused: {self._logger.told()}")
        if self._scratch[1]:
            context.set_device_memory(*self._scratch)
        if self._engine.plans[name].expected.get("collectives"):
            self._connect(name, context)
        self._contexts[name, profile] = context

    def _connect(self, name: str, context: Any) -> None:
        """Give a new context the communicator; TensorRT waits in it until every rank has done the same."""
        if self._communicator is None or not context.set_communicator(self._communicator.capsule):
            raise BackendError(
                f"plan {name}: TensorRT refused the communicator, so its collectives would not run: {self._logger.told()}"
            )

    def _context(self, name: str) -> Any:
        assert self._sizes is not None
        return self._contexts[name, profile_for(name, self._engine.plans[name], self._sizes)]

    def _upload(self, graph: str, program: Program) -> _Loaded:
        import numpy as np

        stored = component_weights(self._bundle, program.weights)
        arena = plan_arena(program, self._engine, stored)
        if not arena.nbytes:
            return _Loaded(arena, 0)
        address = self._allocate(arena.nbytes, f"the weights of {graph}")
        for piece in arena.pieces:
            data = stored[piece.name].read()
            for start in range(0, len(data), UPLOAD_BYTES):
                part = np.ascontiguousarray(data[start : start + UPLOAD_BYTES])
                self._driver.upload(address + piece.offset + start, part)
                self._driver.synchronize()
        return _Loaded(arena, address)

    def _program(self, graph: str) -> Program:
        if graph not in self._engine.programs:
            raise BackendError(f"{self._bundle.root}: target {self._target.name!r} has no program {graph!r}")
        return self._engine.programs[graph]

    def _buffer(self, name: str) -> Buffer:
        if name not in self._buffers:
            raise BackendError(f"no program of target {self._target.name!r} reads or writes {name!r}")
        return self._buffers[name]

    def _allocate(self, nbytes: int, what: str) -> int:
        try:
            address = self._driver.allocate(nbytes)
        except OutOfMemoryError as error:
            raise self._out_of_memory(f"{what} ({nbytes / 2**20:,.0f} MiB)", error) from error
        self._memory.append(address)
        return address

    def _out_of_memory(self, what: str, error: OutOfMemoryError) -> OutOfMemoryError:
        """Free everything, and the error to raise."""
        self._release()
        return OutOfMemoryError(
            f"{self._driver.gpu.name} has no room for {what}: {error}. Everything this bundle held there is free again; ask "
            "for a smaller size or guidance 1, free the GPU, or choose another --target"
        )

    def _free(self, address: int) -> None:
        self._memory.remove(address)
        self._driver.free(address)

    def _drop_graphs(self) -> None:
        for sequence in self._sequences.values():
            if sequence.graph is not None:
                self._driver.destroy(sequence.graph)
        self._sequences.clear()

    def _forget(self) -> None:
        """Give the buffers back, and the graphs that hold their addresses."""
        if self._buffer_memory:
            self._driver.synchronize()
            self._drop_graphs()
            self._free(self._buffer_memory)
        self._buffer_memory, self._sizes, self._buffers, self._addresses = 0, None, {}, {}
        self._written.clear()

    def _release(self) -> None:
        self._driver.synchronize()
        self._drop_graphs()
        self._contexts.clear()
        self._caches.clear()
        self._engines.clear()
        self._programs.clear()
        for address in self._memory:
            self._driver.free(address)
        self._memory, self._scratch, self._buffer_memory = [], (0, 0), 0
        self._sizes, self._buffers, self._addresses = None, {}, {}
        self._written.clear()
        self._alive.clear()


def _to_device(array: np.ndarray, dtype: str) -> np.ndarray:
    import numpy as np

    return to_bf16(array) if dtype == "bfloat16" else np.asarray(array, dtype=np.dtype(dtype))


def _from_device(data: np.ndarray, buffer: Buffer) -> np.ndarray:
    import numpy as np

    if buffer.dtype == "bfloat16":
        return from_bf16(data.view(np.uint16)).reshape(buffer.shape)
    return data.view(np.dtype(buffer.dtype)).reshape(buffer.shape)
